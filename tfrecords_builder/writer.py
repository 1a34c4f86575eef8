"""What a worker process does: turn source files into encoded images, and encoded images into shards.

Imports neither TensorFlow nor Arrow, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder import images, recordio, schema


@dataclass(frozen=True, slots=True)
class SpooledImage:
    """A source image after decoding: either its place in a spool file, or the reason for rejecting it."""

    path: str
    sha256: str | None
    width: int | None = None
    height: int | None = None
    reason: str | None = None
    spool: str = ""
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class IngestTask:
    """Some source images to decode, resize and encode."""

    source: Path
    paths: Sequence[str]
    spool_folder: Path
    image_size: int
    encoding: str
    stop_at_reject: bool


@dataclass(frozen=True, slots=True)
class ShardItem:
    """One record to write."""

    spool: str
    offset: int
    length: int
    label: int
    path: str
    index: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write, under `folder / name`."""

    folder: Path
    name: str
    spool_folder: Path
    items: Sequence[ShardItem]


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What `write_shard` wrote; `offsets` and `lengths` are those of its records, in order."""

    name: str
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def ingest(task: IngestTask) -> list[SpooledImage]:
    """Decode images, and append what is to be stored to this process's spool file.

    A file that is no whole image becomes an entry with a reason; with `stop_at_reject` it is the last.
    """
    done: list[SpooledImage] = []
    # One file a process, not a task: the number of open files stays small for any number of images.
    name = f"spool-{os.getpid()}"
    with (task.spool_folder / name).open("ab") as spool:
        for path in task.paths:
            digest: str | None = None
            try:
                data = images.read_bytes(task.source / path)
                digest = hashlib.sha256(data).hexdigest()
                gray, (width, height) = images.decode_gray(data, task.image_size, task.source / path)
            except images.ImageError as error:
                done.append(SpooledImage(path, digest, reason=error.reason))
                if task.stop_at_reject:
                    break
                continue
            encoded = schema.encode_image(gray, task.encoding)
            offset = spool.tell()
            spool.write(encoded)
            done.append(
                SpooledImage(path, digest, width, height, spool=name, offset=offset, length=len(encoded)),
            )
    return done


def write_shard(task: ShardTask) -> WrittenShard:
    """Write one shard from the spool; on return its bytes are on the disk."""
    spools: dict[str, int] = {}
    offsets: list[int] = []
    lengths: list[int] = []
    try:
        with recordio.RecordWriter(task.folder / task.name) as writer:
            for item in task.items:
                if item.spool not in spools:
                    spools[item.spool] = os.open(task.spool_folder / item.spool, os.O_RDONLY)
                image = os.pread(spools[item.spool], item.length, item.offset)
                if len(image) != item.length:
                    raise OSError(f"{task.spool_folder / item.spool}: ends early")
                payload = schema.encode_example(image=image, label=item.label, path=item.path, index=item.index)
                offsets.append(writer.write(payload))
                lengths.append(len(payload))
    finally:
        for descriptor in spools.values():
            os.close(descriptor)
    return WrittenShard(task.name, writer.bytes_written, writer.sha256, tuple(offsets), tuple(lengths))
