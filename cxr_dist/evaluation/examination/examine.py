"""An examination as a whole: images and a network in, numbers, findings and figures out."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.evaluation.examination import attention, figures, shortcuts, source_probe
from cxr_dist.evaluation.examination.findings import Examination, Section
from cxr_dist.evaluation.examination.gallery import gallery
from cxr_dist.evaluation.examination.occlusion import Masks
from cxr_dist.evaluation.examination.perturbations import Images
from cxr_dist.evaluation.examination.robustness import LOOKS, robustness, robustness_findings
from cxr_dist.evaluation.examination.statistics import Labels, score
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.inference import grad_cam
from tfrecords_builder.common.figure import Figure

Forward = Callable[[Images], npt.NDArray[np.float64]]
"""uint8 [B, S, S] -> probabilities float64 [B, C]."""


@dataclass(frozen=True, eq=False)
class ExaminationInputs:
    """N images of C classes, and the network that is examined. Raises ValueError for shapes that do not fit."""

    forward: Forward
    """The network."""
    images: Images
    """uint8 [N, S, S], N >= 1."""
    labels: Labels
    """int32 [N]."""
    names: Sequence[str]
    """Of the images: N distinct ones."""
    class_names: tuple[str, ...]
    """C names in label order."""
    seed: int
    """Of noise, donors, folds and the choice of examples."""
    masks: Masks | None = None
    """Of the lungs, bool [N, S, S]; all False for an image without one. None: of no image."""
    sources: Sequence[str | None] | None = None
    """Where each image came from; None where, or if, nothing is known."""
    groups: Sequence[str] | None = None
    """Name of each image's group of duplicates; None: each is its own."""
    model: Any = None
    """The same network as a functional Keras model with logits, for Grad-CAM; without it that is left out."""

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != np.uint8 or images.ndim != 3 or not len(images) or len(self.labels) != len(images):
            raise ValueError(f"expected uint8 [N, S, S] and N labels, not {images.dtype} {list(images.shape)}")
        if self.masks is not None and self.masks.shape != images.shape:
            raise ValueError(f"masks must be {list(images.shape)}, not {list(self.masks.shape)}")


def looks(classes: int) -> int:
    """How often each image goes through the network, one with the gradient included."""
    return 2 + LOOKS + shortcuts.looks(classes)


def examine(inputs: ExaminationInputs, done: Callable[[int], None] = lambda _: None) -> Examination:
    """Examine a network; `done` is called with the number of images whenever some have been through it."""
    images, labels, masks, seed = inputs.images, inputs.labels, inputs.masks, inputs.seed
    classes = len(inputs.class_names)

    def forward(changed: Images) -> npt.NDArray[np.float64]:
        probabilities = np.asarray(inputs.forward(changed), np.float64)
        done(len(changed))
        return probabilities

    def classify(changed: Images) -> Labels:
        return np.argmax(forward(changed), axis=1).astype(np.int32)

    predictions = Predictions(list(inputs.names), labels, forward(images), inputs.class_names)
    predicted = predictions.predicted
    occlusions = shortcuts.occlusion_scores(classify, images, labels, predicted, masks, classes, seed)
    conflict = shortcuts.cue_conflict(classify, images, labels, classes, seed)
    curves = robustness(classify, images, labels, predicted, classes, seed)
    findings = [*shortcuts.conflict_findings(conflict), *shortcuts.occlusion_findings(occlusions, conflict)]
    sections: dict[Section, list[Figure]] = {
        "attention": [],
        "lungs": [figures.occlusion_figure(occlusions)],
        "robustness": [figures.robustness_figure(curves, occlusions["chance"])],
    }
    shares, features = None, None
    if inputs.model is not None:
        explained = grad_cam.make_explain(inputs.model, done)(images, predicted)
        features = explained.features
        shares = None if masks is None else attention.lung_shares(explained.maps, masks)
        findings += attention.attention_findings(shares) if shares else []
        sections["attention"] = gallery(images, explained.maps, predictions, seed)
    overall = score(labels, predicted, classes)
    sources = source_probe.by_source(labels, predicted, inputs.sources)
    probe = source_probe.source_in_features(features, labels, inputs.sources, inputs.groups, inputs.class_names, seed)
    findings += source_probe.source_findings(sources, overall["accuracy"]) + source_probe.feature_findings(probe)
    findings += robustness_findings(curves)
    counted = Counter(labels.tolist())
    numbers = {
        "sample": {
            "images": len(labels),
            "classes": {name: counted[label] for label, name in enumerate(inputs.class_names)},
            "with_mask": 0 if masks is None else int(masks.any(axis=(1, 2)).sum()),
            "with_source": sum(source is not None for source in inputs.sources or ()),
            "seed": seed,
            "looks": looks(classes),
        },
        **overall,
        "occlusions": occlusions,
        "cue_conflict": conflict,
        "by_source": sources,
        "source_in_features": probe,
        "robustness": curves,
        "attention": {"measured": inputs.model is not None, "lungs": shares},
    }
    return Examination(numbers, findings, sections)
