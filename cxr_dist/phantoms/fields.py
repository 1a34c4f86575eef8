"""Small drawing tools on square float32 fields: soft steps, smooth noise, strokes.

Everything random is drawn on grids of a fixed number of cells, never of pixels, so that a phantom is the same
patient at every image size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Field = NDArray[np.float32]
Point = tuple[float, float]

STROKE_CANVAS = 384
"""Strokes are drawn on a canvas of this many pixels a side, and averaged to the image's size."""


def soft_step(distance: Field, softness: float) -> Field:
    """0 where `distance` is below -softness / 2, 1 above softness / 2, a smooth cubic between (float32 [S, S])."""
    t = np.clip(distance * np.float32(1 / softness) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def blob(x: Field, y: Field, centre: Point, radii: Point, angle: float = 0.0) -> Field:
    """A Gaussian hill of height 1 at `centre`, with standard deviations `radii` (float32 [S, S])."""
    return np.exp(-0.5 * ellipse(x, y, centre, radii, angle))


def ellipse(x: Field, y: Field, centre: Point, radii: Point, angle: float = 0.0) -> Field:
    """Squared distance from `centre` in units of `radii`: 1 on the ellipse's edge, 0 at its centre (float32 [S, S])."""
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    if angle:
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return (dx * np.float32(1 / radii[0])) ** 2 + (dy * np.float32(1 / radii[1])) ** 2


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Field:
    """Noise of mean 0 and a standard deviation near 1, whose grain is 1 / `cells` of the image (float32 [S, S])."""
    coarse = rng.standard_normal((cells + 2, cells + 2), dtype=np.float32)
    # The outermost cells stay outside the image: there the interpolation has neighbours on one side alone.
    fine = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC, box=(1, 1, cells + 1, cells + 1))
    return np.asarray(fine, dtype=np.float32) * np.float32(1.35)  # interpolation takes a quarter of the spread away


class Strokes:
    """Lines and discs, drawn with soft edges; points are in image coordinates, -1..1 to the right and down."""

    def __init__(self) -> None:
        self._image = Image.new("L", (STROKE_CANVAS, STROKE_CANVAS))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], width: float, level: float) -> None:
        """A line through `points`; `width` in image coordinates, `level` 0..1."""
        pixels = max(1, round(width * STROKE_CANVAS / 2))
        self._draw.line([_pixel(point) for point in points], fill=round(255 * level), width=pixels, joint="curve")

    def disc(self, centre: Point, radius: float, level: float) -> None:
        """A filled disc; `radius` in image coordinates, `level` 0..1."""
        column, row = _pixel(centre)
        reach = radius * STROKE_CANVAS / 2
        self._draw.ellipse((column - reach, row - reach, column + reach, row + reach), fill=round(255 * level))

    def field(self, size: int) -> Field:
        """What was drawn, 0..1, float32 [S, S]."""
        small = self._image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)


def _pixel(point: Point) -> Point:
    return (point[0] + 1) * STROKE_CANVAS / 2, (point[1] + 1) * STROKE_CANVAS / 2
