"""One checkpoint file: arrays and a JSON state in the safetensors format, sealed with a checksum.

Arrays only, so loading one executes nothing, and any reader of the format opens it. The metadata hold one JSON text:
the state, and a checksum of the whole file, as the format has none of its own. The checksum stands inside because a
file renames in one step and two do not. The file is written under a temporary name, sealed, flushed to disk and
renamed: it is complete or not there.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from cxr_dist.runs.versions import FORMAT, check_format
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import write_atomically
from tfrecords_builder.common.seal import UNSEALED, check_seal, seal

Arrays = dict[str, npt.NDArray[Any]]
SUFFIX = ".safetensors"
_METADATA = "cxr-dist"


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Write arrays and a JSON state as one file.

    Raises:
        ValueError: an array's dtype is none of NumPy's own numbers (objects, bfloat16): it would not come back.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: cannot be saved as {array.dtype}")
    described = json.dumps({"format": FORMAT, "state": state, "seal": UNSEALED})
    # safetensors takes the bytes of other orders as they lie.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}

    def write(file: IO[bytes]) -> None:
        # Through this program's own file: errors of the library do not say that a disk is full.
        file.write(safetensors.numpy.save(ordered, {_METADATA: described}))
        seal(file)

    write_atomically(path, write)


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read what `save_arrays` wrote, after its checksum.

    Raises:
        FormatError: the file is of another format.
        UserError: the file is missing, damaged, or something else.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _state(path, file)  # noqa: SIM118 - no mapping


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state alone; raises as `load_arrays` does."""
    with _opened(path) as file:
        return _state(path, file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with explained(path):
        check_seal(path)
        with safe_open(path, framework="numpy") as file:
            yield file


def _state(path: Path, file: Any) -> dict[str, Any]:
    described = json.loads(file.metadata()[_METADATA])
    check_format(path, described)
    state: dict[str, Any] = described["state"]
    return state


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """All that reading a file can raise, as words for people."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(
            f"{path}: is a damaged checkpoint ({reason}); remove it to resume from the checkpoint before"
        ) from None
