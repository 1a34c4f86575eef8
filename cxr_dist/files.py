"""Files that are whole or not there: a temporary name in the same folder, fsync, rename."""

import json
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its name. Folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_temporary(name: str, files: Collection[str]) -> bool:
    """Whether `name` is that of a temporary file which a stopped process left beside one of `files`."""
    return name.endswith(".tmp") and any(name.startswith(f".{file}.") for file in files)


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, complete or not at all."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Put `text`, as UTF-8, at `path`, complete or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Indented JSON without NaN, complete or not at all.

    Raises:
        ValueError: `value` holds a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
