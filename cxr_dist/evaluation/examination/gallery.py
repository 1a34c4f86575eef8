"""Pictures for people: an X-ray with the network's attention over it. Pure."""

import numpy as np
import numpy.typing as npt

from cxr_dist.data import random_streams
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.inference.grad_cam import Maps, overlay_png
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import display_name

MISTAKES = 12
SUCCESSES_PER_CLASS = 2


def chosen(predictions: Predictions, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the most confident mistakes, the surest first, and of right predictions drawn by `seed`, by class."""
    sure = predictions.probabilities.max(axis=1)
    right = predictions.predicted == predictions.labels
    mistakes = sorted(np.flatnonzero(~right).tolist(), key=lambda row: (-sure[row], row))[:MISTAKES]
    random = random_streams.generator("images of the gallery", seed)
    successes: list[int] = []
    for label in range(len(predictions.class_names)):
        rows = random.permutation(np.flatnonzero(right & (predictions.labels == label)))
        successes += sorted(rows[:SUCCESSES_PER_CLASS].tolist())
    return mistakes, successes


def gallery(images: npt.NDArray[np.uint8], maps: Maps, predictions: Predictions, seed: int) -> list[Figure]:
    """A figure for each chosen image, mistakes first.

    Args:
        images: uint8 [N, S, S].
        maps: float32 [N, h, w]: of the predicted class.
        predictions: Of the same images.
        seed: Of the choice of right predictions.
    """
    names = [display_name(name) for name in predictions.class_names]
    predicted = predictions.predicted
    figures = []
    for kind, rows in zip(("mistake", "success"), chosen(predictions, seed), strict=True):
        for number, row in enumerate(rows, start=1):
            true, answer = names[predictions.labels[row]], names[predicted[row]]
            title = f"{true} predicted as {answer}" if kind == "mistake" else f"{true}, predicted correctly"
            sure = 100 * predictions.probabilities[row].max()
            figures.append(
                Figure(
                    f"examination-{kind}-{number:02}.png",
                    title,
                    f"{predictions.paths[row]}: predicted as {answer} (probability {sure:.1f}%){_place(maps[row])}.",
                    overlay_png(images[row], maps[row]),
                    kind="X-ray with a Grad-CAM heat map.",
                )
            )
    return figures


def _place(heat: npt.NDArray[np.float32]) -> str:
    """Where the map is highest, in words."""
    if not heat.any():
        return "; no region of the image supports it"
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    heights, widths = ("upper", "middle", "lower"), ("left", "centre", "right")
    height = heights[min(int(3 * (row + 0.5) / heat.shape[0]), 2)]
    width = widths[min(int(3 * (column + 0.5) / heat.shape[1]), 2)]
    where = "centre" if (height, width) == ("middle", "centre") else f"{height} {width}"
    return f"; the attention is highest in the {where} of the image"
