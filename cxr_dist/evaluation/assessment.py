"""All that an evaluation says in numbers: metrics, their uncertainty, the published result, calibration. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.evaluation import bootstrap, calibration, reference
from cxr_dist.evaluation.metrics import evaluate_predictions
from cxr_dist.evaluation.predictions import Predictions

_PROPER = ("log_loss", "brier", "calibration_error")


@dataclass(frozen=True, eq=False)
class Origin:
    """What is known of N evaluated images beside their predictions."""

    training: npt.NDArray[np.bool_] | None = None
    """[N]: the run's training images; None where it is not known which those are."""
    validation: npt.NDArray[np.bool_] | None = None
    """[N]: the run's validation images, likewise; none of them a training image."""
    own: bool = False
    """They are of the dataset that the run was trained on."""
    asked_for: bool = False
    """The user asked for that dataset's training or validation split."""
    patients: int = 0
    """How many patients are named."""


UNKNOWN = Origin()


def assess(
    predictions: Predictions,
    calibrated: Mapping[str, Any] | None = None,
    *,
    comparable: bool,
    origin: Origin = UNKNOWN,
) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        predictions: Of the evaluated images, with the probabilities as the network gives them.
        calibrated: What `calibration.fit` found on other images; None where there was nothing to find it on.
        comparable: Whether the images are the test split of a dataset of X-rays: the published result is of nothing
            else.
        origin: Which of the images the run has seen, and how many patients are named.

    Returns:
        What `evaluate_predictions` gives, and
        uncertainty: of `bootstrap.bootstrap`, and `patients`.
        seen: training and validation (how many of the images are such images of the run), share (of both together)
            and asked_for; None where it is not known.
        metrics_unseen: what `evaluate_predictions` gives of the images that the run has not seen, with `uncertainty`;
            None if it has seen none or all of them, or if they were asked for.
        published: of `reference.beside_published`; empty if the images are no test split, if the classes with images
            are not the published four, or if the run has seen images of another dataset.
        calibration: None without `calibrated`; else that, with `before` and `after` (log_loss, brier and
            calibration_error with the network's probabilities and with the scaled ones), `reliability` of both,
            and `answers` (answered, coverage and accuracy at the threshold), and `in_sample` (how many of the images
            it was fitted on; None where that is not known).
    """
    metrics = evaluate_predictions(predictions)
    uncertainty = bootstrap.bootstrap(predictions)
    seen = _seen(origin)
    comparable = comparable and set(metrics["averaged_classes"]) == reference.CLASSES
    comparable = comparable and (origin.own or not (seen and seen["share"]))
    return metrics | {
        "uncertainty": uncertainty | {"patients": origin.patients},
        "seen": seen,
        "metrics_unseen": _unseen(predictions, origin),
        "published": reference.beside_published(metrics, uncertainty) if comparable else [],
        "calibration": None if calibrated is None else _calibration(predictions, metrics, calibrated, origin),
    }


def _seen(origin: Origin) -> dict[str, Any] | None:
    if origin.training is None or origin.validation is None:
        return None
    training, validation = int(origin.training.sum()), int(origin.validation.sum())
    return {
        "training": training,
        "validation": validation,
        "share": (training + validation) / len(origin.training),
        "asked_for": origin.asked_for,
    }


def _unseen(predictions: Predictions, origin: Origin) -> dict[str, Any] | None:
    if origin.training is None or origin.validation is None or origin.asked_for:
        return None
    unseen = ~(origin.training | origin.validation)
    if unseen.all() or not unseen.any():
        return None
    others = predictions.subset(unseen)
    return evaluate_predictions(others) | {"uncertainty": bootstrap.bootstrap(others)}


def _calibration(
    predictions: Predictions, metrics: Mapping[str, Any], calibrated: Mapping[str, Any], origin: Origin
) -> dict[str, Any]:
    scaled = calibration.scaled(predictions, calibrated["temperature"])
    after = evaluate_predictions(scaled)
    return {
        **calibrated,
        "before": {name: metrics[name] for name in _PROPER},
        "after": {name: after[name] for name in _PROPER},
        "reliability": {"before": calibration.reliability(predictions), "after": calibration.reliability(scaled)},
        "answers": calibration.answered(predictions, calibrated),
        "in_sample": None if origin.validation is None else int(origin.validation.sum()),
    }
