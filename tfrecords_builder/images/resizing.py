"""Gray images to squares: several of one size at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

# Bilinear (a triangle filter that Pillow widens when it shrinks, so antialiased) and not Lanczos, whose
# negative lobes ring beside ribs and devices, nor Box, which weighs source pixels unevenly when the ratio
# is not whole (299 to 224). It is also what `tf.image.resize(antialias=True)` computes.
RESAMPLING = Image.Resampling.BILINEAR
BANDS = 4
"""Images that are resized together."""
_MOST_PIXELS = 1 << 24
"""Of each of several images that are resized together, more than detectors have: their memory stays bounded."""
_LARGE = 1 << 20
"""Pixels from which on NumPy shrinks by whole factors, in a fifth of Pillow's time."""

Gray = npt.NDArray[np.uint8]


class Square(NamedTuple):
    """What an image is resized to."""

    side: int
    """In pixels."""
    reducing_gap: float | None = None
    """As Pillow's: shrink by a whole factor first, by means of squares of pixels, and leave at least so much more to
    interpolation."""


def squares(images: Sequence[Gray], wanted: Sequence[Square]) -> list[list[Gray]]:
    """Each of `images`, uint8 [height, width], in each of the `wanted` sizes: for each size, all images in order.

    Pillow resizes the four bands of a picture at once by vector instructions, but a gray image alone by scalar ones. As
    the bands of one picture, four gray images of one size take two thirds of the time, and their pixels are the same.
    """
    height, width = images[0].shape if images else (0, 0)
    if len(images) < BANDS or height * width > _MOST_PIXELS or any(image.shape != (height, width) for image in images):
        return [[_resized(image, square) for image in images] for square in wanted]
    if len(images) > BANDS:
        raise ValueError(f"{len(images)} images at a time; at most {BANDS}")
    picture: Image.Image | None = None
    found = []
    for square in wanted:
        if (height, width) == (square.side, square.side) or _is_shrunk(images[0], square):
            found.append([_resized(image, square) for image in images])
            continue
        if picture is None:
            picture = Image.merge("CMYK", [Image.fromarray(image) for image in images])
        found.append([_pixels(band) for band in _square(picture, square).split()])
    return found


def _resized(image: Gray, square: Square) -> Gray:
    if image.shape == (square.side, square.side):
        return image
    if not _is_shrunk(image, square):
        return _pixels(_square(Image.fromarray(image), square))
    (height, width), (y, x) = image.shape, _factors(image, square)
    box = (0, 0, width / x, height / y)
    return _pixels(Image.fromarray(shrunk(image, y, x)).resize((square.side, square.side), RESAMPLING, box))


def _is_shrunk(image: Gray, square: Square) -> bool:
    return image.size > _LARGE and square.reducing_gap is not None and max(_factors(image, square)) > 1


def _factors(image: Gray, square: Square) -> tuple[int, int]:
    """By which Pillow's `resize` shrinks an image first: height and width."""
    height, width = (int(length / square.side / (square.reducing_gap or 1)) or 1 for length in image.shape)
    return height, width


def shrunk(image: Gray, y: int, x: int) -> Gray:
    """As Pillow's `reduce` by `y` and `x`, to the pixel: means of blocks, smaller ones at the right and the bottom."""
    sums = _sums(_sums(image, y).T, x).T.astype(np.uint64)
    areas = np.outer(_lengths(image.shape[0], y), _lengths(image.shape[1], x))
    # Pillow divides so (Reduce.c), in 32 bits.
    reciprocals = (np.float32(1 << 32) / (areas << 8).astype(np.float32)).astype(np.uint64)
    return ((sums + areas.astype(np.uint64) // 2) * reciprocals >> np.uint64(24)).astype(np.uint8)


def _sums(values: npt.NDArray[np.integer], step: int) -> npt.NDArray[np.integer]:
    """Of so many rows at a time; fewer at the end."""
    kind = np.uint16 if values.dtype == np.uint8 and step <= 256 else np.uint32
    whole = len(values) // step * step
    sums = values[:whole].reshape(-1, step, values.shape[1]).sum(1, dtype=kind)
    return sums if whole == len(values) else np.concatenate([sums, values[whole:].sum(0, dtype=kind)[None]])


def _lengths(length: int, step: int) -> npt.NDArray[np.int64]:
    return np.minimum(step, length - np.arange(0, length, step))


def _square(image: Image.Image, square: Square) -> Image.Image:
    return image.resize((square.side, square.side), RESAMPLING, reducing_gap=square.reducing_gap)


def _pixels(gray: Image.Image) -> Gray:
    """uint8 [height, width], read-only; half the time of `np.asarray`."""
    return np.frombuffer(gray.tobytes(), np.uint8).reshape(gray.height, gray.width)
