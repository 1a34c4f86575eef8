"""Decode an image file to a gray uint8 square.

What is stored is what the network sees, so every choice here is fixed and documented: gray by ITU-R 601
luma, transparency over black (the background of an X-ray), 16-bit samples as `gray_levels` says, EXIF
orientation applied, and one antialiased resize, which changes the aspect ratio of an image that is not
square, as `keras.utils.image_dataset_from_directory` does.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kornia_rs
import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from tfrecords_builder.common.errors import one_line
from tfrecords_builder.images import dicom, gray_levels, png
from tfrecords_builder.images.decoded import MAX_PIXELS, Decoded, ImageError, SmallRange, TooLargeError
from tfrecords_builder.images.resizing import Square, squares

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
"""Those of Pillow."""
_NAMES = "PNG, JPEG, TIFF, BMP, WebP or DICOM image"
DECODERS = {"pillow": PIL.__version__, "kornia-rs": kornia_rs.__version__}
"""Versions of the libraries that made the pixels."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of TIFF."""
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


def load_gray(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """The image in `path` as gray uint8 [image_size, image_size].

    Raises:
        ImageError: The file cannot be read, is of another format, or is damaged or truncated.
        UserError: It is DICOM, and pydicom is not installed.
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
    """Without Pillow's warnings of large and damaged images, which `decode_gray` rejects anyway.

    For the main thread of a process that decodes: filters of warnings belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged TIFF, which raises an error or is whole
        yield


def decode_gray(data: bytes, path: Path) -> Decoded:
    """Decode the bytes of an image file; `path` is for messages. Raises `ImageError` as `load_gray`."""
    plain = png.decode_plain_gray(data, MAX_PIXELS)
    if plain is not None:
        return Decoded(plain, plain.shape[1], plain.shape[0])
    return dicom.decode_dicom(data, path) if dicom.is_dicom(data[: dicom.HEAD]) else _decode_any(data, path)


def _square(decoded: Decoded, side: int) -> npt.NDArray[np.uint8]:
    return squares([decoded.gray], [Square(side)])[0][0]


def _decode_any(data: bytes, path: Path) -> Decoded:
    """Whatever Pillow reads, as gray and upright."""
    if not data:
        raise ImageError(path, "is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the second where warnings are errors
        raise TooLargeError(path, f"has more than {MAX_PIXELS:,} pixels") from None
    except _DECODE_ERRORS as error:
        pointer = data.startswith(_LFS_POINTER)
        reason = "is a Git LFS pointer (fetch the images: git lfs pull)" if pointer else f"is not a {_NAMES}"
        raise ImageError(path, reason) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooLargeError(path, f"has {width} x {height} pixels, more than {MAX_PIXELS:,} in all")
    try:
        frames = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 1
        if frames > 1:
            kind = "pages" if image.format == "TIFF" else "frames"
            raise ImageError(path, f"is animated or of several {kind}, and which of the {frames} is meant is not known")
        if image.format == "PNG":
            png.check_chunks(data)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        gray, small_range = _to_gray(image, data)
        return Decoded(gray, width, height, small_range)
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(path, f"is a damaged or truncated image ({one_line(error)})") from error


def _to_gray(image: Image.Image, data: bytes) -> tuple[npt.NDArray[np.uint8], SmallRange | None]:
    """uint8 [H, W]; exact for 8-bit gray in whatever mode it comes (L, LA, P, RGB, RGBA)."""
    if image.mode == "L" and "transparency" not in image.info:
        return np.asarray(image), None
    if image.mode.startswith(("I", "F")):
        return _wide_to_gray(image, data)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, rgba)
    gray = np.asarray(image.convert("L"))
    kept = _bits(image, data) > 8 and gray.max() < 16
    return gray, SmallRange.KEPT if kept else None


def _wide_to_gray(image: Image.Image, data: bytes) -> tuple[npt.NDArray[np.uint8], SmallRange | None]:
    """Likewise of gray samples of more than 8 bits."""
    samples, bits = np.asarray(image), _bits(image, data)
    if samples.dtype.kind == "f" or bits > 16 or samples.min() < 0 or samples.max() > 65_535:
        raise ValueError("gray samples that are not of 8 to 16 bits without sign; save them so")
    significant = png.significant_bits(data) if image.format == "PNG" else None
    if significant is not None and samples.max() < 1 << significant:
        bits = significant  # else the samples fill the range, as the PNG specification asks (section 11.3.3.4)
    ends = gray_levels.shown_range(samples, bits)
    gray = gray_levels.scaled_to(samples, ends)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits alone
        gray = 255 - gray
    return gray, None if ends == gray_levels.declared_range(bits) else SmallRange.STRETCHED


def _bits(image: Image.Image, data: bytes) -> int:
    """Of a sample, as the file says."""
    if image.format == "PNG":
        return data[24]
    return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) if image.format == "TIFF" else 8
