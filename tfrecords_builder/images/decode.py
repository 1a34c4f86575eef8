"""Decode an image file to a gray uint8 square.

What is stored is what the network sees, so every choice here is fixed and documented: gray by ITU-R 601
luma, transparency over black (the background of an X-ray), 16-bit samples by their full range, EXIF
orientation applied, and one antialiased resize, which changes the aspect ratio of an image that is not
square, as `keras.utils.image_dataset_from_directory` does.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kornia_rs
import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.images import png
from tfrecords_builder.images.resizing import Square, squares

FORMATS = ("PNG", "JPEG")
DECODERS = {"pillow": PIL.__version__, "kornia-rs": kornia_rs.__version__}
"""Versions of the libraries that made the pixels."""
MAX_PIXELS = 89_478_485
"""A file of a few kilobytes can claim billions; detectors of X-rays have 20 million at most. The limit is Pillow's,
which only warns of it (and raises an error at twice as many), so the warning adds nothing to our error."""

_LFS_POINTER = b"version https://git-lfs"

# What Pillow raises on damaged input. SyntaxError is its own for a broken PNG chunk.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(UserError):
    """A file that is not a whole PNG or JPEG image.

    Attributes:
        path: The file.
        reason: What is wrong with it, without the file's name.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        # Both arguments go to the base class: the error then survives pickling between processes.
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; replace or remove the file (a build can skip it: --on-error skip)"


class TooLargeError(ImageError):
    """An image of more pixels than are decoded."""


def load_gray(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """The image in `path` as gray uint8 [image_size, image_size].

    Raises:
        ImageError: The file cannot be read, is neither PNG nor JPEG, or is damaged or truncated.
    """
    return _square(decode_gray(read_bytes(path), path), image_size)


def decode_mask(data: bytes, image_size: int, path: Path) -> npt.NDArray[np.bool_]:
    """The bytes of a lung mask as bool [image_size, image_size]: what is brighter than half is inside.

    Raises:
        ImageError: As `decode_gray`.
    """
    return _square(decode_gray(data, path), image_size) >= 128


def read_bytes(path: Path) -> bytes:
    """The whole file; an `ImageError` when it cannot be read."""
    try:
        # Without a buffer: a third of the time of `Path.read_bytes`, which is felt with files of this size.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.readall()
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Without Pillow's warning of large images, which `decode_gray` rejects anyway.

    For the main thread of a process that decodes: filters of warnings belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image of its own size."""

    gray: npt.NDArray[np.uint8]
    """Upright: [H, W]."""
    width: int
    """Of the file's image, in pixels."""
    height: int


def decode_gray(data: bytes, path: Path) -> Decoded:
    """Decode the bytes of an image file; `path` is for messages. Raises `ImageError` as `load_gray`."""
    plain = png.decode_plain_gray(data, MAX_PIXELS)
    if plain is not None:
        return Decoded(plain, plain.shape[1], plain.shape[0])
    gray, (width, height) = _decode_any(data, path)
    return Decoded(np.asarray(gray), width, height)


def _square(decoded: Decoded, side: int) -> npt.NDArray[np.uint8]:
    return squares([decoded.gray], [Square(side)])[0][0]


def _decode_any(data: bytes, path: Path) -> tuple[Image.Image, tuple[int, int]]:
    """Whatever may be made gray, upright and in mode L, and the width and height that the file gives."""
    if not data:
        raise ImageError(path, "is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the second where warnings are errors
        raise TooLargeError(path, f"has more than {MAX_PIXELS:,} pixels") from None
    except _DECODE_ERRORS as error:
        pointer = data.startswith(_LFS_POINTER)
        reason = "is a Git LFS pointer (fetch the images: git lfs pull)" if pointer else "is not a PNG or JPEG image"
        raise ImageError(path, reason) from error
    size = width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooLargeError(path, f"has {width} x {height} pixels, more than {MAX_PIXELS:,} in all")
    if getattr(image, "is_animated", False):
        raise ImageError(path, "is animated, and which of its frames is meant is not known")
    try:
        if image.format == "PNG":
            png.check_chunks(data)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_gray(image), size
    except _DECODE_ERRORS as error:
        raise ImageError(path, f"is a damaged or truncated image ({one_line(error)})") from error


def _to_gray(image: Image.Image) -> Image.Image:
    """`image` in mode L; exact for 8-bit gray in whatever mode it comes (L, LA, P, RGB, RGBA)."""
    if image.mode == "L" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit gray: white is 65,535, as the PNG specification says (section 13.12), and not the brightest
        # pixel, which would make the result depend on the content.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65_535:
            raise ValueError("gray samples beyond 16 bits")
        return Image.fromarray(((samples * 255 + 32_767) // 65_535).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L")
    return image.convert("L")
