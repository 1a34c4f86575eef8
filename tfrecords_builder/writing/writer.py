"""What a worker process does: turn source files into encoded images, and encoded images into shards.

Imports neither TensorFlow nor Arrow, so that a process starts in a fraction of a second.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tfrecords_builder.collection.find import SourceImage
from tfrecords_builder.collection.patient_codes import PatientKey
from tfrecords_builder.common import files
from tfrecords_builder.format import record, tfrecord
from tfrecords_builder.images import decode as images, dicom, resizing
from tfrecords_builder.images.decoded import Decoded, ImageError
from tfrecords_builder.images.thumbnails import THUMBNAIL
from tfrecords_builder.writing import parts
from tfrecords_builder.writing.parts import EncodedImage, Part


@dataclass(frozen=True, slots=True)
class IngestTask:
    """Some source images to decode, resize and encode."""

    source: Path
    images: Sequence[SourceImage]
    folder: Path
    number: int
    """Of the part."""
    key: str
    """What determines the part beside its files."""
    image_size: int
    encoding: str
    stop_at_reject: bool
    patient_key: PatientKey | None = None
    """None where no file is DICOM."""

    def __str__(self) -> str:
        return f"the images {self.source / self.images[0].path} to {self.source / self.images[-1].path}"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write, under `folder / name`, from the parts in `folder`."""

    folder: Path
    name: str
    split: str
    rows: Sequence[int]
    """Of each record, the position in the manifest."""
    images: Sequence[EncodedImage]
    """Of each record, in the same order."""
    class_names: Sequence[str]
    """In label order."""
    no_mask: bytes | None
    """What the records of images without a mask hold in its place; None in a dataset without masks."""

    def __str__(self) -> str:
        return f"the shard {self.folder / self.name}"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What `write_shard` wrote; `offsets` and `lengths` are those of its records, in order."""

    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _SourceBytes:
    """A source file's bytes, or why there are none."""

    path: Path
    sha256: str | None
    data: bytes | ImageError

    @classmethod
    def read(cls, source: Path, path: str) -> "_SourceBytes":
        file = source / path
        try:
            data = images.read_bytes(file)
        except ImageError as error:
            return cls(file, None, error)
        return cls(file, hashlib.sha256(data).hexdigest(), data)

    def content(self) -> bytes:
        """The bytes; an `ImageError` when the file could not be read."""
        if isinstance(self.data, ImageError):
            raise self.data
        return self.data


def ingest(task: IngestTask) -> Part | EncodedImage:
    """Decode images into a part, or find it from an earlier build.

    A file that is no whole image, or whose mask is none, becomes an entry with a reason. With `stop_at_reject` there is
    no part then: the first rejected image is returned.
    """
    files = parts.file_states(task.source, task.images)
    part = parts.read_part(task.folder, task.number, task.key, files, task.images)
    if part is not None and not (task.stop_at_reject and any(image.reason for image in part.images)):
        return part
    with images.quiet_decoding():
        return _decode(task, files)


def _decode(task: IngestTask, files: parts.FileStates) -> Part | EncodedImage:
    done: list[EncodedImage] = []
    encoded: list[bytes] = []
    thumbnails: list[bytes] = []
    offset = 0
    for start in range(0, len(task.images), resizing.BANDS):
        several = [_read_image(task, source) for source in task.images[start : start + resizing.BANDS]]
        grays = [decoded.gray for _, decoded, _ in several if decoded]
        if task.stop_at_reject and len(grays) < len(several):
            return next(image for image, decoded, _ in several if decoded is None)
        stored, compared = resizing.squares(grays, [resizing.Square(task.image_size), THUMBNAIL])
        thumbnails += [small.tobytes() for small in compared]
        squares = iter(stored)
        for image, decoded, mask in several:
            if decoded is None:
                done.append(image)
                continue
            pixels = record.encode_image(next(squares), task.encoding)
            done.append(image._replace(offset=offset, length=len(pixels), mask_length=len(mask)))
            encoded += [pixels, mask]
            offset += len(pixels) + len(mask)
    content = b"".join([*encoded, *thumbnails])
    return parts.write_part(task.folder, task.number, task.key, files, done, content)


def _read_image(task: IngestTask, source: SourceImage) -> tuple[EncodedImage, Decoded | None, bytes]:
    """What is known of an image before it is resized, its pixels (None with a reason), and its encoded mask."""
    file = _SourceBytes.read(task.source, source.path)
    mask = _SourceBytes.read(task.source, source.mask) if source.mask else None
    image = EncodedImage(source, parts.part_name(task.number), file.sha256, mask.sha256 if mask else None)
    try:
        decoded = images.decode_gray(file.content(), file.path)
        inside = images.decode_mask(mask.content(), task.image_size, mask.path) if mask else None
    except ImageError as error:
        reason = error.reason if error.path == file.path else f"has a mask, {error.path.name}, that {error.reason}"
        return image._replace(reason=reason), None, b""
    image = image._replace(width=decoded.width, height=decoded.height, small_range=decoded.small_range)
    if task.patient_key is not None and dicom.is_dicom(file.content()[: dicom.HEAD]):
        image = image._replace(patient=task.patient_key.code(dicom.patient_id(file.content())))
    return image, decoded, b"" if inside is None else record.encode_mask(inside)


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
    label_of = {name: label for label, name in enumerate(task.class_names)}
    for row, image in zip(task.rows, task.images, strict=True):
        # Opened anew for each image: there are more parts than a process may have open files.
        descriptor = os.open(f"{folder}/{image.part}", os.O_RDONLY)
        try:
            content = os.pread(descriptor, image.length + image.mask_length, image.offset)
        finally:
            os.close(descriptor)
        if len(content) != image.length + image.mask_length:
            raise OSError(f"{folder}/{image.part}: ends early")
        payload = record.encode_example(
            image=content[: image.length],
            label=label_of[image.source.class_name],
            path=image.source.path,
            index=row,
            mask=task.no_mask and (content[image.length :] or task.no_mask),
        )
        offsets.append(writer.write(payload))
        lengths.append(len(payload))
    return WrittenShard(writer.bytes_written, writer.sha256, tuple(offsets), tuple(lengths))
