"""Pictures for people: an X-ray with the network's attention over it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxr_dist.data import random_streams
from cxr_dist.evaluation.examination.findings import Panel
from cxr_dist.inference.grad_cam import Maps
from cxr_dist.inference.overlay import overlay_png

MISTAKES = 12
SUCCESSES_PER_CLASS = 2


@dataclass(frozen=True, slots=True)
class Answers:
    """What the network said of N images of C classes, and what is right."""

    labels: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    class_names: tuple[str, ...]
    names: Sequence[str]
    """Of the images."""

    @property
    def predicted(self) -> npt.NDArray[np.int32]:
        return np.argmax(self.probabilities, axis=1).astype(np.int32)


def chosen(answers: Answers, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the most confident mistakes, the surest first, and of right answers drawn by `seed`, by class."""
    sure = answers.probabilities.max(axis=1)
    right = answers.predicted == answers.labels
    mistakes = sorted(np.flatnonzero(~right).tolist(), key=lambda row: (-sure[row], row))[:MISTAKES]
    random = random_streams.generator("images of the gallery", seed)
    successes: list[int] = []
    for label in range(len(answers.class_names)):
        rows = random.permutation(np.flatnonzero(right & (answers.labels == label)))
        successes += sorted(rows[:SUCCESSES_PER_CLASS].tolist())
    return mistakes, successes


def gallery(images: npt.NDArray[np.uint8], maps: Maps, answers: Answers, seed: int) -> list[Panel]:
    """A panel for each chosen image, mistakes first.

    Args:
        images: uint8 [N, S, S].
        maps: float32 [N, h, w]: of the class that the network named.
        answers: Of the same images.
        seed: Of the choice of right answers.
    """
    panels = []
    for kind, rows in zip(("mistake", "success"), chosen(answers, seed), strict=True):
        for number, row in enumerate(rows, start=1):
            true, named = (_words(answers.class_names[at[row]]) for at in (answers.labels, answers.predicted))
            sure = 100 * answers.probabilities[row].max()
            title = f"{true} taken for {named}" if kind == "mistake" else f"{true}, recognised"
            caption = f"{answers.names[row]}: {named} with a probability of {sure:.1f}%{_place(maps[row])}."
            panels.append(
                Panel(
                    file=f"examination-{kind}-{number:02}.png",
                    section="attention",
                    title=title,
                    caption=caption,
                    alt=f"X-ray with the network's attention over it. {title}. {caption}",
                    png=overlay_png(images[row], maps[row]),
                )
            )
    return panels


def _place(heat: npt.NDArray[np.float32]) -> str:
    """Where the map is highest, in words."""
    if not heat.any():
        return "; no place of the image speaks for it"
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    heights, widths = ("upper", "middle", "lower"), ("left", "centre", "right")
    height = heights[min(int(3 * (row + 0.5) / heat.shape[0]), 2)]
    width = widths[min(int(3 * (column + 0.5) / heat.shape[1]), 2)]
    where = "centre" if (height, width) == ("middle", "centre") else f"{height} {width}"
    return f"; most of the attention in the {where} of the picture"


def _words(class_name: str) -> str:
    return class_name.replace("_", " ").strip() or class_name
