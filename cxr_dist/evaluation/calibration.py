"""Calibration: temperature scaling, reliability diagrams, and the threshold below which the model abstains. Pure.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks") divides all logits by one number,
fitted on validation images by maximum likelihood. It does not change the predicted class. The abstention threshold is
that of selective prediction with guaranteed risk (Geifman and El-Yaniv 2017, algorithm 1): on images like those it was
chosen on, the error rate of the predictions is at most `risk`, with a probability of 95 % over their draw.
The bound counts independent units: near-duplicates, or images of one patient, count once, as wrong if any of their
predictions is. Where images form groups, the bound is about groups.

The bound holds for images that did not select the model. A run's validation images selected its best epoch, and in a
search the best trial too. The model does better on them than on new images, so a threshold that is fitted on them is
optimistic: the error rate may exceed `risk` in more than 5 % of cases.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from cxr_dist.evaluation.exact import share_interval
from cxr_dist.evaluation.metrics import CALIBRATION_BINS, confidence_bins
from cxr_dist.evaluation.predictions import Predictions

RISK = 0.05
"""Target error rate by default."""

CONFIDENCE = 0.95
_TEMPERATURES = (0.05, 20.0)
_SMALLEST = float(np.finfo(np.float64).tiny)


def fit_temperature(predictions: Predictions) -> float:
    """The temperature, 0.05 to 20, of the highest likelihood; above one the model was overconfident."""
    logs, labels = _log_probabilities(predictions), predictions.labels
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logs / math.exp(log_temperature)
        return float(np.mean(special.logsumexp(scaled, axis=1) - scaled[rows, labels]))

    # One minimum: the likelihood is concave in 1 / T.
    found = optimize.minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def scaled(predictions: Predictions, temperature: float) -> Predictions:
    """The same predictions with probabilities softmax(logits / T); logits are known up to a constant of each image."""
    return replace(predictions, probabilities=special.softmax(_log_probabilities(predictions) / temperature, axis=1))


def abstain_threshold(predictions: Predictions, risk: float = RISK) -> float | None:
    """The smallest threshold on the predicted class's probability with an error rate of at most `risk`.

    Args:
        predictions: Calibrated, on images that the model was not trained on; the bound holds if they did not select it.
        risk: Target error rate, 0 to 1.

    Returns:
        The threshold (0: never abstain), or None if no predictions are confident enough.
    """
    confidence = predictions.probabilities.max(axis=1)
    order = np.argsort(confidence, kind="stable")
    confidence, wrong = confidence[order], (predictions.labels != predictions.predicted)[order]
    groups = order if predictions.groups is None else np.unique(predictions.groups, return_inverse=True)[1][order]
    low, high = 0, len(confidence)
    # Each bound that is looked at may fail, so all share what is left of the confidence.
    delta = (1 - CONFIDENCE) / max(1, math.ceil(math.log2(len(confidence) + 1)))
    found = None
    while low < high:
        middle = (low + high) // 2
        # Images of equal probability are answered alike.
        start = int(np.searchsorted(confidence, confidence[middle]))
        failed, answered = len(np.unique(groups[start:][wrong[start:]])), len(np.unique(groups[start:]))
        # The largest error rate at which so few errors have a probability of `delta` or more.
        if share_interval(failed, answered, 1 - delta, "less")[1] <= risk:
            found, high = start, middle
        else:
            low = middle + 1
    if found is None:
        return None
    return 0.0 if found == 0 else float(confidence[found])


def reliability(predictions: Predictions) -> list[dict[str, float | int]]:
    """By non-empty bins of the confidence: low, high, images, confidence (mean) and accuracy."""
    confidence = predictions.probabilities.max(axis=1)
    right = predictions.labels == predictions.predicted
    bins = confidence_bins(confidence)
    return [
        {
            "low": index / CALIBRATION_BINS,
            "high": (index + 1) / CALIBRATION_BINS,
            "images": int((bins == index).sum()),
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(right[bins == index].mean()),
        }
        for index in range(CALIBRATION_BINS)
        if (bins == index).any()
    ]


def risk_coverage(predictions: Predictions) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The error rate (risk) of the most confident predictions, by their share of the images (coverage).

    Returns:
        coverage and risk, float64, one entry for each probability at which the line could be drawn, coverage rising.
    """
    confidence = predictions.probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(predictions.labels[order] != predictions.predicted[order])
    ends = np.flatnonzero(np.r_[np.diff(confidence[order]) != 0, True])
    return (ends + 1) / len(order), wrong[ends] / (ends + 1)


def coverage_at_threshold(predictions: Predictions, calibration: Mapping[str, Any]) -> dict[str, float | int | None]:
    """What the threshold of `calibration` does to these images: predicted (images), coverage, and their accuracy."""
    threshold = calibration["abstain_threshold"]
    probabilities = scaled(predictions, calibration["temperature"]).probabilities.max(axis=1)
    given = probabilities >= (math.inf if threshold is None else threshold)
    right = predictions.labels == predictions.predicted
    return {
        "predicted": int(given.sum()),
        "coverage": float(given.mean()),
        "accuracy": float(right[given].mean()) if given.any() else None,
    }


def fit(validation: Predictions, risk: float = RISK) -> dict[str, Any]:
    """A run's calibration from the predictions of its validation images.

    Returns:
        temperature, abstain_threshold, target_risk; fitted_on (the split), images (their number), and
        selected_the_model: whether these images selected the best epoch, so that the bound is optimistic.
    """
    temperature = fit_temperature(validation)
    return {
        "temperature": temperature,
        "abstain_threshold": abstain_threshold(scaled(validation, temperature), risk),
        "target_risk": risk,
        "fitted_on": "validation",
        "images": len(validation),
        "selected_the_model": True,
    }


def _log_probabilities(predictions: Predictions) -> npt.NDArray[np.float64]:
    return np.log(np.maximum(predictions.probabilities, _SMALLEST))
