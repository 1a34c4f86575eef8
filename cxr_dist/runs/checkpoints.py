"""What a run leaves to go on from: weights, optimizer, position.

Most weights of a stage are frozen. So the weights of the base that a run starts from have a file of their own, written
once, and a checkpoint holds only the arrays that differ from it (`checkpoint_file` says how).
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.runs.checkpoint_file import SUFFIX, Arrays, explained, load_arrays, load_state, save_arrays
from cxr_dist.runs.versions import FormatError
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import intended_name

_EPOCH, _BEST, _BASE = "epoch-", "best-", "base-"
_NAME = re.compile(rf"{_EPOCH}(?P<epochs>\d+)(?:-step-(?P<step>\d+))?{re.escape(SUFFIX)}")
_BASE_NAME = re.compile(rf"{_BASE}[0-9a-f]{{32}}{re.escape(SUFFIX)}")
BASE_PATTERN = f"{_BASE}*{SUFFIX}"
"""Of files of base weights, for `Path.glob`."""
_BEST_OF, _BASE_OF = "best_epochs_done", "base"
KEPT = 2
"""How many checkpoints are kept: the newest, and the one before in case the newest is damaged."""


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """The errors of restoring a whole checkpoint into what does not take it, as words for people."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: does not fit this version of cxr-dist ({one_line(error)}); use the version that wrote it, or "
            "give a new --out"
        ) from error


def model_arrays(model: Any) -> Arrays:
    """The model's weights by path, moving statistics included: what decides its output."""
    return {f"model/{variable.path}": np.asarray(variable) for variable in model.weights}


def restore_model(model: Any, arrays: Arrays) -> None:
    """Assign what `model_arrays` gave.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    for variable in model.weights:
        _assign(variable, arrays.get(f"model/{variable.path}"), f"weight {variable.path}")


def optimizer_arrays(optimizer: Any) -> Arrays:
    return {f"optimizer/{index}": np.asarray(variable) for index, variable in enumerate(optimizer.variables)}


def restore_optimizer(optimizer: Any, arrays: Arrays) -> None:
    """Assign what `optimizer_arrays` gave, by order: names repeat among an optimizer's variables."""
    for index, variable in enumerate(optimizer.variables):
        _assign(variable, arrays.get(f"optimizer/{index}"), f"optimizer variable {index}")


def _assign(variable: Any, value: npt.NDArray[Any] | None, name: str) -> None:
    if value is None or value.shape != tuple(variable.shape):
        raise ValueError(f"the checkpoint has no {name} of shape {tuple(variable.shape)}")
    variable.assign(value)


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is: epochs done over all stages, and steps done in the one after."""

    epochs_done: int
    step: int = 0

    @property
    def file_name(self) -> str:
        """Of the checkpoint of this position."""
        return f"{_EPOCH}{self.epochs_done:05d}{f'-step-{self.step:07d}' if self.step else ''}{SUFFIX}"

    @classmethod
    def of_file(cls, name: str) -> "Position | None":
        """The position that a file's name tells; None for files of another kind."""
        found = _NAME.fullmatch(name)
        return cls(int(found["epochs"]), int(found["step"] or 0)) if found else None


DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True)
class _Base:
    """The weights that a run starts from, under a name that follows from their bits."""

    name: str
    arrays: Arrays

    @classmethod
    def of(cls, arrays: Arrays) -> "_Base":
        digest = hashlib.sha256()
        for key, array in sorted(arrays.items()):
            digest.update(f"{key} {array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return cls(f"{_BASE}{digest.hexdigest()[:32]}{SUFFIX}", arrays)

    def changed(self, arrays: Arrays) -> Arrays:
        """Those that are not, to the bit, what the base has under their name."""
        return {key: array for key, array in arrays.items() if not _same_bits(array, self.arrays.get(key))}


def _same_bits(array: npt.NDArray[Any], other: npt.NDArray[Any] | None) -> bool:
    """`==` takes zeros of different signs for equal, and NaN for different."""
    if other is None or (array.dtype, array.shape) != (other.dtype, other.shape):
        return False
    return array.tobytes() == other.tobytes()


@dataclass(frozen=True)
class Checkpoint:
    """What a whole checkpoint holds."""

    position: Position
    arrays: Arrays
    """Weights, optimizer and the like."""
    state: dict[str, Any]
    best_epochs_done: int
    """Which epoch left the best weights, over all stages; 0 while there are none."""
    best_arrays: Arrays
    """Those weights."""


class _ChangedArrays:
    """Files of a folder that hold what differs from the base, and the base's own file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.base: _Base | None = None

    def save(self, path: Path, arrays: Arrays, state: Mapping[str, Any]) -> None:
        if self.base is not None and not (self._folder / self.base.name).exists():
            save_arrays(self._folder / self.base.name, self.base.arrays, {})
        changed = arrays if self.base is None else self.base.changed(arrays)
        save_arrays(path, changed, {_BASE_OF: self.base.name if self.base else None, **state})

    def load(self, path: Path) -> tuple[Arrays, dict[str, Any]]:
        """What `save` got; further files then have the same base."""
        arrays, state = load_arrays(path)
        name = state.pop(_BASE_OF, None)
        if self.base is None or self.base.name != name:
            self.base = None if name is None else self._load_base(path, str(name))
        return arrays if self.base is None else self.base.arrays | arrays, state

    def _load_base(self, path: Path, name: str) -> _Base:
        if not _BASE_NAME.fullmatch(name):  # a checkpoint must not name files elsewhere
            raise UserError(f"{path}: is a damaged checkpoint (invalid name of base weights: {name[:80]})")
        try:
            return _Base(name, load_arrays(self._folder / name)[0])
        except UserError as error:
            reason = f"{error}".split(";")[0]
            raise UserError(f"{reason}; every checkpoint of the run needs it; give a new --out") from None


class CheckpointFolder:
    """The checkpoints of one run: the newest few, and of each the weights that were best until then.

    The best weights have a file for each time that they were beaten, named by the epochs done, so that an older
    checkpoint finds those of its own time: what follows from it is then what followed at first.
    """

    def __init__(self, folder: Path, keep: int = KEPT) -> None:
        self._folder, self._keep, self._files = folder, keep, _ChangedArrays(folder)

    def start_from(self, arrays: Arrays) -> None:
        """Name the weights that a new run starts from; `save` writes them once, and then what differs from them."""
        self._files.base = _Base.of(arrays)

    def save(
        self,
        position: Position,
        arrays: Arrays,
        state: Mapping[str, Any],
        best_epochs_done: int = 0,
        best_arrays: Arrays | None = None,
    ) -> None:
        """Write a checkpoint, and the best weights until then where they have no file yet; remove what is older.

        Args:
            position: Of the checkpoint; one of the same position is replaced.
            arrays: Weights, optimizer and the like.
            state: What else there is, as JSON.
            best_epochs_done: Which epoch left the best weights, over all stages; 0 while there are none.
            best_arrays: Those weights.
        """
        best = self.best(best_epochs_done)
        if best_epochs_done and best_arrays is not None and not best.exists():
            self._files.save(best, best_arrays, {"epochs_done": best_epochs_done})
        self._files.save(self._folder / position.file_name, arrays, {_BEST_OF: best_epochs_done, **state})
        kept, base = self._positions()[-self._keep :], self._files.base
        for path in self._folder.glob(f"*{SUFFIX}"):
            found = Position.of_file(path.name)
            other_base = base is not None and path.name != base.name and _BASE_NAME.fullmatch(path.name)
            if (found is not None and found not in kept) or other_base:
                path.unlink(missing_ok=True)
        self._remove_unused_best(best_epochs_done)

    def best(self, epochs_done: int) -> Path:
        """The file of the weights that the epoch left."""
        return self._folder / f"{_BEST}{epochs_done:05d}{SUFFIX}"

    def newest_best(self) -> Path | None:
        """The file of the best weights of all: of a finished run, those of its model."""
        return max(self._folder.glob(f"{_BEST}*{SUFFIX}"), default=None, key=lambda path: path.name)

    def load_best(self, path: Path) -> Arrays:
        """The weights in a file of this folder that `best` or `newest_best` names.

        Raises:
            UserError: they are missing or damaged, and cannot be had again without training.
        """
        try:
            return self._files.load(path)[0]
        except FormatError:
            raise
        except UserError as error:
            reason = f"{error}".split(";")[0]
            raise UserError(f"{reason}; the best weights of the run are lost; give a new --out") from None

    def load(self, position: Position) -> Checkpoint:
        """The checkpoint of a position, with the best weights of its time.

        Raises:
            UserError: either is missing or damaged.
        """
        path = self._folder / position.file_name
        arrays, state = self._files.load(path)
        with explained(path):
            best = int(state.pop(_BEST_OF))
        return Checkpoint(position, arrays, state, best, self.load_best(self.best(best)) if best else {})

    def newest(self, warn: Callable[[str], None], *, set_aside: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint, if there is any; others are passed over with a warning.

        Args:
            warn: Told of each one that is passed over.
            set_aside: Give those another name, once a whole one was found: they are no progress, nor worth keeping in
                place of a whole one.

        Raises:
            FormatError: one is of another format.
            UserError: there are some, and none of them can be read. To start anew would overwrite what is left.
        """
        positions = self._positions()
        damaged = []
        for position in reversed(positions):
            try:
                checkpoint = self.load(position)
            except FormatError:
                raise  # nothing is wrong with the file
            except UserError as error:
                warn(str(error))
                damaged.append(self._folder / position.file_name)
                continue
            for path in damaged if set_aside else ():
                path.replace(path.with_suffix(DAMAGED_SUFFIX))
            return checkpoint
        if positions:
            path = self._folder / positions[-1].file_name
            raise UserError(f"{path}: no checkpoint of this run can be read; give a new --out")
        return None

    def newest_position(self) -> Position | None:
        """Of the newest checkpoint, as its name says; whether it is whole was not looked at."""
        return max(self._positions(), default=None)

    def clean(self) -> None:
        """Remove what a process left that was killed while it wrote: a file of hundreds of megabytes each time."""
        for path in self._folder.glob(".*"):
            if (intended_name(path.name) or "").endswith(SUFFIX):
                path.unlink(missing_ok=True)

    def files_of(self, position: Position) -> list[Path]:
        """The files that a checkpoint needs, in the order in which they must come into another folder: itself last.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self._folder / position.file_name
        state = load_state(path)
        base, best = state.get(_BASE_OF), state[_BEST_OF]
        return [*([self._folder / base] if base else []), *([self.best(best)] if best else []), path]

    def keep_best_alone(self) -> None:
        """Remove all that a finished run does not need to restore its best weights; nothing where they are damaged."""
        best = self.newest_best()
        try:
            base = load_state(best).get(_BASE_OF) if best else None
        except UserError:
            return
        self.remove_all(keep={best.name if best else "", base or ""})

    def remove_all(self, keep: Collection[str] = ()) -> None:
        """Remove every checkpoint but the files that `keep` names; the folder stays."""
        self.clean()
        for pattern in (f"*{SUFFIX}", f"*{DAMAGED_SUFFIX}"):
            for path in self._folder.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def _remove_unused_best(self, newest: int) -> None:
        """Those that no checkpoint of the folder refers to; the older ones' references are read from the files."""
        paths = sorted(self._folder.glob(f"{_BEST}*{SUFFIX}"))
        if len(paths) <= 1:
            return
        used = {newest}
        for position in self._positions()[:-1]:
            try:
                used.add(load_state(self._folder / position.file_name)[_BEST_OF])
            except UserError:
                return  # damaged: whichever it refers to may be what a person needs
        for path in paths:
            if path not in {self.best(number) for number in used}:
                path.unlink(missing_ok=True)

    def _positions(self) -> list[Position]:
        found = (Position.of_file(path.name) for path in self._folder.glob(f"*{SUFFIX}"))
        return sorted(position for position in found if position is not None)
