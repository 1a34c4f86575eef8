"""Grad-CAM: which places of the last feature map raise the score of a class.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from cxr_dist.evaluation.examination.findings import Finding
from cxr_dist.evaluation.examination.statistics import CONFIDENCE
from cxr_dist.inference.grad_cam import Maps, enlarged


def lung_shares(maps: Maps, masks: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """How much of the attention lies inside the lungs, beside how much of the image they take.

    Args:
        maps: float32 [N, h, w].
        masks: bool [N, S, S]; images whose mask, or whose map, is empty are left out.

    Returns:
        images: how many there are.
        attention, area: means over them of the shares; None without images.
        excess: attention minus area, and its two-sided 99 % bounds by the t distribution (None for one image).
    """
    large = enlarged(maps, masks.shape[1]).astype(np.float64)
    totals = large.sum(axis=(1, 2))
    used = (totals > 0) & masks.any(axis=(1, 2))
    if not used.any():
        return {"images": 0, "attention": None, "area": None, "excess": None, "excess_low": None, "excess_high": None}
    inside = (large * masks).sum(axis=(1, 2))[used] / totals[used]
    area = masks.mean(axis=(1, 2))[used]
    excess, count = inside - area, int(used.sum())
    reach = None
    if count > 1:
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * excess.std(ddof=1) / np.sqrt(count))
    mean = float(excess.mean())
    return {
        "images": count,
        "attention": float(inside.mean()),
        "area": float(area.mean()),
        "excess": mean,
        "excess_low": None if reach is None else mean - reach,
        "excess_high": None if reach is None else mean + reach,
    }


def attention_findings(shares: dict[str, Any]) -> list[Finding]:
    """A note where the lungs hold a smaller share of the attention than of the image's area."""
    if shares["excess_high"] is None or shares["excess_high"] >= 0:
        return []
    return [
        Finding(
            "attention",
            "note",
            f"The attention avoids the lungs: they hold {100 * shares['attention']:.0f}% of it, but cover "
            f"{100 * shares['area']:.0f}% of the image.",
            {key: shares[key] for key in ("images", "attention", "area", "excess_high")},
        )
    ]
