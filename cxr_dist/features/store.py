"""Computed arrays on disk, found again by what they were computed from; whole or not there.

An entry is a folder named by its key, which holds the rows in one part for each process that computed some, and
`entry.json`, which says what they are and carries their checksums. It is put together under another name and renamed,
so whoever finds it finds all of it. Several processes, of one run or of many, may use one store: computing an entry
holds a lock, and so does using one, which keeps it from being removed to make room.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from tfrecords_builder.common import locks
from tfrecords_builder.common.disk_cache import UNFINISHED, DiskCache, unused
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import ENVIRONMENT_ERRORS, bytes_below, sync, write_bytes, write_json
from tfrecords_builder.common.seal import read_sealed_json, sealed_json

Array = npt.NDArray[Any]
Description = Mapping[str, Any]
"""What decides every byte of an entry, as plain data."""

_ENTRY = "entry.json"
_LOCK = ".lock"
_CHUNK = 1 << 24
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)


def key_of(description: Description) -> str:
    """The name of the entry: equal descriptions, equal names."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


class Rows:
    """The rows of an entry, on disk, read by position."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = parts[0].dtype
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> Array:
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][positions])
        rows = np.empty((len(positions), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            rows[mine] = self.parts[number][positions[mine] - self._starts[number]]
        return rows


class PartWriter:
    """Appends rows to one part. A context manager; leaving it without an error makes the part one."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self._path, self._shape, self._dtype = path, shape, np.dtype(dtype)
        self._file = path.open("wb")
        self._crc, self._rows = 0, 0

    def append(self, rows: Array) -> None:
        """`rows` [n, ...] of the entry's shape, in any dtype that converts to the entry's without overflow.

        Raises:
            OverflowError: a value is not finite in the entry's dtype.
        """
        if rows.shape[1:] != self._shape:
            raise ValueError(f"rows of shape {rows.shape[1:]} where {self._shape} was expected")
        with np.errstate(over="ignore"):  # looked for below
            converted = np.ascontiguousarray(rows, self._dtype)
        if self._dtype.kind == "f" and not np.isfinite(converted).all():
            raise OverflowError(f"a value is not finite as {self._dtype}")
        data = converted.tobytes()
        self._file.write(data)
        self._crc = google_crc32c.extend(self._crc, data)
        self._rows += len(rows)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            write_json(self._path.with_suffix(".json"), {"rows": self._rows, "crc32c": self._crc})


class FeatureStore:
    """Entries in `folder`, of at most `limit_bytes` together: beyond, those not used for longest are removed."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self._cache = DiskCache(folder, limit_bytes, _ENTRY, lambda entry: entry / _ENTRY)
        self._used: list[int] = []
        """Descriptors that hold the entries in use."""

    def close(self) -> None:
        """Hold no entry any longer: from now on each may be removed. Rows that were found stay readable."""
        while self._used:
            os.close(self._used.pop())

    def has(self, description: Description) -> bool:
        """Whether there is such an entry, unchecked."""
        return (self.folder / key_of(description) / _ENTRY).is_file()

    def find(self, description: Description) -> Rows | None:
        """The entry, every byte of it checked; None when there is none, or none that is whole."""
        entry = self.folder / key_of(description)
        try:
            descriptor = locks.acquire(entry / _ENTRY, shared=True, create=False, wait_s=locks.FOREVER)
        except OSError:
            return None
        if descriptor is None:
            raise RuntimeError("a lock was not waited for")
        rows = _read(entry, description)
        if rows is None:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        self._used.append(descriptor)
        return rows

    @contextmanager
    def computing(self, descriptions: Sequence[Description], limit_s: float = locks.FOREVER) -> Iterator[None]:
        """Held by the one process, of all that use the store, that makes these entries or waits until another has.

        Raises:
            TimeoutError: another one has held them for `limit_s`.
        """
        with _folder_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            held, until = [], time.monotonic() + limit_s
            try:
                # In one order everywhere, or two processes could wait for each other.
                for key in sorted(key_of(description) for description in descriptions):
                    lock = locks.acquire(self.folder / f"{key}{_LOCK}", wait_s=max(until - time.monotonic(), 0.0))
                    if lock is None:
                        raise TimeoutError("another process computes the same features")
                    held.append(lock)
                yield
            finally:
                for descriptor in held:
                    os.close(descriptor)

    def fits(self, needed: int) -> bool:
        """Whether `needed` bytes would, once everything that may be removed was."""
        with _folder_errors(self.folder):
            removable = self._cache.removable_bytes()
            return needed <= min(self._cache.limit, self._cache.free_bytes() + removable)

    def begin(self, description: Description, needed: int) -> None:
        """Make room, and an empty work folder for the parts; by the process that holds `computing`."""
        work = self._work(description)
        with _folder_errors(self.folder):
            if work.exists():
                shutil.rmtree(work)
            self._remove_abandoned()
            self._cache.make_room(needed)
            free = self._cache.free_bytes()
            if free < needed:  # said now, not after minutes of computing
                raise UserError(
                    f"features.folder {self.folder}: has {free / 1e9:.3f} GB free, but {needed / 1e9:.3f} GB are "
                    "needed; free space, give another folder, or set features.cache=off"
                )
            work.mkdir()

    def has_begun(self, description: Description) -> bool:
        """Whether this process sees the work folder that `begin` made, in whichever process."""
        return self._work(description).is_dir()

    def written(self, description: Description) -> int:
        """Bytes of an entry that is being computed; 0 of none."""
        return bytes_below(self._work(description))

    def part(self, description: Description, number: int, shape: tuple[int, ...], dtype: str) -> PartWriter:
        """Where process `number` writes its rows, which follow those of the processes before it."""
        return PartWriter(self._work(description) / f"part-{number:05d}", shape, dtype)

    def commit(self, description: Description, parts: int, shape: tuple[int, ...], dtype: str) -> None:
        """Make the entry of its `parts`, all closed; by the process that called `begin`."""
        work, entry = self._work(description), self.folder / key_of(description)
        with _folder_errors(self.folder):
            made = [json.loads((work / f"part-{number:05d}.json").read_bytes()) for number in range(parts)]
            about = {"description": description, "shape": list(shape), "dtype": dtype, "parts": made}
            write_bytes(work / _ENTRY, sealed_json(about))
            if entry.exists():  # and was not whole, or it would have been found
                shutil.rmtree(entry)
            work.rename(entry)
            sync(self.folder)

    def _work(self, description: Description) -> Path:
        return self.folder / f"{key_of(description)}{UNFINISHED}"

    def _remove_abandoned(self) -> None:
        """What processes left that were stopped while they computed other entries: nobody holds their locks."""
        for work in self.folder.glob(f"*{UNFINISHED}"):
            lock = work.with_suffix(_LOCK)
            if lock.exists():
                with unused(lock) as free:  # held while it is removed, or another process could begin there
                    if free:
                        shutil.rmtree(work, ignore_errors=True)


def _read(entry: Path, description: Description) -> Rows | None:
    try:
        about = read_sealed_json(entry / _ENTRY)
        if about["description"] != json.loads(json.dumps(description)):
            return None
        shape, dtype = tuple(about["shape"]), np.dtype(about["dtype"])
        parts = []
        for number, part in enumerate(about["parts"]):
            path = entry / f"part-{number:05d}"
            size = part["rows"] * int(np.prod(shape)) * dtype.itemsize
            if path.stat().st_size != size or _crc(path) != part["crc32c"]:
                return None
            if part["rows"]:
                parts.append(np.memmap(path, dtype, "r", shape=(part["rows"], *shape)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Rows(parts) if parts else None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = google_crc32c.extend(crc, chunk)
    return crc


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the folder that the user can fix into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (*ENVIRONMENT_ERRORS, *_NO_FOLDER):
            raise UserError(
                f"features.folder {folder}: cannot be written ({error.strerror}); give another folder, or "
                "set features.cache=off"
            ) from error
        raise
