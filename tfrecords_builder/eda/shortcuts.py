"""Possible shortcuts: how well a trivial feature predicts the class, which a network could learn instead. Pure.

A logistic regression on each feature is fitted on training images and evaluated on validation images, beside a baseline
that always predicts the largest class. The test split is not used.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

THUMBNAIL_SIDE = 16
BORDER_SHARE = 0.08
"""Width of the frame, as a share of the image's side."""
BORDER_BLOCKS = 16
"""Means that are taken along each side of the frame."""
CATEGORIES_KEPT = 16
STANDARD_ERRORS = 3.0
LEAST_MARGIN = 0.1

_ITERATIONS = 300

Features = npt.NDArray[np.float32]
Image = TypeVar("Image", npt.NDArray[np.uint8], npt.NDArray[np.float32])
Labels = npt.NDArray[np.int64]
Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How well one feature predicts the class, on N validation images of C classes."""

    accuracy: float
    guess: float
    """Accuracy of always guessing the largest class of the validation images: no constant guess does better."""
    margin: float
    """How far above `guess` is more than chance: three standard errors of `guess`, and 0.1 at least."""
    balanced_accuracy: float
    """Mean over the classes of the share of their images that are recognised."""
    balanced_guess: float
    """1 / C: no guess without a feature does better."""
    balanced_margin: float
    """Likewise above `balanced_guess`; the error of a class's share is at most sqrt(1 / 4n) for n images."""
    constant: bool
    """True when all training images have the same values: there is nothing to learn from."""
    train_images: int
    validation_images: int

    @property
    def suspicious(self) -> bool:
        """Whether the feature tells more of the class than chance explains.

        Either measure is enough: where one class has nearly all images, accuracy has no room above the guess.
        """
        return (
            self.accuracy > self.guess + self.margin
            or self.balanced_accuracy > self.balanced_guess + self.balanced_margin
        )


def measure(train: Features, train_labels: Labels, validation: Features, validation_labels: Labels) -> Shortcut:
    """Fit on the training images, judge on the validation images.

    Args:
        train: float [M, D]: the feature's D numbers for each image; standardised here.
        train_labels: int [M], of two classes at least.
        validation: float [N, D].
        validation_labels: int [N].
    """
    classes, counts = np.unique(train_labels, return_counts=True)
    varies = np.ptp(train, axis=0) > 0
    if varies.any():
        scaler = StandardScaler().fit(train[:, varies].astype(np.float64))
        model = LogisticRegression(max_iter=_ITERATIONS)
        with warnings.catch_warnings():
            # A fit that is not quite at its optimum shows a lower bound of what the feature tells.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # One thread: the products are small, and threads that wait for each other take ten times as long on a
            # busy machine. The sums are then the same with any number of processors, too.
            with threadpool_limits(1):
                model.fit(scaler.transform(train[:, varies].astype(np.float64)), train_labels)
        predicted = model.predict(scaler.transform(validation[:, varies].astype(np.float64)))
    else:
        predicted = np.full(len(validation_labels), classes[np.argmax(counts)])
    right = predicted == validation_labels
    present, sizes = np.unique(validation_labels, return_counts=True)
    guess = float(sizes.max() / len(right))
    return Shortcut(
        accuracy=float(right.mean()),
        guess=guess,
        margin=_margin(np.sqrt(guess * (1 - guess) / len(right))),
        balanced_accuracy=float(np.mean([right[validation_labels == label].mean() for label in present])),
        balanced_guess=1 / len(present),
        balanced_margin=_margin(np.sqrt(np.sum(0.25 / sizes)) / len(present)),
        constant=not varies.any(),
        train_images=len(train_labels),
        validation_images=len(right),
    )


def thumbnail(gray: Gray, side: int = THUMBNAIL_SIDE) -> Features:
    """Means of blocks: uint8 [H, W] to float32 [min(side, H), min(side, W)], 0 to 255.

    Blocks are equal where the sides divide, and differ by one pixel otherwise.
    """
    rows, columns = (_edges(length, min(side, length)) for length in gray.shape)
    sums = np.add.reduceat(np.add.reduceat(gray, rows, 0, dtype=np.uint32), columns, 1)
    areas = np.outer(np.diff(rows, append=gray.shape[0]), np.diff(columns, append=gray.shape[1]))
    return (sums / areas).astype(np.float32)


def border(gray: Gray) -> Features:
    """The outer frame, down-sampled: uint8 [S, S] to float32 [4 * min(16, S)], 0 to 255.

    Means of blocks along the upper, lower, left and right strip, each of the image's full length.
    """
    width = max(1, round(BORDER_SHARE * len(gray)))
    strips = (gray[:width], gray[-width:], gray[:, :width].T, gray[:, -width:].T)
    edges = _edges(len(gray), min(BORDER_BLOCKS, len(gray)))
    lengths = np.diff(edges, append=len(gray))
    sums = [np.add.reduceat(strip.sum(0, dtype=np.uint32), edges) / (lengths * width) for strip in strips]
    return np.concatenate(sums).astype(np.float32)


def reduced(image: Image, side: int) -> Image:
    """An image [S, S] made smaller by the least whole factor that brings it to `side` or less: means of blocks.

    Pixels at the right and lower edge that fill no block are left out.
    """
    factor = -(-len(image) // side)
    blocks = len(image) // factor
    used = image[: blocks * factor, : blocks * factor]
    means = used.reshape(blocks, factor, blocks, factor).mean((1, 3))
    return (np.rint(means) if image.dtype == np.uint8 else means).astype(image.dtype)


def one_hot(train: Sequence[str], values: Sequence[str]) -> Features:
    """Which of the commonest values of `train` each of `values` is: float32 [len(values), K], K at most 16.

    A row of zeros is none of them.
    """
    common = sorted(Counter(train).items(), key=lambda item: (-item[1], item[0]))[:CATEGORIES_KEPT]
    column = {value: number for number, (value, _) in enumerate(common)}
    table = np.zeros((len(values), len(column)), np.float32)
    for row, value in enumerate(values):
        if value in column:
            table[row, column[value]] = 1
    return table


def _edges(length: int, blocks: int) -> npt.NDArray[np.int64]:
    """Where each of `blocks` blocks of `length` pixels begins."""
    return np.arange(blocks, dtype=np.int64) * length // blocks


def _margin(standard_error: float) -> float:
    return float(max(LEAST_MARGIN, STANDARD_ERRORS * standard_error))
