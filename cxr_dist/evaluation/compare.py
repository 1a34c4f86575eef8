"""Two classifiers on the same images: whether one is better, and by how much. Pure.

Both are resampled alike, so what makes an image hard for both cancels out (the paired bootstrap of Efron and Tibshirani
1993, chapter 8). McNemar's test (1947), in its exact form, looks at the images that one alone has right; it takes
images as independent, which copies are not, so with groups the interval is what counts.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from cxr_dist.evaluation.bootstrap import LEVEL, RESAMPLES, group_numbers, resampled_metrics, weighted_metrics
from cxr_dist.evaluation.exact import mcnemar
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.runs.seen_images import Digests
from tfrecords_builder.common.errors import UserError

COMPARED = (
    "accuracy",
    "f1_macro",
    "precision_macro",
    "recall_macro",
    "auc_macro_ovr",
    "average_precision_macro",
    "cosine_similarity",
    "log_loss",
    "brier",
)


@dataclass(frozen=True, eq=False)
class Images:
    """N labelled images, before anything is predicted."""

    paths: list[str]
    labels: npt.NDArray[np.int32]
    class_names: tuple[str, ...]
    digests: Digests | None = None
    """Of the files; None where they are not known."""


def check_same_images(first: Images, second: Images) -> None:
    """Check that both have the same images, in any order, with the same labels of the same classes.

    Raises:
        UserError: names the first difference.
    """
    _rows(first, second)


def compare(
    first: Predictions, second: Predictions, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Any]:
    """The second classifier less the first, on the same images in any order; the first's groups are resampled.

    Returns:
        n, unit, units, level; `metrics`: name -> first, second, difference (second - first), low and high of its
        interval (None where undefined); `mcnemar`: only_first_right, only_second_right and p_value (two-sided).

    Raises:
        UserError: the images, their labels or the classes differ.
    """
    rows = _rows(*(Images(each.paths, each.labels, each.class_names) for each in (first, second)))
    second = replace(
        second,
        paths=first.paths,
        labels=second.labels[rows],
        probabilities=second.probabilities[rows],
        groups=first.groups,
    )
    groups = group_numbers(first)
    units = int(groups.max()) + 1
    every = np.ones((1, len(first)))
    observed = [weighted_metrics(predictions, every) for predictions in (first, second)]
    values = [resampled_metrics(predictions, groups, resamples, seed) for predictions in (first, second)]
    quantile = float(stats.t.ppf(0.5 + level / 2, units - 1)) if units > 1 else float("nan")
    compared = {}
    for name in COMPARED:
        before, after = (float(metrics[name][0]) for metrics in observed)
        differences = values[1][name] - values[0][name]
        reach = quantile * float(np.sqrt(np.nanvar(differences) * units / max(units - 1, 1)))
        whole = bool(np.isfinite([before, after, reach]).all())
        compared[name] = {
            "first": before if np.isfinite(before) else None,
            "second": after if np.isfinite(after) else None,
            "difference": after - before if whole else None,
            "low": after - before - reach if whole else None,
            "high": after - before + reach if whole else None,
        }
    right = [predictions.labels == predictions.predicted for predictions in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return {
        "n": len(first),
        "unit": "image" if first.groups is None else "group",
        "units": units,
        "level": level,
        "metrics": compared,
        "mcnemar": {
            "only_first_right": only_first,
            "only_second_right": only_second,
            "p_value": mcnemar(only_first, only_second),
        },
    }


def _rows(first: Images, second: Images) -> npt.NDArray[np.int64]:
    """For each of the first's images its row in the second."""
    if first.class_names != second.class_names:
        raise UserError(
            f"the classes differ ({', '.join(first.class_names)}; {', '.join(second.class_names)}); compare runs of "
            "one dataset"
        )
    place = {path: row for row, path in enumerate(second.paths)}
    missing = [path for path in first.paths if path not in place]
    if missing or len(first.paths) != len(second.paths):
        example = missing[0] if missing else next(path for path in second.paths if path not in set(first.paths))
        raise UserError(f"the images differ ({example} is in only one); evaluate both runs on one split of one dataset")
    rows = np.array([place[path] for path in first.paths])
    if (second.labels[rows] != first.labels).any():
        row = int(np.flatnonzero(second.labels[rows] != first.labels)[0])
        raise UserError(f"{first.paths[row]}: has two labels; evaluate both runs on one split of one dataset")
    if first.digests is not None and second.digests is not None and (second.digests[rows] != first.digests).any():
        row = int(np.flatnonzero(second.digests[rows] != first.digests)[0])
        raise UserError(
            f"{first.paths[row]}: refers to two different files; evaluate both runs on one split of one dataset"
        )
    return rows
