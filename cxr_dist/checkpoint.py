"""What a run leaves to go on from: weights, optimizer, position - written complete or not at all.

A checkpoint is one `.npz` file (NumPy's zip, whose members carry a CRC): arrays only, so loading one
executes nothing. It is written under a temporary name, flushed to disk and renamed.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.errors import UserError

Arrays = dict[str, npt.NDArray[Any]]
_STATE = "state.json"
_PREFIX = "epoch-"
KEPT = 2
"""How many checkpoints are kept: the newest, and the one before in case the newest is damaged."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its name: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """JSON without NaN: indented, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()) and None)


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Write arrays and a JSON state as one file."""
    encoded = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    write_atomically(path, lambda file: np.savez(file, **{_STATE: encoded}, **arrays))


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read what `save_arrays` wrote; every member's CRC is checked.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        state = json.loads(arrays.pop(_STATE).tobytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); remove it to go on from the one before") from None
    return arrays, state


def model_arrays(model: Any) -> Arrays:
    """The model's weights by path, moving statistics included: what decides its output."""
    return {f"model/{variable.path}": np.asarray(variable) for variable in model.weights}


def restore_model(model: Any, arrays: Arrays) -> None:
    """Assign what `model_arrays` gave.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    for variable in model.weights:
        value = arrays.get(f"model/{variable.path}")
        if value is None or value.shape != tuple(variable.shape):
            raise ValueError(f"the checkpoint has no weight {variable.path} of shape {tuple(variable.shape)}")
        variable.assign(value)


def optimizer_arrays(optimizer: Any) -> Arrays:
    return {f"optimizer/{index}": np.asarray(variable) for index, variable in enumerate(optimizer.variables)}


def restore_optimizer(optimizer: Any, arrays: Arrays) -> None:
    """Assign what `optimizer_arrays` gave, by order: names repeat among an optimizer's variables."""
    for index, variable in enumerate(optimizer.variables):
        value = arrays.get(f"optimizer/{index}")
        if value is None or value.shape != tuple(variable.shape):
            raise ValueError(f"the checkpoint has no optimizer variable {index} of shape {tuple(variable.shape)}")
        variable.assign(value)


class CheckpointFolder:
    """The checkpoints of one run: one for each finished epoch, the newest few kept, and the best weights."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def best(self) -> Path:
        return self._folder / "best.npz"

    def save(self, epochs_done: int, arrays: Arrays, state: Mapping[str, Any]) -> None:
        """`epochs_done` counts over all stages and names the file."""
        save_arrays(self._folder / f"{_PREFIX}{epochs_done:05d}.npz", arrays, state)
        for path in self._all()[:-KEPT]:
            path.unlink(missing_ok=True)

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, Arrays, dict[str, Any]] | None:
        """The newest whole checkpoint; a damaged one is passed over with a warning."""
        for path in reversed(self._all()):
            try:
                return path, *load_arrays(path)
            except UserError as error:
                warn(str(error))
        return None

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*.npz"))
