"""What the images of a collection have in common, and how unlike them an image is. Pure; NumPy alone.

A few numbers of each image are compared with those of all images by robust z-scores: the distance from the median, in
units of the spread on that side. An image's score is its largest z-score, and the number that has it gives the reason.
Labels take no part.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.eda.shortcuts import THUMBNAIL_SIDE, Features, Gray, thumbnail

BLOCK = 1024
MEDIAN_SAMPLE = 10_000
"""Thumbnails whose likeness is computed together, and those that the median is taken of, at most."""

_LEAST_SIDE = 16
"""Of images, in pixels, that have detail to speak of; in smaller ones, it counts as equal."""
_LINE_STEP = 4
"""Of the lines, one in four is enough for what they have in common."""
_FLAT_RANGE = 2
_MIDDLE_GRAY = (24, 232)
_WINDOW = 31
_LEAST_DEVIATION = 8.0
_RIDGE = 0.05
_TAIL = (0.95, 1.645)
_QUARTILE = (0.75, 0.6745)
"""Quantiles of a normal distribution, as (share below, standard deviations above the median)."""
_MOST_TAIL = 3.0
_NO_LOG = 0.1


@dataclass(frozen=True, slots=True)
class Number:
    """What is measured of an image."""

    floor: float
    """The least spread that counts: in a collection without any variation, rounding is not odd."""
    high: str | None = None
    """The reason where an image has far more than the others; None where more is not odd."""
    low: str | None = None


NUMBERS = {
    "periodic": Number(0.1, "periodic stripes or blocks"),
    "direction": Number(0.05, "horizontal lines or reduced height", "vertical lines or reduced width"),
    "band": Number(0.02, "band of one gray level"),
    "entropy": Number(0.1, None, "few gray levels or large empty areas"),
    "saturation": Number(0.02, "large black or white areas"),
    "detail": Number(0.1, "sharp or noisy", "blurred"),
    "aspect": Number(0.1, "wide source image", "tall source image"),
    "unlike": Number(0.02, "unlike the other images"),
    "rotated": Number(0.02, "fits better rotated"),
    "inverted": Number(0.02, "fits better inverted"),
}
_OF_PIXELS = ("periodic", "direction", "band", "entropy", "saturation", "detail")
VALUES = len(_OF_PIXELS) + 1
"""Of an image, beside its thumbnail."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """What is measured of N images."""

    values: Features
    """float32 [N, 7]: of `pixel_numbers`, and the logarithm of the source image's width to its height."""
    thumbnails: npt.NDArray[np.uint8]
    """[N, D]: of 16 x 16 pixels, or as many as the images have."""

    @classmethod
    def of(cls, images: Sequence[Gray]) -> "Measurements":
        """Of images uint8 [S, S] whose sources are as wide as high."""
        values = np.array([[*pixel_numbers(gray), 0.0] for gray in images], np.float32)
        thumbnails = [small_thumbnail(gray) for gray in images]
        return cls(values.reshape(-1, VALUES), np.array(thumbnails, np.uint8).reshape(len(images), -1))

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Typical:
    """A collection's images in numbers. The column of a number that is not odd has an infinite spread."""

    thumbnail: Features
    """float32 [D]: the median thumbnail, of zero mean and unit deviation."""
    weights: Features
    """float32 [D]: of a ridge regression that tells the collection's images, as they are, from their own rotated and
    inverted copies."""
    centers: Features
    """float32 [2 K]: the median of each of K `NUMBERS`, and of its negative."""
    spreads: Features
    """float32 [2 K]: above each median."""

    @classmethod
    def fit(cls, measured: Measurements) -> "Typical":
        """Of at least one image."""
        count, size = measured.thumbnails.shape
        step = -(-count // MEDIAN_SAMPLE)
        typical = unit(np.median(unit(measured.thumbnails[::step]), 0)[None])[0]
        products, sums = np.zeros((size, size)), np.zeros(size)
        for block in _blocks(measured.thumbnails):
            rotations = _rotations(block)
            for other in (*rotations, -block):
                products += other.T @ other
                sums -= other.sum(0) / (1 + len(rotations))
            products += block.T @ block
            sums += block.sum(0)
        copies = 5 * count
        weights = np.linalg.solve(products / copies + _RIDGE * np.eye(size), sums / copies).astype(np.float32)
        values = np.hstack([measured.values, _likeness(measured.thumbnails, typical, weights)])
        centers, spreads = [], []
        for sign, column, floor, reason in _columns():
            center, spread = center_and_spread(sign * values[:, column], floor)
            centers.append(center)
            spreads.append(spread if reason else math.inf)
        return cls(typical, weights, np.array(centers, np.float32), np.array(spreads, np.float32))

    def scores(self, measured: Measurements) -> npt.NDArray[np.float32]:
        """Robust z-scores: float32 [N, 2 K], of K `NUMBERS` upward, then downward.

        Where more or less of a number is not odd, its column is zero.
        """
        values = np.hstack([measured.values, _likeness(measured.thumbnails, self.thumbnail, self.weights)])
        signed = np.stack([sign * values[:, column] for sign, column, _, _ in _columns()], 1)
        return np.asarray((signed - self.centers) / self.spreads, np.float32)


def reasons() -> list[str | None]:
    """Of each column of `Typical.scores`."""
    return [reason for _, _, _, reason in _columns()]


def small_thumbnail(gray: Gray) -> npt.NDArray[np.uint8]:
    """Of an image uint8 [S, S]: uint8 [D]."""
    return np.rint(thumbnail(gray, min(THUMBNAIL_SIDE, len(gray)))).astype(np.uint8).ravel()


def pixel_numbers(gray: Gray) -> Features:
    """Of one image uint8 [S, S]: float32 [6], in the order of `NUMBERS` from "periodic" to "detail"."""
    counts = np.bincount(gray.ravel(), minlength=256) / gray.size
    some = counts[counts > 0]
    entropy = -float((some * np.log2(some)).sum())
    saturation = float(counts[:2].sum() + counts[-2:].sum())
    if len(gray) < _LEAST_SIDE:
        return np.array([0, 0, 0, entropy, saturation, 0], np.float32)
    columns = np.ascontiguousarray(gray[:, ::_LINE_STEP].T, np.float32)
    rows = gray[::_LINE_STEP].astype(np.float32)
    down, across = _roughness(columns), _roughness(rows)
    return np.array(
        [
            max(_peak(columns), _peak(rows)),
            math.log((down + _NO_LOG) / (across + _NO_LOG)),
            _flat_share(gray, 0) + _flat_share(gray, 1),
            entropy,
            saturation,
            math.log(down + across + _NO_LOG),
        ],
        np.float32,
    )


def unit(thumbnails: npt.NDArray[Any]) -> Features:
    """Thumbnails [N, D] to float32 [N, D] of zero mean and unit deviation; faint ones keep a smaller deviation."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    deviation = np.sqrt(np.square(values).mean(1, keepdims=True))
    least = _LEAST_DEVIATION if thumbnails.dtype == np.uint8 else 1e-6
    return np.asarray(values / np.maximum(deviation, least), np.float32)


def center_and_spread(values: Features, floor: float) -> tuple[float, float]:
    """The median of [N] values, and the spread above it.

    The spread is that of the upper twentieth, so that a long tail of ordinary images is not odd; but three times that
    of the upper quarter at most, so that many odd images do not hide each other; and `floor` at least.
    """
    center = np.median(values)
    above = values - center
    tail, quartile = (float(np.quantile(above, share)) / deviations for share, deviations in (_TAIL, _QUARTILE))
    spread = max(min(tail, _MOST_TAIL * quartile) if quartile > 0 else tail, floor)
    return float(center), spread


def _columns() -> list[tuple[int, int, float, str | None]]:
    """Of each score: the sign and position of the number, its floor, and the reason, None where it is not odd."""
    return [
        (sign, column, number.floor, number.high if sign > 0 else number.low)
        for sign in (1, -1)
        for column, number in enumerate(NUMBERS.values())
    ]


def _likeness(thumbnails: npt.NDArray[np.uint8], typical: Features, weights: Features) -> Features:
    """float32 [N, 3]: how unlike the median image, and how much better rotated or inverted than as it is.

    How well an image fits is what the ridge regression predicts.
    """
    parts = [np.zeros((0, 3), np.float32)]
    for block in _blocks(thumbnails):
        fit = block @ weights
        rotated = np.max([other @ weights for other in _rotations(block)], 0)
        parts.append(np.stack([1 - block @ typical / len(typical), rotated - fit, -2 * fit], 1))
    return np.concatenate(parts).astype(np.float32)


def _blocks(thumbnails: npt.NDArray[np.uint8]) -> Iterator[Features]:
    for start in range(0, len(thumbnails), BLOCK):
        yield unit(thumbnails[start : start + BLOCK])


def _rotations(block: Features) -> list[Features]:
    side = math.isqrt(block.shape[1])
    squares = block.reshape(-1, side, side)
    return [np.rot90(squares, turns, (1, 2)).reshape(block.shape) for turns in (1, 2, 3)]


def _roughness(lines: Features) -> float:
    """Mean absolute second difference along lines [L, S], in gray levels."""
    return float(np.abs(lines[:, 2:] - 2 * lines[:, 1:-1] + lines[:, :-2]).mean())


def _peak(lines: Features) -> float:
    """How far the mean spectrum of lines [L, S] rises above its surroundings, as a natural logarithm.

    Periods above ten pixels are left out: ribs repeat too.
    """
    spectrum = np.fft.rfft(lines)
    power = (np.square(spectrum.real) + np.square(spectrum.imag)).mean(0)[lines.shape[1] // 10 :]
    logarithms = np.log(power + 1.0)
    sums = np.concatenate([[0.0], np.cumsum(logarithms, dtype=np.float64)])
    places = np.arange(len(logarithms))
    first, last = np.maximum(places - _WINDOW // 2, 0), np.minimum(places + _WINDOW // 2 + 1, len(places))
    return float((logarithms - (sums[last] - sums[first]) / (last - first)).max())


def _flat_share(gray: Gray, axis: int) -> float:
    """Share of the lines along an axis that are of one level, neither black nor white."""
    lowest, highest = gray.min(axis), gray.max(axis)
    low, high = _MIDDLE_GRAY
    return float(((highest - lowest <= _FLAT_RANGE) & (lowest > low) & (highest < high)).mean())
