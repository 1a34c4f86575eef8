"""Odd images: which are least like the rest of a collection, and why. Pure; NumPy alone.

A few numbers of each image are compared with those of all images by robust z-scores, without regard to classes: the
distance from the median, in units of the spread on that side. An image's score is its largest z-score, and the number
that has it gives the reason. Each class is ranked by the score.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.eda.shortcuts import THUMBNAIL_SIDE, Features, Gray, thumbnail
from tfrecords_builder.format.manifest_rows import Row

LISTED_SHARE = 0.05
"""Of each class's images, the share that is listed as suspects; `LISTED_LEAST` at least."""
LISTED_LEAST = 12
CLEARLY_ODD = 5.0
"""The z-score from which an image counts as clearly odd, for the warning."""
GATHERED_LEAST = 5
GATHERED_SHARE = 0.01
GATHERED_ERRORS = 3.0
"""The warning: clearly odd images of one kind in one class are five at least, a hundredth of the class at least, and a
larger share than in the other classes by more than three standard errors of the difference."""

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


@dataclass(frozen=True, slots=True)
class Suspect:
    """An image near the head of its class's list."""

    path: str
    class_name: str
    rank: int
    """From 1: the oddest of its class."""
    score: float
    """The largest robust z-score, to two decimals."""
    reason: str


@dataclass(frozen=True, slots=True)
class Gathered:
    """Clearly odd images of one kind, of which one class has more than the others."""

    class_name: str
    reason: str
    images: int
    class_images: int
    other_images: int
    others: int
    """All images of the other classes."""


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


class OddImages:
    """The numbers of N images, noted one at a time: 290 bytes an image."""

    def __init__(self, images: int, image_size: int) -> None:
        self._side = min(THUMBNAIL_SIDE, image_size)
        self._thumbnails = np.zeros((images, self._side**2), np.uint8)
        self._values = np.zeros((images, len(_OF_PIXELS) + 1), np.float32)
        self.rows: list[Row] = []
        """Of the images that were added, in order."""

    def add(self, row: Row, gray: Gray) -> None:
        """Note the next image, uint8 [S, S]."""
        self._thumbnails[self._count] = np.rint(thumbnail(gray, self._side)).ravel()
        self._values[self._count, :-1] = pixel_numbers(gray)
        self._values[self._count, -1] = math.log(row.width / row.height) if row.width and row.height else 0.0
        self.rows.append(row)

    @property
    def _count(self) -> int:
        return len(self.rows)

    def scores(self) -> npt.NDArray[np.float32]:
        """Robust z-scores of the images that were added: float32 [N, 2 K], of K `NUMBERS` upward, then downward.

        Where more or less of a number is not odd, its column is zero.
        """
        if not self._count:
            return np.zeros((0, 2 * len(NUMBERS)), np.float32)
        values = np.hstack([self._values[: self._count], self._likeness()])
        columns = [
            robust_z(sign * values[:, column], number.floor)
            if (number.high if sign > 0 else number.low)
            else np.zeros(self._count, np.float32)
            for sign in (1, -1)
            for column, number in enumerate(NUMBERS.values())
        ]
        return np.stack(columns, 1)

    def _likeness(self) -> Features:
        """float32 [N, 3]: how unlike the median image, and how much better rotated or inverted than as it is.

        How well an image fits is what a ridge regression predicts that tells the collection's images, as they are, from
        their own rotated and inverted copies.
        """
        step = -(-self._count // MEDIAN_SAMPLE)
        typical = unit(np.median(unit(self._thumbnails[: self._count : step]), 0)[None])[0]
        size = self._thumbnails.shape[1]
        products, sums = np.zeros((size, size)), np.zeros(size)
        for block in self._blocks():
            rotations = self._rotations(block)
            for other in (*rotations, -block):
                products += other.T @ other
                sums -= other.sum(0) / (1 + len(rotations))
            products += block.T @ block
            sums += block.sum(0)
        copies = 5 * self._count
        weights = np.linalg.solve(products / copies + _RIDGE * np.eye(size), sums / copies).astype(np.float32)
        parts = []
        for block in self._blocks():
            fit = block @ weights
            rotated = np.max([other @ weights for other in self._rotations(block)], 0)
            parts.append(np.stack([1 - block @ typical / size, rotated - fit, -2 * fit], 1))
        return np.concatenate(parts).astype(np.float32)

    def _blocks(self) -> Iterator[Features]:
        for start in range(0, self._count, BLOCK):
            yield unit(self._thumbnails[start : min(start + BLOCK, self._count)])

    def _rotations(self, block: Features) -> list[Features]:
        squares = block.reshape(-1, self._side, self._side)
        return [np.rot90(squares, turns, (1, 2)).reshape(block.shape) for turns in (1, 2, 3)]


def unit(thumbnails: npt.NDArray[Any]) -> Features:
    """Thumbnails [N, D] to float32 [N, D] of zero mean and unit deviation; faint ones keep a smaller deviation."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    deviation = np.sqrt(np.square(values).mean(1, keepdims=True))
    least = _LEAST_DEVIATION if thumbnails.dtype == np.uint8 else 1e-6
    return np.asarray(values / np.maximum(deviation, least), np.float32)


def robust_z(values: Features, floor: float) -> Features:
    """Distance of each of [N] values above their median, in units of the spread above it: float32 [N].

    The spread is that of the upper twentieth, so that a long tail of ordinary images is not odd; but three times that
    of the upper quarter at most, so that many odd images do not hide each other; and `floor` at least.
    """
    above = values - np.median(values)
    tail, quartile = (float(np.quantile(above, share)) / deviations for share, deviations in (_TAIL, _QUARTILE))
    spread = max(min(tail, _MOST_TAIL * quartile) if quartile > 0 else tail, floor)
    return np.asarray(above / spread, np.float32)


def rank(
    scores: npt.NDArray[np.float32], paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str]
) -> list[Suspect]:
    """The oddest images of each class: `LISTED_SHARE` of them, or `LISTED_LEAST` where that is more.

    Args:
        scores: float [N, 2 K], as `OddImages.scores` gives them.
        paths: Of the N images.
        labels: Their classes, as positions in `class_names`.
    """
    reasons = _reasons()
    score = np.round(scores.max(1).astype(np.float64), 2) if len(scores) else np.zeros(0)
    kind = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    found = []
    for label, name in enumerate(class_names):
        of_class = [number for number, other in enumerate(labels) if other == label]
        of_class.sort(key=lambda number: (-score[number], paths[number]))
        listed = max(LISTED_LEAST, math.ceil(LISTED_SHARE * len(of_class)))
        for place, number in enumerate(of_class[:listed], start=1):
            reason = reasons[kind[number]] or ""
            found.append(Suspect(paths[number], name, place, float(score[number]), reason))
    return found


def gathered(scores: npt.NDArray[np.float32], labels: Sequence[int], class_names: Sequence[str]) -> list[Gathered]:
    """Where clearly odd images of one kind gather in one class; see `GATHERED_SHARE` for the rule."""
    of_class = np.array(labels, np.int64)
    found = []
    for column, reason in enumerate(_reasons()):
        odd = scores[:, column] >= CLEARLY_ODD
        if reason is None or not odd.any():
            continue
        for label, name in enumerate(class_names):
            own = of_class == label
            images, size = int((odd & own).sum()), int(own.sum())
            others, rest = int((odd & ~own).sum()), int((~own).sum())
            if images < max(GATHERED_LEAST, GATHERED_SHARE * size) or not rest:
                continue
            share = (images + others) / (size + rest)
            error = math.sqrt(share * (1 - share) * (1 / size + 1 / rest))
            if images / size - others / rest > GATHERED_ERRORS * error:
                found.append(Gathered(name, reason, images, size, others, rest))
    return found


def gathered_warnings(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each of `gathered`, given as JSON."""
    return [
        f"Odd images gather in one class: {item['images']:,} of {item['class_images']:,} images of "
        f"{item['class_name']} are odd for one reason ({item['reason']}), but {item['other_images']:,} of "
        f"{item['others']:,} images of the other classes."
        for item in items
    ]


def _reasons() -> list[str | None]:
    """Of each column of `OddImages.scores`."""
    return [number.high for number in NUMBERS.values()] + [number.low for number in NUMBERS.values()]


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
