"""What a worker process does: turn source files into encoded images, and encoded images into shards.

Imports neither TensorFlow nor Arrow, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder import images, parts, recordio, schema


@dataclass(frozen=True, slots=True)
class IngestTask:
    """Some source images to decode, resize and encode."""

    source: Path
    files: Sequence[parts.SourceFile]
    folder: Path
    number: int
    """Of the part."""
    key: str
    """What determines the part beside its files."""
    image_size: int
    encoding: str
    stop_at_reject: bool


@dataclass(frozen=True, slots=True)
class IngestedImages:
    """A part, or what there is of one that ends with a rejected image."""

    part: parts.Part | None
    images: tuple[parts.PartImage, ...]


@dataclass(frozen=True, slots=True)
class ShardItem:
    """One record to write; the image lies in the part `part`."""

    part: str
    offset: int
    length: int
    label: int
    path: str
    index: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write, under `folder / name`, from the parts in `folder`."""

    folder: Path
    name: str
    items: Sequence[ShardItem]


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What `write_shard` wrote; `offsets` and `lengths` are those of its records, in order."""

    name: str
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def ingest(task: IngestTask) -> IngestedImages:
    """Decode images into a part, or find it made.

    A file that is no whole image becomes an entry with a reason; with `stop_at_reject` it is the last, and there is
    no part.
    """
    made = parts.read_part(task.folder, task.number, task.key, task.files)
    if made is not None and not (task.stop_at_reject and any(image.reason for image in made.images)):
        return IngestedImages(made, made.images)
    done: list[parts.PartImage] = []
    encoded: list[bytes] = []
    thumbnails: list[bytes] = []
    offset = 0
    for file in task.files:
        digest: str | None = None
        try:
            data = images.read_bytes(task.source / file.path)
            digest = hashlib.sha256(data).hexdigest()
            decoded = images.decode_gray(data, task.image_size, task.source / file.path)
        except images.ImageError as error:
            done.append(parts.PartImage(file.path, digest, reason=error.reason))
            if task.stop_at_reject:
                return IngestedImages(None, tuple(done))
            continue
        content = schema.encode_image(decoded.pixels, task.encoding)
        width, height = decoded.width, decoded.height
        done.append(parts.PartImage(file.path, digest, width, height, offset=offset, length=len(content)))
        encoded.append(content)
        thumbnails.append(decoded.thumbnail.tobytes())
        offset += len(content)
    content = b"".join([*encoded, *thumbnails])
    part = parts.write_part(task.folder, task.number, task.key, task.files, done, content)
    return IngestedImages(part, part.images)


def write_shard(task: ShardTask) -> WrittenShard:
    """Write one shard from the parts; on return its bytes are on the disk."""
    offsets: list[int] = []
    lengths: list[int] = []
    with recordio.RecordWriter(task.folder / task.name) as writer:
        for item in task.items:
            # Opened anew for each image: there are more parts than a process may have open files.
            descriptor = os.open(task.folder / item.part, os.O_RDONLY)
            try:
                image = os.pread(descriptor, item.length, item.offset)
            finally:
                os.close(descriptor)
            if len(image) != item.length:
                raise OSError(f"{task.folder / item.part}: ends early")
            payload = schema.encode_example(image=image, label=item.label, path=item.path, index=item.index)
            offsets.append(writer.write(payload))
            lengths.append(len(payload))
    return WrittenShard(task.name, writer.bytes_written, writer.sha256, tuple(offsets), tuple(lengths))
