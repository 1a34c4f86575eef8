"""How far a metric could be from its true value: bootstrap intervals over images, or over groups of images.

Images of one patient, or copies of one image, are not independent. What is drawn anew is therefore a whole group
(Field and Welsh 2007, the cluster bootstrap), and an image without a group is one of its own. Every metric here is a
function of weights on images: a resample gives each group the number of times it was drawn, and all resamples are
computed together.

The standard error of the resampled values is what the bootstrap gives; the interval is symmetric where such a metric
is: on the scale of log(x / (1 - x)) for what lies between 0 and 1 (Agresti and Coull 1998 compare such intervals of
shares; Qin and Hotilovac 2008 those of AUCs), and of log(x) for losses. Percentiles of the resampled values miss the
true value of an accuracy of 0.96 in 500 images seven times in a hundred, mostly by being too high; these do not
(`tests/evaluation/test_bootstrap.py` counts). Student's t stands for the normal quantile, with as many degrees of
freedom as there are groups behind the number, less one.

A class of which every image is right has no variance in any resample, and still is not known to be perfect. A share
of exactly zero or one gets the exact interval of Clopper and Pearson (1934), and a mean over classes the variance that
such a class would have after a uniform prior (Laplace's rule of succession).

The expected calibration error has no interval: it is biased upwards by its bins, so resampling cannot centre one
(Kumar et al. 2019).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from cxr_dist.evaluation.exact import share_interval
from cxr_dist.evaluation.metrics import (
    CALIBRATION_BINS,
    at_label,
    brier_of_images,
    confidence_bins,
    log_loss_of_images,
    ratio,
)
from cxr_dist.evaluation.predictions import Predictions

Floats = npt.NDArray[np.float64]
Values = dict[str, Floats]
"""Name of a metric -> its value in each of B resamples: float64 [B], NaN where it is undefined."""

RESAMPLES = 2000
LEVEL = 0.95

_CHUNK_ELEMENTS = 4_000_000  # weights of resamples computed at once: 32 MB of float64, and some times that beside it


def group_numbers(predictions: Predictions) -> npt.NDArray[np.int64]:
    """int64 [N]: which group each image is of, 0 .. G - 1; without groups each image is one of its own."""
    if predictions.groups is None:
        return np.arange(len(predictions))
    return np.unique(predictions.groups, return_inverse=True)[1].astype(np.int64)


def resample_weights(groups: npt.NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """How often each image is in each resample, float64 [b, N], in pieces that together have `resamples` rows.

    Args:
        groups: int64 [N], 0 .. G - 1. A resample draws G of the G groups with replacement.
        seed: Equal seeds give equal resamples, so that two classifiers can be compared on the same ones.
    """
    random = np.random.default_rng(seed)
    number = int(groups.max()) + 1
    rows = max(1, _CHUNK_ELEMENTS // len(groups))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.multinomial(number, np.full(number, 1 / number), size=count)
        yield drawn[:, groups].astype(np.float64)


def weighted_metrics(predictions: Predictions, weights: Floats) -> Values:
    """Every metric of `metrics.evaluate_predictions` that is a number, for each row of weights.

    Args:
        predictions: N images of C classes.
        weights: float64 [B, N], not negative.

    Returns:
        `accuracy`, `f1_macro`, ... and `per_class.<Class>.recall`, ... The meaning is that of `evaluate_predictions`
        on images that are repeated as often as their weight says: macro averages run over the classes that have
        weight in the row.
    """
    labels, predicted, probabilities = predictions.labels, predictions.predicted, predictions.probabilities
    classes = np.arange(len(predictions.class_names))
    total = weights.sum(axis=1)
    of_label = np.stack([weights @ (labels == index) for index in classes], axis=1)
    of_answer = np.stack([weights @ (predicted == index) for index in classes], axis=1)
    hits = np.stack([weights @ ((labels == index) & (predicted == index)) for index in classes], axis=1)
    others = total[:, None] - of_label
    present = of_label > 0
    precision, recall, f1 = (
        np.where(present, ratio(part, whole), np.nan)
        for part, whole in ((hits, of_answer), (hits, of_label), (2 * hits, of_answer + of_label))
    )
    specificity = np.where(others > 0, ratio(others - (of_answer - hits), others), np.nan)
    aucs, averages = np.full((2, len(weights), len(classes)), np.nan)
    for index in classes:
        aucs[:, index], averages[:, index] = _ranking(labels == index, probabilities[:, index], weights)

    def mean(of_image: npt.ArrayLike) -> Floats:
        return np.asarray(weights @ np.asarray(of_image, np.float64) / total)

    values = {
        "accuracy": hits.sum(axis=1) / total,
        "precision_macro": _mean_of_defined(precision),
        "recall_macro": _mean_of_defined(recall),
        "f1_macro": _mean_of_defined(f1),
        "f1_weighted": np.where(present, f1 * of_label, 0).sum(axis=1) / total,
        "auc_macro_ovr": _mean_of_defined(aucs),
        "average_precision_macro": _mean_of_defined(averages),
        "cosine_similarity": mean(at_label(predictions) / np.linalg.norm(probabilities, axis=1)),
        "log_loss": mean(log_loss_of_images(predictions)),
        "brier": mean(brier_of_images(predictions)),
        "calibration_error": _calibration_error(predictions, weights),
    }
    for number, name in enumerate(predictions.class_names):
        row = {"precision": precision, "recall": recall, "f1": f1, "specificity": specificity, "auc": aucs}
        row["average_precision"] = averages
        values |= {f"per_class.{name}.{key}": column[:, number] for key, column in row.items()}
    return values


def bootstrap(
    predictions: Predictions, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Any]:
    """Intervals of the metrics of `predictions`.

    Returns:
        level, resamples, unit (`group` or `image`), units (how many of them there are), and `intervals`: a tree as
        that of `evaluate_predictions`, with [low, high] in place of each number ([None, None] where the metric is
        undefined here, or in more than one resample in twenty).
    """
    groups = group_numbers(predictions)
    values = resampled_metrics(predictions, groups, resamples, seed)
    observed = weighted_metrics(predictions, np.ones((1, len(predictions))))
    evidence = _evidence(predictions, groups)
    intervals: dict[str, Any] = {}
    for name, column in values.items():
        if name == "calibration_error":
            continue
        low, high = interval_of(column, float(observed[name][0]), evidence[name], level)
        branch, *keys = name.split(".", 1)
        if not keys:
            intervals[name] = [low, high]
        else:
            # The last part alone: a class's name may have dots in it.
            class_name, _, key = keys[0].rpartition(".")
            intervals.setdefault(branch, {}).setdefault(class_name, {})[key] = [low, high]
    return {
        "level": level,
        "resamples": resamples,
        "unit": "image" if predictions.groups is None else "group",
        "units": int(groups.max()) + 1,
        "intervals": intervals,
    }


def resampled_metrics(
    predictions: Predictions, groups: npt.NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0
) -> Values:
    """`weighted_metrics` of so many resamples."""
    parts = [weighted_metrics(predictions, weights) for weights in resample_weights(groups, resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Evidence:
    """What stands behind a metric, apart from its resampled values."""

    units: int
    """Groups that it is computed from; of a mean over classes, those of the smallest class."""
    is_share: bool = False
    """A share of these groups' images."""
    is_loss: bool = False
    """Has no upper end; all else lies between 0 and 1."""
    unseen_variance: float = 0.0
    """Of classes that are right, or wrong, as a whole."""


def interval_of(values: Floats, observed: float, evidence: Evidence, level: float) -> tuple[float | None, float | None]:
    """The interval of one metric from its resampled values; see the head of this module.

    Args:
        values: float64 [B].
        observed: The metric on the images as they are.
    """
    defined = values[np.isfinite(values)]
    if not np.isfinite(observed) or len(defined) < 0.95 * len(values) or evidence.units < 2:
        return None, None
    units, tail = evidence.units, (1 - level) / 2
    if observed in (0.0, 1.0) and evidence.is_share:
        return share_interval(round(observed * units), units, level)
    error = float(np.sqrt(np.var(defined) * units / (units - 1) + evidence.unseen_variance))
    if error == 0:
        return None, None
    reach = float(-stats.t.ppf(tail, units - 1)) * error
    if observed <= 0 or (observed >= 1 and not evidence.is_loss):
        # These scales have no ends, and here only one side can move.
        return (max(observed - reach, 0.0), 1.0) if observed >= 1 else (0.0, reach)
    sides = np.array([-reach, reach])
    if evidence.is_loss:
        low, high = observed * np.exp(sides / observed)
    else:
        low, high = special.expit(special.logit(observed) + sides / (observed * (1 - observed)))
    return float(low), float(high)


def _evidence(predictions: Predictions, groups: npt.NDArray[np.int64]) -> "defaultdict[str, Evidence]":
    """Of each metric that is no plain mean over images; the others rest on all groups."""
    labels, predicted = predictions.labels, predictions.predicted

    def count(images: npt.NDArray[np.bool_]) -> int:
        return len(np.unique(groups[images]))

    everything = count(np.ones(len(labels), bool))
    evidence = defaultdict(lambda: Evidence(everything), accuracy=Evidence(everything, is_share=True))
    smallest, unseen = everything, 0.0
    present = len(np.unique(labels))
    for index, name in enumerate(predictions.class_names):
        inside = count(labels == index)
        of = {"recall": labels == index, "precision": predicted == index, "specificity": labels != index}
        evidence |= {f"per_class.{name}.{key}": Evidence(count(images), is_share=True) for key, images in of.items()}
        rare = Evidence(min(inside, count(labels != index)))
        evidence |= {f"per_class.{name}.{key}": rare for key in ("auc", "average_precision", "f1")}
        if inside:
            smallest = min(smallest, inside)
            if len(np.unique(predicted[labels == index] == index)) == 1:
                mean = 1 / (inside + 2)
                unseen += mean * (1 - mean) / (inside + 3) / present**2
    for name in ("recall_macro", "precision_macro", "f1_macro"):
        evidence[name] = Evidence(smallest, unseen_variance=unseen)
    for name in ("auc_macro_ovr", "average_precision_macro"):
        evidence[name] = Evidence(smallest)
    evidence |= {name: Evidence(everything, is_loss=True) for name in ("log_loss", "brier")}
    return evidence


def _ranking(member: npt.NDArray[np.bool_], score: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted one-vs-rest AUC and average precision, float64 [B] each; NaN without images inside or outside."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])  # images of equal score count as one step
    inside = np.add.reduceat(weights[:, order] * member[order], starts, axis=1)
    outside = np.add.reduceat(weights[:, order] * ~member[order], starts, axis=1)
    true, false = np.cumsum(inside, axis=1), np.cumsum(outside, axis=1)
    positives, negatives = true[:, -1], false[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        # For each step, the members ranked above it beat its outsiders, and those in it tie with them.
        auc = (outside * (true - inside / 2)).sum(axis=1) / (positives * negatives)
        precision = np.where(true + false > 0, true / (true + false), 0)
        average = (inside * precision).sum(axis=1) / positives
    undefined = (positives == 0) | (negatives == 0)
    return np.where(undefined, np.nan, auc), np.where(undefined, np.nan, average)


def _calibration_error(predictions: Predictions, weights: Floats) -> Floats:
    """Expected calibration error of the answer's probability (Guo et al. 2017), float64 [B]."""
    confidence = predictions.probabilities.max(axis=1)
    gap = (predictions.labels == predictions.predicted) - confidence
    bins = confidence_bins(confidence)
    sums = np.stack([weights @ np.where(bins == index, gap, 0) for index in range(CALIBRATION_BINS)], axis=1)
    return np.asarray(np.abs(sums).sum(axis=1) / weights.sum(axis=1))


def _mean_of_defined(values: Floats) -> Floats:
    defined = np.isfinite(values)
    count = defined.sum(axis=1)
    return np.where(count > 0, np.where(defined, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan)
