"""Right answers and what they are worth: shares, exact bounds, and the choice of images. Pure."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from cxr_dist.data import random_streams
from cxr_dist.evaluation.exact import mcnemar
from cxr_dist.evaluation.metrics import counts_metrics

Labels = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

CONFIDENCE = 0.99
"""Of every one-sided bound here: an examination asks a dozen questions, and 95 % would answer one wrongly."""
PERMUTATIONS = 999


def score(labels: Labels, predicted: Labels, classes: int) -> dict[str, float]:
    """Accuracy and macro F1 over the classes that have images, as in `metrics.evaluate_predictions`.

    Args:
        labels: int [N], N >= 1.
        predicted: int [N].
        classes: C.
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    found = counts_metrics(counts)
    return {"accuracy": found["accuracy"], "macro_f1": found["f1_macro"]}


def chance_of(labels: Labels) -> float:
    """Accuracy of always naming the most frequent class: no answer that ignores the image does better."""
    return float(np.bincount(labels).max() / len(labels))


def permutation_bound(labels: Labels, predicted: Labels, seed: int) -> float:
    """The accuracy that answers with nothing to do with the images stay below, in 99 of 100 cases.

    The same answers, dealt to the images anew `PERMUTATIONS` times. Answers that are all alike give the share of
    their class.
    """
    random = random_streams.generator("answers dealt at random", seed)
    values = [float(np.mean(random.permutation(predicted) == labels)) for _ in range(PERMUTATIONS)]
    return float(np.quantile(values, CONFIDENCE, method="higher"))


def paired_fall(before: Flags, after: Flags) -> dict[str, Any]:
    """By how much the share of right answers falls on the same N images, and whether chance explains it.

    Returns:
        fall: difference of the shares.
        p_value: of McNemar's one-sided test on the images whose prediction changed.
        lower: 99 % bound of the fall, by the normal approximation for paired shares (Wald's).
    """
    lost, won, total = int(np.sum(before & ~after)), int(np.sum(~before & after)), len(before)
    fall = (lost - won) / total
    error = np.sqrt(max(lost + won - (lost - won) ** 2 / total, 0)) / total
    return {
        "fall": fall,
        "p_value": mcnemar(lost, won, "greater"),
        "lower": float(max(fall - stats.norm.ppf(CONFIDENCE) * error, -1.0)),
    }


def balanced_sample(labels: Labels, limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions, in order, of at most `limit` images, of each class as many as there are up to an equal share.

    Equal numbers and not shares: chance is then 1 / C, which leaves a rare class its weight and an alarm its room.
    """
    random = random_streams.generator("balanced sample", seed)
    present, sizes = np.unique(labels, return_counts=True)
    taken = np.zeros(len(sizes), np.int64)
    left = min(limit, len(labels))
    # The smallest class first: what it lacks the others share.
    for rank, place in enumerate(np.argsort(sizes, kind="stable")):
        taken[place] = min(sizes[place], left // (len(sizes) - rank))
        left -= taken[place]
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:count] for label, count in zip(present, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
