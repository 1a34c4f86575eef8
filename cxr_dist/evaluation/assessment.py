"""All that an evaluation says in numbers: metrics, their uncertainty, the published result, calibration. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.evaluation import bootstrap, calibration
from cxr_dist.evaluation.metrics import evaluate_predictions
from cxr_dist.evaluation.predictions import Predictions

PUBLISHED = {"accuracy": 0.95, "f1_macro": 0.94}
"""As the project on the COVID-19 Radiography Database gives them, on its own test split."""

PUBLISHED_IMAGES = 3_179
PUBLISHED_CLASSES = {"COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia"}
_ROUNDING = 0.005
_NORMAL = 1.959963985  # quantile of the normal distribution for an interval of 95 %
_PROPER = ("log_loss", "brier", "calibration_error")


@dataclass(frozen=True, eq=False)
class Origin:
    """What is known of N evaluated images beside their predictions."""

    training: npt.NDArray[np.bool_] | None = None
    """[N]: the run's training images, their near-duplicates and images of their patients; None where it is not known
    which those are."""
    validation: npt.NDArray[np.bool_] | None = None
    """[N]: likewise of the run's validation images; none of them is in `training`."""
    own: bool = False
    """They are of the dataset that the run was trained on."""
    asked_for: bool = False
    """The user asked for that dataset's training or validation split."""
    patients: int = 0
    """How many patients are named."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """How many of the images that the run has seen are what, by `overlap.Kind`; empty where they were asked for."""
    not_compared: str | None = None
    """Why only identical files were looked for; None where near-duplicates and patients were too."""


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
        predictions: Of the evaluated images, with the network's own probabilities.
        calibrated: Of `calibration.fit` on other images, if there is one.
        comparable: Whether the images are the test split of real X-rays, as those of the published result.
        origin: Which of the images the run has seen, and how many patients are named.

    Returns:
        What `evaluate_predictions` gives, and
        uncertainty: of `bootstrap.bootstrap`, and `patients`.
        seen: how many images the run has seen (training, validation, share, asked_for; kinds and not_compared as in
            `Origin`); None where unknown.
        metrics_unseen: metrics and uncertainty of the others; None if there are none, or seen ones were asked for.
        published: of `beside_published`; empty unless comparable, of the published classes, and not seen.
        calibration: `calibrated` with `before` and `after` scaling (log_loss, brier, calibration_error), `reliability`
            of both, `at_threshold`, and `in_sample` (images that it was fitted on; None where unknown); or None.
    """
    metrics = evaluate_predictions(predictions)
    uncertainty = bootstrap.bootstrap(predictions)
    seen = _seen(origin)
    comparable = comparable and set(metrics["averaged_classes"]) == PUBLISHED_CLASSES
    comparable = comparable and (origin.own or not (seen and seen["share"]))
    return metrics | {
        "uncertainty": uncertainty | {"patients": origin.patients},
        "seen": seen,
        "metrics_unseen": _unseen(predictions, origin),
        "published": beside_published(metrics, uncertainty) if comparable else [],
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
        "kinds": dict(origin.kinds),
        "not_compared": origin.not_compared,
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
        "at_threshold": calibration.coverage_at_threshold(predictions, calibrated),
        "in_sample": None if origin.validation is None else int(origin.validation.sum()),
    }


def beside_published(metrics: Mapping[str, Any], uncertainty: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each published metric: name, published, ours, difference, noise and verdict.

    Args:
        metrics: Of `metrics.evaluate_predictions`.
        uncertainty: Of `bootstrap.bootstrap`, at a level of 95 %.

    Returns:
        `noise` is how large a difference may be that means nothing: both uncertainties together (the images differ, so
        nothing is paired), and half of the published number's last digit.
        `verdict` is "within noise", "higher" or "lower"; None without interval.
    """
    rows = []
    for name, published in PUBLISHED.items():
        low, high = uncertainty["intervals"][name]
        difference = metrics[name] - published
        noise = verdict = None
        if low is not None:
            theirs = _NORMAL * math.sqrt(published * (1 - published) / PUBLISHED_IMAGES)
            noise = math.hypot(metrics[name] - low if difference > 0 else high - metrics[name], theirs) + _ROUNDING
            verdict = "within noise" if abs(difference) <= noise else "higher" if difference > 0 else "lower"
        rows.append(
            {
                "metric": name,
                "published": published,
                "ours": metrics[name],
                "difference": difference,
                "noise": noise,
                "verdict": verdict,
            }
        )
    return rows
