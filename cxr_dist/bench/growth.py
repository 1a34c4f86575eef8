"""How time and memory grow with the number of images: `cxr-dist train` on datasets of several sizes, from images.

Each size trains the head for some epochs without the feature cache, so that every epoch reads and computes every image,
in a process of its own. The images are noise that is a little brighter from class to class: what is measured does not
depend on what they show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from cxr_dist.bench import common
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.format.manifest import read_manifest

IMAGE_SIZE = 32
EPOCHS = 3
"""The first compiles, and is not counted."""
_CLASSES = 4
_SETTINGS = ("model.weights=none", "features.cache=off", f"stages.1.epochs={EPOCHS}", "stages.2.epochs=0")


@dataclass(frozen=True)
class Size:
    """A dataset, and what training on it took."""

    images: int
    """For training, validation and test."""
    trained: int
    """Of these, for training."""
    epoch_seconds: float
    """Median, validation left out."""
    peak_memory_bytes: int

    @property
    def seconds_per_image(self) -> float:
        return self.epoch_seconds / self.trained


def write_noise(folder: Path, images: int, seed: int = 0) -> None:
    """At least so many images for training, validation and test together, one folder a class."""
    rng = np.random.default_rng(seed)
    for number in range(images):
        name = f"class_{number % _CLASSES}"
        if number < _CLASSES:
            (folder / name).mkdir(parents=True)
        pixels = rng.integers(30 * (number % _CLASSES), 160, (IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number:07d}.png", compress_level=1)


def measure(sizes: Sequence[int], arguments: Sequence[str], folder: Path) -> list[Size]:
    """Of each number of images.

    Args:
        arguments: Of `cxr-dist train`.
        folder: Empty.
    """
    found = []
    for images in sizes:
        work = folder / str(images)
        write_noise(work / "images", images)
        build_dataset(work / "images", work / "dataset", BuildOptions(image_size=IMAGE_SIZE))
        trained = len(read_manifest(work / "dataset").split("train"))
        run = common.train(work / "dataset", work / "run", [*arguments, "--launcher", "local"], _SETTINGS)
        epoch_seconds = median(row["seconds"] for row in run.history[1:])
        found.append(Size(images, trained, epoch_seconds, run.result["peak_memory_bytes"]))
    return found


def table(sizes: Sequence[Size]) -> list[str]:
    """Lines for people."""
    least = sizes[0]
    lines = ["   images  epoch s  timesms per image  peak memory MB"]
    for size in sizes:
        times = size.epoch_seconds / least.epoch_seconds
        lines.append(
            f"{size.images:9,}{size.epoch_seconds:9.1f}{times:7.1f}{size.seconds_per_image * 1e3:13.3f}"
            f"{size.peak_memory_bytes / 1e6:16,.0f}"
        )
    return lines
