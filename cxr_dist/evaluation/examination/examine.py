"""An examination as a whole: images and a network in, numbers, findings and figures out."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.evaluation.examination import attention, figures, shortcuts, source_probe
from cxr_dist.evaluation.examination.findings import Examination, Finding, Panel
from cxr_dist.evaluation.examination.gallery import Answers, gallery
from cxr_dist.evaluation.examination.occlusion import Masks
from cxr_dist.evaluation.examination.perturbations import Images
from cxr_dist.evaluation.examination.robustness import LOOKS, named, robustness, robustness_findings
from cxr_dist.evaluation.examination.statistics import Labels, score
from cxr_dist.inference import grad_cam

Forward = Callable[[Images], npt.NDArray[np.float64]]
"""uint8 [B, S, S] -> probabilities float64 [B, C]."""


def looks(classes: int) -> int:
    """How often each image goes through the network, one with the gradient included."""
    return 2 + LOOKS + shortcuts.looks(classes)


def examine(
    model_forward: Forward,
    images: Images,
    labels: Labels,
    masks: Masks | None,
    sources: Sequence[str | None] | None,
    groups: Sequence[str] | None,
    class_names: Sequence[str],
    seed: int,
    *,
    model: Any = None,
    names: Sequence[str] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> Examination:
    """Examine a network on N images of C classes.

    Args:
        model_forward: The network.
        images: uint8 [N, S, S], N >= 1.
        labels: int32 [N].
        masks: Of the lungs, bool [N, S, S]; all False for an image without one. None: of no image.
        sources: Where each image came from; None where, or if, nothing is known.
        groups: Name of each image's group of duplicates; None: each is its own.
        class_names: C names in label order.
        seed: Of noise, donors, folds and the choice of examples.
        model: The same network as a functional Keras model with logits, for Grad-CAM; without it that is left out.
        names: Of the images, for captions.
        done: Called with the number of images whenever some have been through the network.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or not len(images) or len(labels) != len(images):
        raise ValueError(f"expected uint8 [N, S, S] and N labels, not {images.dtype} {list(images.shape)}")
    if masks is not None and masks.shape != images.shape:
        raise ValueError(f"masks must be {list(images.shape)}, not {list(masks.shape)}")
    classes = len(class_names)

    def forward(changed: Images) -> npt.NDArray[np.float64]:
        answers = np.asarray(model_forward(changed), np.float64)
        done(len(changed))
        return answers

    def classify(changed: Images) -> Labels:
        return named(forward(changed))

    probabilities = forward(images)
    predicted = named(probabilities)
    occlusions = shortcuts.occlusion_scores(classify, images, labels, predicted, masks, classes, seed)
    conflict = shortcuts.cue_conflict(classify, images, labels, classes, seed)
    curves = robustness(classify, images, labels, predicted, classes, seed)
    findings: list[Finding] = [
        *shortcuts.conflict_findings(conflict),
        *shortcuts.occlusion_findings(occlusions, conflict),
    ]
    panels: list[Panel] = [
        figures.occlusion_panel(occlusions),
        figures.robustness_panel(curves, occlusions["chance"]),
    ]
    looked, features = None, None
    if model is not None:
        explained = grad_cam.make_explain(model, done)(images, predicted)
        features = explained.features
        looked = None if masks is None else attention.lung_shares(explained.maps, masks)
        findings += attention.attention_findings(looked) if looked else []
        answers = Answers(
            labels, probabilities, tuple(class_names), names or [f"image {n}" for n in range(len(labels))]
        )
        panels += gallery(images, explained.maps, answers, seed)
    origin = source_probe.by_source(labels, predicted, sources)
    told = source_probe.source_in_features(features, labels, sources, groups, class_names, seed)
    overall = score(labels, predicted, classes)
    findings += source_probe.source_findings(origin, overall["accuracy"])
    findings += source_probe.feature_findings(told) + robustness_findings(curves)
    counted = Counter(labels.tolist())
    numbers = {
        "sample": {
            "images": len(labels),
            "classes": {name: counted[label] for label, name in enumerate(class_names)},
            "with_mask": 0 if masks is None else int(masks.any(axis=(1, 2)).sum()),
            "with_source": sum(source is not None for source in sources or ()),
            "seed": seed,
            "looks": looks(classes),
        },
        **overall,
        "occlusions": occlusions,
        "cue_conflict": conflict,
        "by_source": origin,
        "source_in_features": told,
        "robustness": curves,
        "attention": {"measured": model is not None, "lungs": looked},
    }
    return Examination(numbers, findings, panels)
