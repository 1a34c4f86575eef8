"""Image files without labels: which there are, and each as the gray square that the network sees."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfrecords_builder.collection.file_kinds import IMAGE_SUFFIXES, IMAGES_FOLDER, MASKS_FOLDER
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import head_of
from tfrecords_builder.images.decode import decode_gray, read_bytes
from tfrecords_builder.images.decoded import ImageError, TooLargeError
from tfrecords_builder.images.dicom import HEAD, is_dicom
from tfrecords_builder.images.resizing import Square, squares

MAX_FILE_BYTES = 1 << 29
"""Three times what 16-bit samples of `decode.MAX_PIXELS` take: no single picture has more."""


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """The files that are given, and all images below the folders that are, folder by folder in the order of names.

    In folders, an image is what has the suffix of an image, and what begins as DICOM; hidden files and folders are
    left out, and so are lung masks: a folder `masks` beside `images`, or beside images themselves. A file that is given
    itself is taken, whatever it is.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give images, or folders of images")
        below = sorted(_images_below(path)) if path.is_dir() else [path]
        if not below:
            raise UserError(f"{path}: holds no image; give another folder")
        found += below
    return found


def read_square(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """The image in a file as gray uint8 [image_size, image_size], as `build` would store it.

    Raises:
        ImageError: the file cannot be read, or is no whole image.
        UserError: it is DICOM, and pydicom is not installed.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from None
    if not path.is_file():
        raise ImageError(path, "is no file")  # a pipe would never end
    if size > MAX_FILE_BYTES:
        raise TooLargeError(path, f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return decode_square(read_bytes(path), image_size, path)


def decode_square(data: bytes, image_size: int, path: Path) -> npt.NDArray[np.uint8]:
    """Likewise of a file's content; `path` is named in errors."""
    return squares([decode_gray(data, path).gray], [Square(image_size)])[0][0]


def _images_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        beside_images = IMAGES_FOLDER in folders or any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in files)
        drawn = {MASKS_FOLDER} if beside_images else set()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in drawn]
        for name in files:
            path = Path(root, name)
            if not name.startswith(".") and (path.suffix.lower() in IMAGE_SUFFIXES or _begins_as_dicom(path)):
                yield path


def _begins_as_dicom(path: Path) -> bool:
    return path.is_file() and is_dicom(head_of(path, HEAD))  # a pipe would never end
