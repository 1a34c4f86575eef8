"""Files that are whole or not there: a temporary name in the same folder, fsync, rename."""

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, TypeVar

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.locks import LOCK

R = TypeVar("R")

ENVIRONMENT_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS))
"""A disk that is full or not to be written: the user's to mend, wherever it is met."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[^.]+\.tmp")


def disk_error(error: BaseException) -> UserError | None:
    """What to tell the user of an error that is the disk's; None for any other."""
    if not isinstance(error, OSError) or error.errno not in ENVIRONMENT_ERRORS:
        return None
    return UserError(f"{error.filename or 'disk'}: {error.strerror}; fix this, and start the same command again")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write` fills a temporary file (and may read it) that then takes the name `path`. Folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def write_whole(path: Path, write: Callable[[IO[bytes]], R], *, durable: bool = True) -> R:
    """As `write_atomically`, in a folder that exists; what `write` returned.

    Every call has a temporary file of its own, so several processes may write the same file at once. The mode is the
    one that the umask gives to any new file.

    Args:
        path: A file that is there already is replaced.
        write: Gets the temporary file, open for writing and reading.
        durable: Whether the content and the name survive a power cut once this returns.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # By `os.open`, as the kernel then applies the umask: to read it, a process must change it for all its threads.
        with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b") as file:
            result = write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write does not say which file it was for
        raise
    if durable:
        sync(path.parent)
    return result


def move_durably(source: Path, target: Path) -> None:
    """Give a whole file its place on the same file system; it and its name are on the disk on return."""
    sync(source)
    source.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder, also while it changes."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # moved meanwhile
    return total


def intended_name(name: str) -> str | None:
    """The name that a temporary file would have taken, had its process not been stopped; None for other names."""
    found = _TEMPORARY.fullmatch(name)
    return found["name"] if found else None


def is_temporary(name: str, files: Collection[str]) -> bool:
    """Whether `name` is that of a temporary file which a stopped process left beside one of `files`."""
    return intended_name(name) in files


def check_output_folder(
    folder: Path, what: str, option: str, is_ours: Callable[[str], bool], is_marked: Callable[[], bool] = lambda: True
) -> None:
    """Refuse, before any work, a place where a command must not write.

    Good are a path that does not exist, an empty folder, and a folder that holds nothing but what the command writes,
    whole or interrupted.

    Args:
        folder: The place.
        what: The command writes there, with its article: "an evaluation".
        option: That names the place, for the message.
        is_ours: Whether the command writes a file of that name. A temporary file counts as what it would have become.
        is_marked: Whether a file in it says that this program wrote it: names alone prove nothing.

    Raises:
        UserError: `folder` is a file, lies in one, or is a folder that holds something else.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{folder}: {'' if above == folder else f'{above} '}is a file; give a folder for {what}")
    if above != folder:
        return
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give another folder with {option}") from error
    foreign = [name for name in names if not is_ours(intended_name(name) or name)]
    whole = [name for name in names if intended_name(name) is None]
    if whole and not foreign and not is_marked():
        foreign = whole
    if foreign:
        raise UserError(
            f"{folder}: contains other files than {what} ('{foreign[0]}'); give an empty or new folder with {option}"
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, complete or not at all."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Put `text`, as UTF-8, at `path`, complete or not at all."""
    write_bytes(path, text.encode())


def head_of(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: object) -> None:
    """Indented JSON without NaN, complete or not at all.

    Raises:
        ValueError: `value` holds a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
