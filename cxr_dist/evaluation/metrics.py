"""The metrics of a classifier, from its predictions alone.

scikit-learn computes every metric that it has, from exactly the numbers
that the predictions file holds, so that whoever recomputes from the file gets the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

from cxr_dist.evaluation.predictions import Predictions

CALIBRATION_BINS = 15
"""Bins of equal width of the expected calibration error, as Guo et al. (2017) take them."""


def evaluate_predictions(predictions: Predictions) -> dict[str, Any]:
    """All metrics of `predictions`, as numbers, lists and None that strict JSON can hold.

    Macro means run over the classes with images, as scikit-learn's with ``labels=`` those classes and
    ``zero_division=0``. What a class lacks the images for is None: precision, recall and F1 without images of it,
    specificity without others, AUC and average precision without either. `f1_weighted` is by support, AUCs are
    one-vs-rest, `log_loss` is in nats, `brier` from 0 to 2 (Brier 1950), `calibration_error` the expected one in 15
    bins of equal width (Guo et al. 2017), `cosine_similarity` the mean of cos(one-hot label, probabilities).
    `confusion_matrix` holds C lists of C counts; rows are true classes, columns predicted ones.
    """
    labels, predicted, probabilities = predictions.labels, predictions.predicted, predictions.probabilities
    classes = np.arange(len(predictions.class_names))
    present = np.unique(labels)
    options = {"labels": present, "zero_division": 0}
    macro = precision_recall_fscore_support(labels, predicted, average="macro", **options)
    weighted = precision_recall_fscore_support(labels, predicted, average="weighted", **options)
    confusion = confusion_matrix(labels, predicted, labels=classes)
    per_class = _per_class(predictions, confusion)
    return {
        "n": len(predictions),
        "accuracy": float(np.mean(labels == predicted)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "f1_weighted": float(weighted[2]),
        "averaged_classes": [name for name, row in per_class.items() if row["support"]],
        "missing_classes": [name for name, row in per_class.items() if not row["support"]],
        "auc_macro_ovr": _mean_of_defined([row["auc"] for row in per_class.values()]),
        "average_precision_macro": _mean_of_defined([row["average_precision"] for row in per_class.values()]),
        # The label is one-hot: its length is one, and its product with a row is the row's entry at the label.
        "cosine_similarity": float(np.mean(at_label(predictions) / np.linalg.norm(probabilities, axis=1))),
        "log_loss": float(log_loss(labels, probabilities, labels=classes)),
        "brier": float(brier_of_images(predictions).mean()),
        "calibration_error": calibration_error(predictions),
        "per_class": per_class,
        "confusion_matrix": confusion.tolist(),
        "class_names": list(predictions.class_names),
    }


def _per_class(predictions: Predictions, confusion: npt.NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    labels, probabilities = predictions.labels, predictions.probabilities
    present = np.unique(labels).tolist()
    columns = precision_recall_fscore_support(
        labels, predictions.predicted, average=None, labels=present, zero_division=0
    )
    scores = dict(zip(present, zip(*columns[:3], strict=True), strict=True))
    rows = {}
    for index, name in enumerate(predictions.class_names):
        member, score = labels == index, probabilities[:, index]
        precision, recall, f1 = (float(value) for value in scores[index]) if index in scores else (None, None, None)
        ranked = member.any() and not member.all()
        rows[name] = {
            "precision": precision,
            "recall": recall,
            "specificity": _specificity(confusion, index),
            "f1": f1,
            "support": int(member.sum()),
            "auc": float(roc_auc_score(member, score)) if ranked else None,
            "average_precision": float(average_precision_score(member, score)) if ranked else None,
        }
    return rows


def at_label(predictions: Predictions) -> npt.NDArray[np.float64]:
    """float64 [N]: the probability of the true class."""
    return np.asarray(predictions.probabilities[np.arange(len(predictions)), predictions.labels])


def log_loss_of_images(predictions: Predictions) -> npt.NDArray[np.float64]:
    """float64 [N]: the negative log-likelihood of the true class, in nats; at most 36 (of a probability of zero)."""
    return np.asarray(-np.log(np.clip(at_label(predictions), np.finfo(np.float64).eps, 1)))


def brier_of_images(predictions: Predictions) -> npt.NDArray[np.float64]:
    """float64 [N]: the squared distance of the probabilities from the label as one-hot, 0 to 2 (Brier 1950)."""
    one_hot = np.eye(len(predictions.class_names))[predictions.labels]
    return np.asarray(((predictions.probabilities - one_hot) ** 2).sum(axis=1))


def confidence_bins(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """int64 [N]: in which of the bins (k / 15, (k + 1) / 15] a probability lies."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)


def calibration_error(predictions: Predictions) -> float:
    """The mean distance of accuracy from the answer's probability over bins, weighted by their images."""
    confidence = predictions.probabilities.max(axis=1)
    gap = (predictions.labels == predictions.predicted) - confidence
    sums = np.bincount(confidence_bins(confidence), gap, CALIBRATION_BINS)
    return float(np.abs(sums).sum() / len(predictions))


def counts_metrics(confusion: npt.ArrayLike) -> dict[str, float]:
    """Metrics from summed counts alone, for validation between epochs.

    Args:
        confusion: [C, C] counts of any real dtype; rows are true classes, columns predicted ones.

    Returns:
        accuracy, precision_macro, recall_macro, f1_macro, with the meaning of `evaluate_predictions`: macro means run
        over the classes that have images.

    Raises:
        ValueError: not square, negative or not finite, or no image counted.
    """
    counts = np.asarray(confusion, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"confusion must be square, not {list(counts.shape)}")
    if not np.isfinite(counts).all() or (counts < 0).any() or counts.sum() == 0:
        raise ValueError("confusion must hold finite counts >= 0, at least one of them positive")
    present = counts.sum(axis=1) > 0
    hits, true, predicted = (values[present] for values in (np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)))
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "precision_macro": float(ratio(hits, predicted).mean()),
        "recall_macro": float(ratio(hits, true).mean()),
        "f1_macro": float(ratio(2 * hits, true + predicted).mean()),
    }


def roc_curves(predictions: Predictions) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """One-vs-rest ROC curve, (false positive rate, true positive rate), of each class whose curve exists."""
    curves = {}
    for index, name in enumerate(predictions.class_names):
        member = predictions.labels == index
        if member.any() and not member.all():
            fpr, tpr, _ = roc_curve(member, predictions.probabilities[:, index], drop_intermediate=True)
            curves[name] = (fpr, tpr)
    return curves


def mean_roc_curve(
    curves: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The mean of one or more ROC curves at equal false positive rate.

    Both ends of every vertical step are kept, so that the area below the mean is exactly the mean of the areas.
    """
    grid = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    lower, upper = np.mean([_limits(fpr, tpr, grid) for fpr, tpr in curves], axis=0)
    return np.repeat(grid, 2), np.stack([lower, upper], axis=1).ravel()


def _specificity(confusion: npt.NDArray[np.int64], index: int) -> float | None:
    others = int(confusion.sum() - confusion[index].sum())
    return float((others - (confusion[:, index].sum() - confusion[index, index])) / others) if others else None


def _mean_of_defined(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _limits(
    fpr: npt.NDArray[np.float64], tpr: npt.NDArray[np.float64], grid: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The curve's height just left and just right of each point of `grid`."""
    first = np.searchsorted(fpr, grid, side="left")
    last = np.searchsorted(fpr, grid, side="right") - 1
    between = np.interp(grid, fpr, tpr)
    on_curve = first <= last
    return np.where(on_curve, tpr[np.minimum(first, len(tpr) - 1)], between), np.where(on_curve, tpr[last], between)


def ratio(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """part / whole, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
