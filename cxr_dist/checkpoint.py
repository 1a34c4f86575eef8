"""What a run leaves to go on from: weights, optimizer, position - written complete or not at all.

A checkpoint is one `.npz` file (NumPy's zip, whose members carry a CRC): arrays only, so loading one
executes nothing. It is written under a temporary name, flushed to disk and renamed. One member is JSON:
the state, and the names of all arrays, as no CRC guards the zip's own directory.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.errors import UserError, one_line
from tfrecords_builder.files import write_atomically

Arrays = dict[str, npt.NDArray[Any]]
_STATE = "state.json"
_PREFIX = "epoch-"
KEPT = 2
"""How many checkpoints are kept: the newest, and the one before in case the newest is damaged."""


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Write arrays and a JSON state as one file.

    Raises:
        ValueError: an array's dtype is none of NumPy's own (objects, bfloat16): it would not come back.
    """
    for name, array in arrays.items():
        if array.dtype.kind in "OV":
            raise ValueError(f"{name}: cannot be saved as {array.dtype}")
    described = {"arrays": sorted(arrays), "state": state}
    encoded = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)
    members: dict[str, Any] = {_STATE: encoded, **arrays}
    write_atomically(path, lambda file: np.savez(file, **members))


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read what `save_arrays` wrote; every member's CRC is checked.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {
                member.filename.removesuffix(".npy"): _read_member(archive, member) for member in archive.infolist()
            }
        described = json.loads(arrays.pop(_STATE).tobytes())
        state = described["state"]
        if described["arrays"] != sorted(arrays):
            raise ValueError("arrays are missing")
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        reason = one_line(error)
        raise UserError(f"{path}: damaged checkpoint ({reason}); remove it to go on from the one before") from None
    return arrays, state


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array; never an object, as that would be a pickle."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    # Read to its end before it is parsed: NumPy alone stops where the header says, short of the CRC.
    array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return array


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

    def load_best(self) -> tuple[Arrays, dict[str, Any]]:
        """The best weights and where they came from.

        Raises:
            UserError: they are missing or damaged, and cannot be had again without training.
        """
        try:
            return load_arrays(self.best)
        except UserError as error:
            raise UserError(
                f"{error}".split(";")[0] + "; the run lost its best weights: train into a new --out"
            ) from None

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, Arrays, dict[str, Any]] | None:
        """The newest whole checkpoint, if there is any; a damaged one is passed over with a warning.

        Raises:
            UserError: there are some, and none of them can be read. To start anew would overwrite what is left.
        """
        paths = self._all()
        for path in reversed(paths):
            try:
                return path, *load_arrays(path)
            except UserError as error:
                warn(str(error))
        if paths:
            raise UserError(f"{paths[-1]}: no checkpoint of this run can be read; train into a new --out")
        return None

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*.npz"))
