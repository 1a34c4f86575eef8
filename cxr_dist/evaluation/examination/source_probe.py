"""The sources of the images: accuracy by source, and prediction of the source from the network's features.

If a class comes from one hospital, a network can predict it from traits of that hospital. Test metrics do not show it.
So a classifier is fitted that predicts the source of an image from the network's features, within one class: source and
class may coincide, and the class would then reveal the source.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import random_streams
from cxr_dist.evaluation.exact import share_interval
from cxr_dist.evaluation.examination.findings import Finding
from cxr_dist.evaluation.examination.statistics import Labels

LEAST_IMAGES = 8
"""Smallest number of images of a source in a class for a test within that class."""
FOLDS = 4
STANDARD_ERRORS = 4.0
"""Cross-validated predictions on noise have 1.3 times the deviation of a binomial, as folds share their images."""
PERMUTATIONS = 19
"""They measure chance, where the margin is exceeded."""
LEAST_MARGIN = 0.1
_STRENGTH = 0.1
"""Inverse of the penalty: there are more features than images."""
RULE = (
    "note: the balanced accuracy is above 1 / K by more than four standard errors (that of a share is at most "
    "sqrt(1 / 4n), with n groups of duplicates) and by at least 0.1, and above each of 19 fits to permuted sources"
)


def by_source(labels: Labels, predicted: Labels, sources: Sequence[str | None] | None) -> dict[str, Any]:
    """Accuracy of each source's images with its 95 % interval (Clopper-Pearson), the commonest first.

    Returns:
        `skipped`: why nothing was measured, or None. `sources`: by name images, accuracy, low, high.
    """
    known = Counter(source for source in sources or () if source is not None)
    if not known:
        return {"skipped": "the sources of the images are unknown", "sources": {}}
    if len(known) == 1:
        return {"skipped": f"all images of known source are from {next(iter(known))}", "sources": {}}
    names = np.array([source or "" for source in sources or ()], object)
    right = predicted == labels
    table = {}
    for name, count in sorted(known.items(), key=lambda item: (-item[1], item[0])):
        hits = int(right[names == name].sum())
        low, high = share_interval(hits, count)
        table[name] = {"images": count, "accuracy": hits / count, "low": low, "high": high}
    return {"skipped": None, "sources": table}


def source_findings(table: dict[str, Any], accuracy: float) -> list[Finding]:
    """A note on the source whose accuracy is furthest below that of all, if its interval lies 0.1 below."""
    low = [(item["high"], name, item) for name, item in table["sources"].items() if item["high"] < accuracy - 0.1]
    if not low:
        return []
    _, name, item = min(low, key=lambda each: each[:2])
    return [
        Finding(
            "by_source",
            "note",
            f"Accuracy differs by source: it is {100 * item['accuracy']:.0f}% on the {item['images']} images from "
            f"{name}, and {100 * accuracy:.0f}% on all images.",
            {"source": name, "images": item["images"], "accuracy": item["accuracy"], "accuracy_of_all": accuracy},
        )
    ]


def source_in_features(
    features: npt.NDArray[np.float32] | None,
    labels: Labels,
    sources: Sequence[str | None] | None,
    groups: Sequence[str] | None,
    class_names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Whether a logistic regression on the pooled features, float32 [N, F], predicts the source within each class.

    Cross-validated, with images of one group in one fold. `sources` holds None where nothing is known; without `groups`
    each image is its own.

    Returns:
        `skipped`: why nothing was measured, or None; `rule`; `classes`: by class name the number of images and of
        sources K, balanced accuracy, chance 1 / K, margin, and whether it is above both; `classes_of_one_source`.
    """
    result: dict[str, Any] = {"skipped": None, "rule": RULE, "classes": {}, "classes_of_one_source": []}
    if sources is None or not any(source is not None for source in sources):
        return result | {"skipped": "the sources of the images are unknown"}
    names = np.array([source or "" for source in sources], object)
    for label, class_name in enumerate(class_names):
        if len(set(names[(labels == label) & (names != "")])) == 1:
            result["classes_of_one_source"].append(class_name)
    if features is None:
        return result | {"skipped": "the features of the network are not available"}
    together = np.array(groups if groups is not None else [str(row) for row in range(len(labels))], object)
    for label, class_name in enumerate(class_names):
        counted = Counter(names[(labels == label) & (names != "")])
        kept = [name for name, count in counted.items() if count >= LEAST_IMAGES]
        rows = np.flatnonzero((labels == label) & np.isin(names, kept))
        if len(kept) < 2 or min(len(set(together[rows[names[rows] == name]])) for name in kept) < FOLDS:
            continue
        result["classes"][class_name] = _told(features[rows], names[rows], together[rows], seed)
    if not result["classes"]:
        result["skipped"] = f"no class has two sources with at least {LEAST_IMAGES} images each"
    return result


def feature_findings(told: dict[str, Any]) -> list[Finding]:
    """A note for each class in which the features reveal the source."""
    return [
        Finding(
            "source_in_features",
            "note",
            f"The network's features reveal the source: among images of {name.replace('_', ' ')} it is predicted with "
            f"a balanced accuracy of {100 * item['balanced_accuracy']:.0f}% (chance: {100 * item['chance']:.0f}%). "
            "Where source and class coincide, the network can use the source as a shortcut.",
            {
                "class": name,
                "balanced_accuracy": item["balanced_accuracy"],
                "chance": item["chance"],
                "margin": item["margin"],
            },
        )
        for name, item in told["classes"].items()
        if item["told"]
    ]


def _told(
    features: npt.NDArray[np.float32], names: npt.NDArray[np.object_], groups: npt.NDArray[np.object_], seed: int
) -> dict[str, Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    present, coded = np.unique(names.astype(str), return_inverse=True)
    values = features.astype(np.float64)
    spread = values.std(axis=0)
    values = (values - values.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    if values.shape[1]:
        # A turn of the axes changes nothing for a quadratic penalty, and leaves as many numbers as images.
        left, singular, _ = np.linalg.svd(values / np.sqrt(values.shape[1]), full_matrices=False)
        values = left * singular
    else:
        values = np.zeros((len(features), 1))
    folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(values, coded, groups))

    def judged(codes: npt.NDArray[np.int64]) -> float:
        """Balanced accuracy over the sources."""
        answers = np.zeros(len(codes), np.int64)
        for train, test in folds:
            if len(set(codes[train])) == 1:
                answers[test] = codes[train[0]]
                continue
            model = LogisticRegression(C=_STRENGTH * len(train), class_weight="balanced", max_iter=100)
            answers[test] = model.fit(values[train], codes[train]).predict(values[test])
        return float(np.mean([np.mean(answers[codes == code] == code) for code in np.unique(codes)]))

    _, first, of_group = np.unique(groups.astype(str), return_index=True, return_inverse=True)
    random = random_streams.generator("sources dealt at random", seed)
    sizes = np.bincount(coded[first], minlength=len(present))
    chance = 1 / len(present)
    margin = max(LEAST_MARGIN, STANDARD_ERRORS * float(np.sqrt(np.sum(0.25 / np.maximum(sizes, 1)))) / len(present))
    dealt = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        balanced = judged(coded)
        if balanced > chance + margin:  # otherwise no more is asked
            dealt = max(judged(random.permutation(coded[first])[of_group]) for _ in range(PERMUTATIONS))
    return {
        "images": len(coded),
        "sources": len(present),
        "balanced_accuracy": balanced,
        "chance": chance,
        "margin": margin,
        "dealt_at_random": dealt,
        "told": dealt is not None and balanced > dealt,
    }
