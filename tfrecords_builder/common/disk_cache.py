"""Folders below one folder, of a bounded size together: those not used for longest make room, and none in use does."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder.common import locks
from tfrecords_builder.common.files import ENVIRONMENT_ERRORS, bytes_below

UNFINISHED = ".work"
"""How the name of a folder ends that is still being put together: it is no entry."""


@dataclass(frozen=True)
class DiskCache:
    """The folders in `folder`, of at most `limit` bytes together."""

    folder: Path
    limit: int
    mark: str
    """The file without which an entry is not whole: removed first, should a removal be stopped half-way."""
    lock_of: Callable[[Path], Path]
    """The lock file of an entry. Who uses the entry holds it; when it was last written says when that was."""

    def entries(self) -> list[Path]:
        """Least recently used first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in self.folder.iterdir() if path.suffix != UNFINISHED and path.is_dir()]
        used = {entry: self._last_used(entry) for entry in found}
        return sorted(found, key=lambda entry: (used[entry], entry))

    def make_room(self, needed: int) -> int:
        """Remove entries until `needed` more bytes fit or all others are in use; the bytes that are left."""
        entries = self.entries()
        sizes = {entry: bytes_below(entry) for entry in entries}
        used = sum(sizes.values())
        for entry in entries:
            if used + needed <= self.limit and needed <= self.free_bytes():
                break
            with unused(self.lock_of(entry)) as free:
                if free:
                    (entry / self.mark).unlink(missing_ok=True)
                    shutil.rmtree(entry, ignore_errors=True)  # another process may be at it
                    used -= sizes[entry]
        return used

    def free_bytes(self) -> int:
        """Of the disk."""
        return shutil.disk_usage(self.folder).free

    def removable_bytes(self) -> int:
        """Of the entries that nobody uses."""
        total = 0
        for entry in self.entries():
            with unused(self.lock_of(entry)) as free:
                total += bytes_below(entry) if free else 0
        return total

    def _last_used(self, entry: Path) -> float:
        try:
            return self.lock_of(entry).stat().st_mtime
        except OSError:
            return 0.0


@contextmanager
def unused(lock: Path) -> Iterator[bool]:
    """Whether no process holds the lock file; none can take it meanwhile.

    A file that is gone is held by nobody. One that may not be opened is somebody else's, and counts as held.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locks.held(lock, create=False))
        except FileNotFoundError:
            yield True
            return
        except OSError as error:
            if error.errno not in ENVIRONMENT_ERRORS:
                raise
            yield False
            return
        yield descriptor is not None
