"""Decoded images on their way into shards: one part for each run of source files, whole or not there.

A part is two files in the work folder: the data (encoded images with their masks, then thumbnails), and beside it what
is in it, with a checksum of the data, which is written last. A build that was killed finds the parts that it had
finished; one whose source files or settings are others, or whose data is damaged, is made again. Several attempts at
one part, one after another or at the same time, leave the same bytes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from tfrecords_builder.collection.find import SourceImage
from tfrecords_builder.common.files import write_whole
from tfrecords_builder.common.seal import read_sealed_json, sealed_json
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE

IMAGES_PER_PART = 32
MOST_PARTS = 4096
_PART, _INDEX = "part-", ".json"
_THUMBNAIL_BYTES = THUMBNAIL_SIZE * THUMBNAIL_SIZE

FileStates = list[list[list[Any]]]


class EncodedImage(NamedTuple):
    """A source image after decoding: where its bytes are in a part, or the reason for rejecting it.

    Sent between processes by the ten thousand: a named tuple takes a third of a dataclass's time.
    """

    source: SourceImage
    part: str
    """Name of the part's data file."""
    sha256: str | None
    """Hexadecimal, of the source file's bytes; None when it could not be read."""
    mask_sha256: str | None = None
    width: int | None = None
    """Of the source image, in pixels."""
    height: int | None = None
    reason: str | None = None
    offset: int = 0
    length: int = 0
    mask_length: int = 0
    """The mask's bytes follow the image's; 0 when it has none."""
    patient: str | None = None
    """Of a DICOM file, the code of its Patient ID; see `patient_codes`."""
    small_range: str | None = None
    """A `SmallRange`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A whole part."""

    data: Path
    images: tuple[EncodedImage, ...]

    def thumbnails(self) -> npt.NDArray[np.uint8]:
        """uint8 [n, 64, 64] of the images that were not rejected, in order."""
        count = sum(image.reason is None for image in self.images)
        offset = sum(image.length + image.mask_length for image in self.images)
        flat = np.fromfile(self.data, np.uint8, count * _THUMBNAIL_BYTES, offset=offset)
        return flat.reshape(count, THUMBNAIL_SIZE, THUMBNAIL_SIZE)


def images_per_part(count: int) -> int:
    """Of a source of `count` images: few, so that little is lost, but no more than MOST_PARTS parts."""
    return max(IMAGES_PER_PART, -(-count // MOST_PARTS))


def part_name(number: int) -> str:
    """Name of the data; what is in it has `.json` behind."""
    return f"{_PART}{number:05d}"


def file_states(source: Path, images: Sequence[SourceImage]) -> FileStates:
    """Path, size and time of change of each image's file and its mask's, as JSON reads them back.

    They tell whether a file has changed without reading it.
    """
    return [[_state(source, image.path), *([_state(source, image.mask)] if image.mask else [])] for image in images]


def write_part(
    folder: Path, number: int, key: str, files: FileStates, images: Sequence[EncodedImage], data: bytes
) -> Part:
    """Make a part of `images` with their `data`; `key` says which settings made them, `files` of which files."""
    path = folder / part_name(number)
    sealed = sealed_json(_index(key, files, data) | {"images": [image[2:] for image in images]})
    # After a power cut the checksum tells whether the data arrived.
    write_whole(path, lambda file: file.write(data), durable=False)
    write_whole(_index_of(path), lambda file: file.write(sealed), durable=False)
    return Part(path, tuple(images))


def read_part(folder: Path, number: int, key: str, files: FileStates, sources: Sequence[SourceImage]) -> Part | None:
    """The part that an earlier build made of these very files with these settings; None when there is none."""
    path = folder / part_name(number)
    try:
        index = read_sealed_json(_index_of(path))
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    values = index.pop("images", [])
    if index != _index(key, files, data) or len(values) != len(sources):
        return None
    images = (EncodedImage(source, path.name, *value) for source, value in zip(sources, values, strict=True))
    return Part(path, tuple(images))


def remove_other_parts(folder: Path, count: int) -> None:
    """Remove parts beyond the first `count`."""
    known = {name for number in range(count) for name in (part_name(number), f"{part_name(number)}{_INDEX}")}
    for entry in os.scandir(folder):
        if entry.name.startswith(_PART) and entry.name not in known:
            Path(entry.path).unlink()


def bytes_of_parts(folder: Path) -> int:
    """What the parts in a work folder take; 0 when there are none."""
    return sum(path.stat().st_size for path in folder.glob(f"{_PART}*"))


def is_half(path: Path) -> bool:
    """Whether `path` is one of a part's two files and the other is not there, as when its process was killed."""
    if not path.name.startswith(_PART):
        return False
    return not (path.with_suffix("") if path.suffix == _INDEX else _index_of(path)).exists()


def _index(key: str, files: FileStates, data: bytes) -> dict[str, Any]:
    return {"key": key, "files": files, "bytes": len(data), "crc32c": google_crc32c.value(data)}


def _state(source: Path, path: str) -> list[Any]:
    try:
        status = os.stat(f"{source}/{path}")  # noqa: PTH116 - by a Path, ten thousand take a tenth of a second more
    except OSError:
        return [path, -1, -1]  # reading it says what is wrong
    return [path, status.st_size, status.st_mtime_ns]


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_INDEX}")
