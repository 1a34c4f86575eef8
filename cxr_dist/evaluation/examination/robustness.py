"""How the answers hold when images are turned, darkened, noisy or coarse: curves over strengths, on the same images."""

from collections.abc import Callable
from typing import Any

from cxr_dist.evaluation.examination.findings import Finding
from cxr_dist.evaluation.examination.perturbations import PERTURBATIONS, Images
from cxr_dist.evaluation.examination.statistics import Labels, paired_fall, score

FRAGILE_FALL = 0.1
"""A fall of accuracy at the mildest strength whose 99 % bound is above this is worth a note."""
LOOKS = sum(len(each.strengths) - 1 for each in PERTURBATIONS)
"""How often each image is looked at."""


def robustness(
    classify: Callable[[Images], Labels], images: Images, labels: Labels, predicted: Labels, classes: int, seed: int
) -> dict[str, Any]:
    """Accuracy and macro F1 at each strength of each perturbation of images uint8 [N, S, S].

    `predicted`, int32 [N], holds the classes of the unchanged images; `seed` is that of the noise.

    Returns:
        By perturbation its title, its unit, and a point for each strength (None first: unchanged): strength, accuracy,
        macro_f1, and the fall of accuracy with its 99 % bound.
    """
    right = predicted == labels
    curves: dict[str, Any] = {}
    for kind in PERTURBATIONS:
        points = []
        for strength in kind.strengths:
            answers = predicted if strength is None else classify(kind.apply(images, strength, seed))
            fall = paired_fall(right, answers == labels)
            points.append(
                {
                    "strength": strength,
                    **score(labels, answers, classes),
                    "fall": fall["fall"],
                    "fall_lower": fall["lower"],
                }
            )
        curves[kind.name] = {"title": kind.title, "unit": kind.unit, "points": points}
    return curves


def robustness_findings(curves: dict[str, Any]) -> list[Finding]:
    """A note for each perturbation that costs much at its mildest."""
    found = []
    for name, curve in curves.items():
        none, mildest = curve["points"][:2]
        if mildest["fall_lower"] > FRAGILE_FALL:
            found.append(
                Finding(
                    f"robustness_{name}",
                    "note",
                    f"Low robustness: {curve['title'].lower()} ({mildest['strength']:g} {curve['unit']}) reduces the "
                    f"accuracy from {100 * none['accuracy']:.0f}% to {100 * mildest['accuracy']:.0f}%.",
                    {
                        "strength": mildest["strength"],
                        "accuracy": mildest["accuracy"],
                        "accuracy_without": none["accuracy"],
                    },
                )
            )
    return found
