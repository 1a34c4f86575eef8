"""Odd images: which are least like the rest of a collection, and why. Pure; NumPy alone.

Each image is compared with the whole collection (`typical`), without regard to classes. Each class is ranked by the
largest z-score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.eda.shortcuts import THUMBNAIL_SIDE, Gray
from tfrecords_builder.eda.typical import (
    VALUES,
    Measurements,
    Typical,
    pixel_numbers,
    reasons,
    small_thumbnail,
)
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


class OddImages:
    """The numbers of N images, noted one at a time: 290 bytes an image."""

    def __init__(self, images: int, image_size: int) -> None:
        self._thumbnails = np.zeros((images, min(THUMBNAIL_SIDE, image_size) ** 2), np.uint8)
        self._values = np.zeros((images, VALUES), np.float32)
        self.rows: list[Row] = []
        """Of the images that were added, in order."""

    def add(self, row: Row, gray: Gray) -> None:
        """Note the next image, uint8 [S, S]."""
        count = len(self.rows)
        self._thumbnails[count] = small_thumbnail(gray)
        self._values[count, :-1] = pixel_numbers(gray)
        self._values[count, -1] = math.log(row.width / row.height) if row.width and row.height else 0.0
        self.rows.append(row)

    def scores(self) -> npt.NDArray[np.float32]:
        """`Typical.scores` of the images that were added, compared with each other."""
        if not self.rows:
            return np.zeros((0, len(reasons())), np.float32)
        measured = Measurements(self._values[: len(self.rows)], self._thumbnails[: len(self.rows)])
        return Typical.fit(measured).scores(measured)


def rank(
    scores: npt.NDArray[np.float32], paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str]
) -> list[Suspect]:
    """The oddest images of each class: `LISTED_SHARE` of them, or `LISTED_LEAST` where that is more.

    Args:
        scores: float [N, 2 K], as `Typical.scores` gives them.
        paths: Of the N images.
        labels: Their classes, as positions in `class_names`.
    """
    of_column = reasons()
    score = np.round(scores.max(1).astype(np.float64), 2) if len(scores) else np.zeros(0)
    kind = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    found = []
    for label, name in enumerate(class_names):
        of_class = [number for number, other in enumerate(labels) if other == label]
        of_class.sort(key=lambda number: (-score[number], paths[number]))
        listed = max(LISTED_LEAST, math.ceil(LISTED_SHARE * len(of_class)))
        for place, number in enumerate(of_class[:listed], start=1):
            reason = of_column[kind[number]] or ""
            found.append(Suspect(paths[number], name, place, float(score[number]), reason))
    return found


def gathered(scores: npt.NDArray[np.float32], labels: Sequence[int], class_names: Sequence[str]) -> list[Gathered]:
    """Where clearly odd images of one kind gather in one class; see `GATHERED_SHARE` for the rule."""
    of_class = np.array(labels, np.int64)
    found = []
    for column, reason in enumerate(reasons()):
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
