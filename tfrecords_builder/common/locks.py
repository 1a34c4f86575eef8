"""Locks that processes hold on files, also processes of several machines on a shared file system.

A lock ends with the process that holds it, so a lock file that a killed process left does no harm. A file is locked,
never a folder: NFS has no locks on folders, and makes of a lock on a file one that all its machines see. For an
exclusive lock it asks for a file that is open for writing.
"""

import errno
import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tfrecords_builder.common.errors import UserError

LOCK = ".cxr-lock"
"""The lock file of a folder, inside it while the folder is held."""
FOREVER = math.inf
_POLL_S = 0.2
_ATTEMPTS = 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def acquire(path: Path, *, shared: bool = False, create: bool = True, wait_s: float = 0.0) -> int | None:
    """Lock the file `path`, whose folder exists; a descriptor whose closing gives the lock up, or None when it is held.

    Args:
        path: The file.
        shared: Whether other processes may hold a shared lock at the same time.
        create: Whether the file is made if it is missing. Without, a shared lock needs no permission to write.
        wait_s: How long to wait for another process, at most.

    Raises:
        UserError: The file system has no locks.
        OSError: The file cannot be opened.
    """
    flags = os.O_RDONLY if shared and not create else os.O_RDWR | (os.O_CREAT if create else 0)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    until = time.monotonic() + wait_s
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            locked = _try_lock(descriptor, path, kind)
            if locked and _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not locked:
            if time.monotonic() >= until:
                return None
            time.sleep(min(_POLL_S, max(until - time.monotonic(), 0.0)))


@contextmanager
def held(path: Path, *, shared: bool = False, create: bool = True) -> Iterator[int | None]:
    """As `acquire`, without waiting; the lock is given up at the end of the block."""
    descriptor = acquire(path, shared=shared, create=create)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def held_folder(folder: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """A folder, made if need be, held against other processes; gone again if it was made here and nothing is in it.

    A folder that this process may not write is not held: nothing can be changed there.

    Args:
        folder: Where the lock file is while the lock is held.
        busy: What to tell the user when another process holds it: who that is, and the fix.
        wait_s: How long to wait for another process, at most.

    Raises:
        UserError: Another process holds the folder, or its file system has no locks.
        OSError: The folder cannot be made.
    """
    made = not folder.exists()
    lock = folder / LOCK
    try:
        descriptor = _acquire_in(folder, wait_s)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE or not folder.is_dir():
            raise
        if os.access(folder, os.W_OK):
            message = f"{lock}: belongs to another user; remove it if no process of theirs uses the folder"
            raise UserError(message) from None
        yield
        return
    if descriptor is None:
        raise UserError(f"{folder}: {busy}")
    try:
        yield
    finally:
        # Removed before it is given up: whoever waits for it finds that it is gone, and makes another one.
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but its lock file."""
    return all(entry.name == LOCK for entry in os.scandir(folder))


def _acquire_in(folder: Path, wait_s: float) -> int | None:
    """Lock a folder that is made if need be, and that another process may be removing."""
    for attempt in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return acquire(folder / LOCK, wait_s=wait_s)
        except (FileExistsError, FileNotFoundError):
            if attempt == _ATTEMPTS - 1 or (folder.exists() and not folder.is_dir()):
                raise
    return None


def _try_lock(descriptor: int, path: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"{path}: this file system has no locks ({error.strerror}); mount it with locks (Lustre: -o flock; NFS: "
            "start its lock service), or use a folder on another one"
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that was opened still has its name: the process that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False
