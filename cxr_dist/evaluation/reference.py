"""The published result beside ours. Pure.

The two were measured on different test images, so nothing is paired: the difference is within noise if it is smaller
than both uncertainties together, and half of the published number's last digit.
"""

import math
from collections.abc import Mapping
from typing import Any

PUBLISHED = {"accuracy": 0.95, "f1_macro": 0.94}
"""As the project on the COVID-19 Radiography Database gives them, on its own test split."""

PUBLISHED_IMAGES = 3_179
CLASSES = {"COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia"}
ROUNDING = 0.005
_NORMAL = 1.959963985  # quantile of the normal distribution for an interval of 95 %


def beside_published(metrics: Mapping[str, Any], uncertainty: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each published metric: name, published, ours, difference, noise and verdict.

    Args:
        metrics: Of `metrics.evaluate_predictions`.
        uncertainty: Of `bootstrap.bootstrap`, at a level of 95 %.

    Returns:
        `noise` is how large a difference may be that means nothing; the published number's own part of it is that of
        a share of 3,179 independent images. `verdict` is "within noise", "higher" or "lower"; None without interval.
    """
    rows = []
    for name, published in PUBLISHED.items():
        low, high = uncertainty["intervals"][name]
        difference = metrics[name] - published
        noise = verdict = None
        if low is not None:
            theirs = _NORMAL * math.sqrt(published * (1 - published) / PUBLISHED_IMAGES)
            noise = math.hypot(metrics[name] - low if difference > 0 else high - metrics[name], theirs) + ROUNDING
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
