"""The shortcut examination: how predictions change when lungs or border are removed or exchanged.

There are three tests of the border, as none alone is enough. A network that uses a letter in a corner may still predict
one class for every image of which only the border is left (`border_only`), as it never saw such images. It may lose
little accuracy when the border is filled, if it also uses the lungs. Under a cue conflict it must choose: the border of
an image of one class is put around an image of another (Geirhos et al., "ImageNet-trained CNNs are biased towards
texture", ICLR 2019). The control is the same image in the border of another image of its own class: only the class of
the border differs, so the effect of any foreign border cancels out. Filling the border has no such control: a fall of
the accuracy alone shows that the change disturbs the network, and is an alarm only where foreign borders also attract
predictions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import random_streams
from cxr_dist.evaluation.exact import mcnemar, share_interval
from cxr_dist.evaluation.examination import occlusion
from cxr_dist.evaluation.examination.findings import Finding
from cxr_dist.evaluation.examination.occlusion import Masks
from cxr_dist.evaluation.examination.perturbations import Images
from cxr_dist.evaluation.examination.statistics import (
    CONFIDENCE,
    Labels,
    chance_of,
    paired_fall,
    permutation_bound,
    score,
)

Classify = Callable[[Images], Labels]
"""uint8 [N, S, S] -> int32 [N], the predicted class."""

MARGIN = 0.1
"""Smallest relevant difference of accuracy, above chance or as a fall."""
P_VALUE = 0.01
WITHOUT_LUNGS = ("without_lungs", "border_only")
"""Occlusions that leave no lung visible."""
RULES = {
    "without_lungs": "alarm: the lower 99 % bound of the accuracy (Clopper-Pearson) is over 0.1 above the share of "
    "the most frequent class, and the accuracy is above the 99 % quantile under permutation of the predictions",
    "without_border": "alarm: the 99 % bound of the paired fall in accuracy is over 0.1, the exact sign test gives "
    "p < 0.01, and foreign borders attract predictions (the sign test of the cue conflict gives p < 0.01, whatever its "
    "effect); a note where they do not",
    "cue_conflict": "alarm: the share of predictions of the foreign border's class is over 0.1 higher than with a "
    "border of the image's own class, and the exact sign test over images gives p < 0.01",
}
"""The conditions of an alarm, in words."""


def looks(classes: int) -> int:
    """How often each image is looked at."""
    return len(occlusion.OCCLUSIONS) + classes


def occlusion_scores(
    classify: Classify,
    images: Images,
    labels: Labels,
    predicted: Labels,
    masks: Masks | None,
    classes: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy and macro F1 under each occlusion, beside chance.

    `predicted`, int32 [N], holds the classes of the unchanged images uint8 [N, S, S]; for `masks` see
    `occlusion.lung_boxes`; `seed` is that of the permutations.
    """
    known = occlusion.lung_boxes(masks, *images.shape[:2])[1]
    chance, right = chance_of(labels), predicted == labels
    variants = {}
    for name, (title, change) in occlusion.OCCLUSIONS.items():
        answers = classify(change(images, masks))
        fall = paired_fall(right, answers == labels)
        variants[name] = {
            "title": title,
            **score(labels, answers, classes),
            "lower": share_interval(int(np.sum(answers == labels)), len(labels), CONFIDENCE, "greater")[0],
            "permutation_bound": permutation_bound(labels, answers, seed),
            "most_named": float(np.bincount(answers).max() / len(answers)),
            "fall": fall["fall"],
            "fall_lower": fall["lower"],
            "fall_p_value": fall["p_value"],
            "images_without_mask": int(np.sum(~known)) if name in occlusion.USES_MASKS else None,
        }
    return {
        "chance": chance,
        "as_they_are": score(labels, predicted, classes),
        "variants": variants,
        "border_share": occlusion.BORDER_SHARE,
        "central_box": list(occlusion.CENTRAL_BOX),
        "rule": RULES["without_lungs"],
        "rule_border": RULES["without_border"],
    }


def cue_conflict(classify: Classify, images: Images, labels: Labels, classes: int, seed: int) -> dict[str, Any]:
    """How often the prediction follows the border's class when border and image are of different classes.

    Each image gets a border of every other class in turn, each time that of an image drawn by `seed`, and as a control
    that of another image of its own class (its own border, where it is alone).

    Returns:
        images, conflicts: numbers of images and of pairs.
        follows_border, follows_image: shares of conflicts in which the prediction is the border's or the image's class.
        control: share in which the image, in a border of its own class, is predicted as the foreign border's class.
        excess: follows_border - control.
        p_value: that as many images, or more, lean towards the border by chance (McNemar's one-sided test).
    """
    present = np.unique(labels)
    empty = {"images": len(labels), "conflicts": 0, "rule": RULES["cue_conflict"]}
    nothing = dict.fromkeys(("follows_border", "follows_image", "control", "excess", "p_value"))
    if len(present) < 2:
        return empty | nothing | {"reason": "all images are of one class"}
    random = random_streams.generator("borders of other images", seed)
    of_class = {int(label): np.flatnonzero(labels == label) for label in present}
    own = np.array([_other(random, of_class[int(label)], row) for row, label in enumerate(labels)])
    control = classify(occlusion.with_border_of(images, images[own]))
    followed, kept, named_before = [], [], []
    # The r-th class after the image's own among those present: over the turns, each other class once.
    places = np.searchsorted(present, labels)
    for turn in range(1, len(present)):
        foreign = present[(places + turn) % len(present)]
        donors = np.array([random.choice(of_class[int(label)]) for label in foreign])
        answers = classify(occlusion.with_border_of(images, images[donors]))
        followed.append(answers == foreign)
        kept.append(answers == labels)
        named_before.append(control == foreign)
    leaning = np.sum(followed, axis=0) - np.sum(named_before, axis=0)
    follows, before = float(np.mean(followed)), float(np.mean(named_before))
    return empty | {
        "conflicts": len(labels) * (len(present) - 1),
        "follows_border": follows,
        "follows_image": float(np.mean(kept)),
        "control": before,
        "excess": follows - before,
        "p_value": mcnemar(int(np.sum(leaning > 0)), int(np.sum(leaning < 0)), "greater"),
        "reason": None,
    }


def occlusion_findings(occlusions: Mapping[str, Any], conflict: Mapping[str, Any]) -> list[Finding]:
    """Alarms and notes by `RULES`, from what `occlusion_scores` and `cue_conflict` gave."""
    found = []
    chance, before = occlusions["chance"], occlusions["as_they_are"]["accuracy"]
    for name in WITHOUT_LUNGS:
        item = occlusions["variants"][name]
        if item["lower"] > chance + MARGIN and item["accuracy"] > item["permutation_bound"]:
            what = {
                "without_lungs": "with the lungs blacked out"
                if not item["images_without_mask"]
                else "with the lungs blacked out (or a central box, where an image has no mask)",
                "border_only": "from the border of the image alone",
            }[name]
            found.append(
                Finding(
                    name,
                    "alarm",
                    f"High accuracy without lungs: {what}, the accuracy is still {100 * item['accuracy']:.0f}% "
                    f"(chance: {100 * chance:.0f}%). The model likely uses a shortcut.",
                    {"accuracy": item["accuracy"], "lower": item["lower"], "chance": chance},
                )
            )
    item = occlusions["variants"]["without_border"]
    if item["fall_lower"] > MARGIN and item["fall_p_value"] < P_VALUE:
        # Without a conflict (one class alone) nothing speaks against the border.
        told = conflict["p_value"] is None or conflict["p_value"] < P_VALUE
        fall = (
            f"with the outer {100 * occlusions['border_share']:.0f}% of each side filled from its neighbourhood, the "
            f"accuracy falls from {100 * before:.0f}% to {100 * item['accuracy']:.0f}%"
        )
        found.append(
            Finding(
                "without_border",
                "alarm" if told else "note",
                f"The model relies on the border of the image: {fall}."
                if told
                else f"A changed border disturbs the model: {fall}. Borders of other classes do not change its "
                "predictions, so this is no evidence that it infers the class from the border.",
                {"accuracy": item["accuracy"], "accuracy_before": before, "fall_lower": item["fall_lower"]},
            )
        )
    return found


def conflict_findings(conflict: Mapping[str, Any]) -> list[Finding]:
    """An alarm by `RULES`."""
    if conflict["excess"] is None or conflict["excess"] <= MARGIN or conflict["p_value"] >= P_VALUE:
        return []
    return [
        Finding(
            "cue_conflict",
            "alarm",
            "Predictions follow the border: with the border of an image of another class, "
            f"{100 * conflict['follows_border']:.0f}% of the images are predicted as that class; with a border of "
            f"their own class, {100 * conflict['control']:.0f}% are.",
            {key: conflict[key] for key in ("follows_border", "follows_image", "control", "excess", "p_value")},
        )
    ]


def _other(random: np.random.Generator, rows: npt.NDArray[np.int64], row: int) -> int:
    """One of `rows` that is not `row`; `row` where there is no other."""
    others = rows[rows != row]
    return int(random.choice(others)) if len(others) else row
