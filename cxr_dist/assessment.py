"""All that an evaluation says in numbers: metrics, their uncertainty, the published result, calibration. Pure."""

from collections.abc import Mapping
from typing import Any

from cxr_dist import calibration, intervals, published
from cxr_dist.metrics import Predictions, evaluate_predictions

_PROPER = ("log_loss", "brier", "calibration_error")


def assess(
    predictions: Predictions, calibrated: Mapping[str, Any] | None = None, *, comparable: bool
) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        predictions: Of the evaluated images, with the probabilities as the network gives them.
        calibrated: What `calibration.fit` found on other images; None where there was nothing to find it on.
        comparable: Whether the images are the test split of a dataset of X-rays: the published result is of nothing
            else.

    Returns:
        What `evaluate_predictions` gives, and
        uncertainty: of `intervals.bootstrap`.
        published: of `published.beside_published`; empty if the images are no test split, or the classes not the
            published four.
        calibration: None without `calibrated`; else that, with `before` and `after` (log_loss, brier and
            calibration_error with the network's probabilities and with the scaled ones), `reliability` of both,
            and `answers` (answered, coverage and accuracy at the threshold).
    """
    metrics = evaluate_predictions(predictions)
    uncertainty = intervals.bootstrap(predictions)
    comparable = comparable and set(predictions.class_names) == published.CLASSES
    rows = published.beside_published(metrics, uncertainty) if comparable else []
    return metrics | {
        "uncertainty": uncertainty,
        "published": rows,
        "calibration": None if calibrated is None else _calibration(predictions, metrics, calibrated),
    }


def _calibration(predictions: Predictions, metrics: Mapping[str, Any], calibrated: Mapping[str, Any]) -> dict[str, Any]:
    scaled = calibration.scaled(predictions, calibrated["temperature"])
    after = evaluate_predictions(scaled)
    return {
        **calibrated,
        "before": {name: metrics[name] for name in _PROPER},
        "after": {name: after[name] for name in _PROPER},
        "reliability": {"before": calibration.reliability(predictions), "after": calibration.reliability(scaled)},
        "answers": calibration.answered(predictions, calibrated),
    }
