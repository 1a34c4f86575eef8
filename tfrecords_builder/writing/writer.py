"""What a worker process does: turn source files into encoded images, and encoded images into shards.

Imports neither TensorFlow nor Arrow, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tfrecords_builder.common import files
from tfrecords_builder.format import record, tfrecord
from tfrecords_builder.images import decode as images, resizing
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE
from tfrecords_builder.writing import parts

# Whole factors by means of squares, the rest by interpolation: a tenth of the time of interpolation alone.
THUMBNAIL = resizing.Square(THUMBNAIL_SIZE, reducing_gap=1.0)


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

    def __str__(self) -> str:
        return f"the images {self.source / self.files[0].path} to {self.source / self.files[-1].path}"


@dataclass(frozen=True, slots=True)
class IngestedImages:
    """A part with its images, or no part and the first image that was rejected."""

    part: parts.Part | None
    images: tuple[parts.PartImage, ...]


@dataclass(frozen=True, slots=True)
class ShardItem:
    """One record to write; the image lies in the part `part`."""

    part: str
    offset: int
    length: int
    mask_length: int
    label: int
    path: str
    index: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write, under `folder / name`, from the parts in `folder`."""

    folder: Path
    name: str
    items: Sequence[ShardItem]
    no_mask: bytes | None
    """What the records of images without a mask hold in its place; None in a dataset without masks."""

    def __str__(self) -> str:
        return f"the shard {self.folder / self.name}"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What `write_shard` wrote; `offsets` and `lengths` are those of its records, in order."""

    name: str
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _SourceBytes:
    """A source file's bytes, or why there are none."""

    path: Path
    sha256: str | None
    data: bytes | images.ImageError

    @classmethod
    def read(cls, source: Path, path: str) -> "_SourceBytes":
        file = source / path
        try:
            data = images.read_bytes(file)
        except images.ImageError as error:
            return cls(file, None, error)
        return cls(file, hashlib.sha256(data).hexdigest(), data)

    def content(self) -> bytes:
        """The bytes; an `ImageError` when the file could not be read."""
        if isinstance(self.data, images.ImageError):
            raise self.data
        return self.data


def ingest(task: IngestTask) -> IngestedImages:
    """Decode images into a part, or find it made.

    A file that is no whole image, or whose mask is none, becomes an entry with a reason; with `stop_at_reject` it is
    the only one, and there is no part.
    """
    made = parts.read_part(task.folder, task.number, task.key, task.files)
    if made is not None and not (task.stop_at_reject and any(image.reason for image in made.images)):
        return IngestedImages(made, made.images)
    with images.quiet_decoding(), resizing.kept_memory():
        return _decode(task)


def _decode(task: IngestTask) -> IngestedImages:
    done: list[parts.PartImage] = []
    encoded: list[bytes] = []
    thumbnails: list[bytes] = []
    offset = 0
    for start in range(0, len(task.files), resizing.BANDS):
        several = [_read_image(task, file) for file in task.files[start : start + resizing.BANDS]]
        if task.stop_at_reject:
            rejected = [image.entry for image in several if image.decoded is None]
            if rejected:
                return IngestedImages(None, tuple(rejected[:1]))
        grays = [image.decoded.gray for image in several if image.decoded]
        stored, compared = resizing.squares(grays, [resizing.Square(task.image_size), THUMBNAIL])
        thumbnails += [small.tobytes() for small in compared]
        squares = iter(stored)
        for image in several:
            if image.decoded is None:
                done.append(image.entry)
                continue
            pixels = record.encode_image(next(squares), task.encoding)
            done.append(
                image.entry._replace(
                    width=image.decoded.width,
                    height=image.decoded.height,
                    offset=offset,
                    length=len(pixels),
                    mask_length=len(image.mask),
                )
            )
            encoded += [pixels, image.mask]
            offset += len(pixels) + len(image.mask)
    content = b"".join([*encoded, *thumbnails])
    part = parts.write_part(task.folder, task.number, task.key, task.files, done, content)
    return IngestedImages(part, part.images)


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """A source image before it is resized, or why there is none."""

    entry: parts.PartImage
    """What is known of it by now; with a reason, all there is."""
    decoded: images.Decoded | None
    mask: bytes
    """Encoded; empty when there is none."""


def _read_image(task: IngestTask, file: parts.SourceFile) -> _ReadImage:
    image = _SourceBytes.read(task.source, file.path)
    mask = _SourceBytes.read(task.source, file.mask.path) if file.mask else None
    entry = parts.PartImage(file.path, image.sha256, mask_sha256=mask.sha256 if mask else None)
    try:
        decoded = images.decode_gray(image.content(), image.path)
        inside = images.decode_mask(mask.content(), task.image_size, mask.path) if mask else None
    except images.ImageError as error:
        reason = error.reason if error.path == image.path else f"has a mask, {error.path.name}, that {error.reason}"
        return _ReadImage(entry._replace(reason=reason), None, b"")
    return _ReadImage(entry, decoded, b"" if inside is None else record.encode_mask(inside))


def write_shard(task: ShardTask) -> WrittenShard:
    """Write one shard from the parts; on return its bytes are on the disk.

    Several attempts, one after another or at the same time, leave the same bytes.
    """
    return files.write_whole(task.folder / task.name, lambda file: _write_records(task, file))


def _write_records(task: ShardTask, file: IO[bytes]) -> WrittenShard:
    offsets: list[int] = []
    lengths: list[int] = []
    folder = str(task.folder)
    writer = tfrecord.RecordWriter(file)
    for item in task.items:
        # Opened anew for each image: there are more parts than a process may have open files.
        descriptor = os.open(f"{folder}/{item.part}", os.O_RDONLY)
        try:
            content = os.pread(descriptor, item.length + item.mask_length, item.offset)
        finally:
            os.close(descriptor)
        if len(content) != item.length + item.mask_length:
            raise OSError(f"{folder}/{item.part}: ends early")
        payload = record.encode_example(
            image=content[: item.length],
            label=item.label,
            path=item.path,
            index=item.index,
            mask=task.no_mask and (content[item.length :] or task.no_mask),
        )
        offsets.append(writer.write(payload))
        lengths.append(len(payload))
    return WrittenShard(task.name, writer.bytes_written, writer.sha256, tuple(offsets), tuple(lengths))
