"""Datasets on object storage (S3, GCS): put there whole or not at all, and fetched into a bounded stage here.

A place is a local folder or an address that `pyarrow.fs.FileSystem.from_uri` knows (`s3://bucket/name`,
`gs://bucket/name`). Records are read from local shards by their offset, millions of times in an order that no storage
could foresee, so a dataset is fetched once, before it is read. The stage keeps what was fetched, by address and
content, up to a limit; the datasets that were used longest ago leave first, and none that a process is using.

Every byte is checked: shards against the SHA-256 in the manifest when they come down, and when they went up by reading
them back. The manifest goes up last, and comes into its place last.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tfrecords_builder.common import locks
from tfrecords_builder.common.disk_cache import DiskCache
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import intended_name, move_durably, write_atomically
from tfrecords_builder.common.object_storage import StorageFolder, patiently
from tfrecords_builder.common.places import Place
from tfrecords_builder.format.manifest import MANIFEST_NAME, ShardInfo, read_manifest
from tfrecords_builder.format.sharding import is_shard_name
from tfrecords_builder.format.tfds_files import FILES, tfds_files

Progress = Callable[[int, int], None]

STAGE_VARIABLE = "CXR_DIST_STAGE"
STAGE_LIMIT_VARIABLE = "CXR_DIST_STAGE_GB"
DEFAULT_STAGE_LIMIT_GB = 100.0
SECONDS_TO_WAIT = 3600.0
"""For another process that fetches the same dataset."""

_TRANSFERS = 4
"""Shards on their way at once: enough to fill a link, and a bound for memory."""


@dataclass(frozen=True)
class Stage:
    """The folder of this machine into which datasets are fetched."""

    folder: Path
    limit: int
    """Bytes."""

    @classmethod
    def from_environment(cls) -> "Stage":
        """$CXR_DIST_STAGE and $CXR_DIST_STAGE_GB, or the user's cache folder and 100 GB.

        Raises:
            UserError: The limit is no positive number.
        """
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(os.environ.get(STAGE_VARIABLE) or f"{cache}/cxr-dist/datasets").expanduser()
        text = os.environ.get(STAGE_LIMIT_VARIABLE) or str(DEFAULT_STAGE_LIMIT_GB)
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if not 0 < limit < float("inf"):
            raise UserError(f"{STAGE_LIMIT_VARIABLE}={text}: must be a number of gigabytes above 0")
        return cls(folder, int(limit * 1e9))

    def make_room(self, needed: int, what: str) -> None:
        """Remove the datasets that were used longest ago until `needed` more bytes fit.

        Raises:
            UserError: They do not fit, even so.
        """
        cache = DiskCache(self.folder, self.limit, MANIFEST_NAME, _lock_file)
        used = cache.make_room(needed)
        if used + needed > self.limit:
            raise UserError(
                f"{what}: needs {needed / 1e9:.2f} GB in {self.folder}, whose limit is {self.limit / 1e9:.2f} GB "
                f"({used / 1e9:.2f} GB are in use); set {STAGE_LIMIT_VARIABLE}"
            )
        if needed > cache.free_bytes():
            raise UserError(
                f"{what}: needs {needed / 1e9:.2f} GB, and the disk of {self.folder} has less; set {STAGE_VARIABLE} "
                "to a folder with more room"
            )


@contextmanager
def local_copy(place: Place, stage: Stage | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """The dataset's folder on this machine: the place itself, or what was fetched from it, held while it is used.

    Args:
        place: A folder, or an address.
        stage: Where to fetch to; by default as the environment says.
        progress: Called with (records fetched, records in all).

    Raises:
        UserError: There is no dataset, it is damaged, it does not fit, or the storage cannot be reached.
    """
    if isinstance(place, Path):
        yield place
        return
    remote = StorageFolder.open(place)
    stage = stage or Stage.from_environment()
    content = remote.read(MANIFEST_NAME)
    if content is None:
        raise UserError(
            f"{remote.name}: holds no {MANIFEST_NAME}, so it is not a complete dataset; build one with cxr-dist build"
        )
    folder = stage.folder / f"{_key(place)}-{hashlib.sha256(content).hexdigest()[:16]}"
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        with _lock(folder, shared=True) as mine:
            if mine and (folder / MANIFEST_NAME).is_file():
                yield folder
                return
        with _lock(folder) as mine:
            if mine and not (folder / MANIFEST_NAME).is_file():
                _fetch(remote, content, folder, stage, progress)
        if not mine:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: another process has been fetching {remote.name} for an hour; stop it, and try again"
                )
            time.sleep(0.2)


@contextmanager
def staged_output(
    url: str, needed: int, stage: Stage | None = None, progress: Progress | None = None
) -> Iterator[Path]:
    """A local folder to build in, which goes up when the block ends without an error.

    It begins as what is there: the dataset at the address, so that a build which changes nothing does nothing, or a
    build that was stopped. `needed` is what the build may take, in bytes; `progress` is called with (records sent,
    records in all).

    Raises:
        UserError: The address holds something else, or cannot be written.
    """
    remote = StorageFolder.open(url)
    _check_ours(remote)
    stage = stage or Stage.from_environment()
    folder = stage.folder / f"{_key(url)}-build"
    with _lock(folder) as mine:
        if not mine:
            raise UserError(f"{remote.name}: another process of this machine is building it; wait for it")
        if not folder.is_dir() or locks.is_empty(folder):
            shutil.rmtree(folder, ignore_errors=True)  # with the lock file of a build that was killed at its start
            stage.make_room(needed, remote.name)
            if remote.read(MANIFEST_NAME) is None:
                folder.mkdir(exist_ok=True)
            else:
                with local_copy(url, stage) as present:
                    _copy(present, folder)
        yield folder
        _put(folder, remote, progress)
        content = (folder / MANIFEST_NAME).read_bytes()
        final = stage.folder / f"{_key(url)}-{hashlib.sha256(content).hexdigest()[:16]}"
        with _lock(final) as free:
            # Readers on this machine need not fetch what was built here.
            if free and not final.exists():
                folder.rename(final)
        if folder.exists():
            shutil.rmtree(folder)


def _check_ours(remote: StorageFolder) -> None:
    """`UserError` when the folder holds what is no dataset, whole or on its way up."""
    names = remote.names()
    foreign = [name for name in names if not (is_shard_name(name) or name in (*FILES, MANIFEST_NAME))]
    if foreign and MANIFEST_NAME not in names:
        raise UserError(f"{remote.name}: contains other files than a dataset ('{foreign[0]}'); give another address")


def _fetch(remote: StorageFolder, content: bytes, folder: Path, stage: Stage, progress: Progress | None) -> None:
    """Bring a dataset down; shards of a fetch that was stopped are used again when they are whole."""
    incoming = folder / ".incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if intended_name(path.name) is not None:
            path.unlink()  # of a process that was killed
    (incoming / MANIFEST_NAME).write_bytes(content)
    try:
        manifest = read_manifest(incoming)
    except UserError as error:
        raise UserError(str(error).replace(str(incoming), remote.name)) from error
    present = {shard.name for shard in manifest.shards if _is_whole(folder / shard.name, shard.sha256)}
    missing = [shard for shard in manifest.shards if shard.name not in present]
    stage.make_room(sum(shard.bytes for shard in missing), remote.name)

    @patiently
    def bring(shard: ShardInfo) -> None:
        def write(file: IO[bytes]) -> None:
            digest, left = hashlib.sha256(), shard.bytes  # no more than there was room made for
            for chunk in remote.chunks(shard.name):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                file.write(chunk)
            if left or digest.hexdigest() != shard.sha256:
                raise UserError(
                    f"{remote.name}/{shard.name}: is not the file that was built (size or SHA-256 differs); restore "
                    "it, or rebuild the dataset"
                )

        write_atomically(folder / shard.name, write)

    _for_each(bring, missing, sum(shard.records for shard in manifest.shards), progress)
    for name, file_content in tfds_files(manifest).items():
        (folder / name).write_bytes(file_content)
    move_durably(incoming / MANIFEST_NAME, folder / MANIFEST_NAME)
    incoming.rmdir()


def _put(folder: Path, remote: StorageFolder, progress: Progress | None) -> None:
    """Send a dataset up; shards that are there already, whole, stay."""
    manifest = read_manifest(folder)
    if remote.read(MANIFEST_NAME) == (folder / MANIFEST_NAME).read_bytes() and all(
        remote.size(shard.name) == shard.bytes for shard in manifest.shards
    ):
        return
    there = remote.names()
    # As on a disk: without its manifest the place is no dataset, whatever happens before the new one.
    if MANIFEST_NAME in there:
        remote.remove(MANIFEST_NAME)

    def send(shard: ShardInfo) -> None:
        whole = shard.name in there and remote.size(shard.name) == shard.bytes
        if not (whole and remote.digest(shard.name) == shard.sha256):
            remote.upload(folder / shard.name)

    _for_each(send, manifest.shards, sum(shard.records for shard in manifest.shards), progress)
    for name in FILES:
        remote.upload(folder / name)
    known = {shard.name for shard in manifest.shards}
    for name in there:
        if is_shard_name(name) and name not in known:
            remote.remove(name)
    remote.upload(folder / MANIFEST_NAME)


def _for_each(
    move: Callable[[ShardInfo], None], shards: Sequence[ShardInfo], total: int, progress: Progress | None
) -> None:
    """Move shards, some at once; of `total` records those of other shards need not be moved."""
    done = total - sum(shard.records for shard in shards)
    with ThreadPoolExecutor(_TRANSFERS) as threads:
        try:
            for shard, _ in zip(shards, threads.map(move, shards), strict=True):
                done += shard.records
                if progress is not None:
                    progress(done, total)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _copy(dataset: Path, folder: Path) -> None:
    """Copy a dataset to where there is none, whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.copy")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(dataset, unfinished)
    unfinished.rename(folder)


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _key(url: str) -> str:
    """A name for an address: something to recognise it by, and a digest."""
    readable = "".join(letter if letter.isalnum() else "-" for letter in url.partition("?")[0].rstrip("/"))[-40:]
    return f"{readable}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"


def _lock_file(folder: Path) -> Path:
    """Beside the folder, as that comes and goes."""
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def _lock(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Whether the folder's lock could be had; the folder counts as used now, if so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.held(_lock_file(folder), shared=shared) as descriptor:
        if descriptor is not None and shared:
            os.utime(descriptor)
        yield descriptor is not None
