"""What not computing twice is worth: both stages against `fit` in plain Keras, each in a process of its own.

Stage 1 is timed as a user sees it: from the start of the command to its end, with an empty cache, and building the
dataset. Plain Keras's time is estimated from the speed of its `fit` over some steps and from its start-up, as each of
its epochs does the same work. Stage 2 is compared by images per second, on as many drawn X-rays as the steps take, with
the tensors below the first unfrozen layer computed in each step, and kept.

Plain Keras runs twice: as TensorFlow comes, and with oneDNN switched on, which TensorFlow does by itself only on CPUs
with AVX-512.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cxr_dist.bench import common
from cxr_dist.bench.common import Built, Recipe
from cxr_dist.config.schema import Config
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
OURS = "cxr-dist"
PUBLISHED_LAYERS = 100
"""Unfrozen in stage 2, on both sides."""
PUBLISHED_RATE = 1e-3
"""Of plain Keras in stage 1; in stage 2 it has a tenth."""
_EPOCHS = 3
"""Of plain Keras in each stage, and of ours in stage 2. The first compiles, and is not counted."""


@dataclass(frozen=True)
class Way:
    """One way of doing the work; None where it was not measured."""

    name: str
    stage_1_seconds: float | None
    """Of all epochs, with validation and start-up."""
    stage_1_accuracy: float | None
    """The best on validation."""
    stage_2_images_per_second: float | None
    """In training."""


def measure(recipe: Recipe, built: Built, drawn: Path, steps: int, folder: Path) -> list[Way]:
    """Take every way once.

    Args:
        built: What stage 1 is trained on.
        drawn: A dataset of `steps` batches for stage 2, as fast as any.
        steps: Of an epoch in plain Keras, and in stage 2.
        folder: Empty.
    """
    ways = [
        _plain(recipe.config, built, steps, onednn, folder / f"plain-{len(onednn)}.json")
        for onednn in ({}, {ONEDNN: "1"})
    ]
    arguments = [*recipe.arguments, "--launcher", "local"]
    stage_1 = common.train(built.dataset, folder / "stage-1", arguments, ["stages.2.epochs=0"])
    accuracy = stage_1.result["best"]["val_accuracy"]
    ways.append(Way(OURS, stage_1.seconds + built.seconds, accuracy, None))
    for name, cut in ((f"{OURS}, computing all", "off"), (f"{OURS}, cut kept", "on")):
        settings = (
            "stages.1.epochs=0",
            f"stages.2.epochs={_EPOCHS}",
            f"stages.2.unfreeze_layers={PUBLISHED_LAYERS}",
            f"features.cache_activations={cut}",
        )
        stage_2 = common.train(drawn, folder / f"stage-2-{cut}", arguments, settings)
        images = steps * recipe.config.global_batch_size
        ways.append(Way(name, None, None, median(images / row["seconds"] for row in stage_2.history[1:])))
    return ways


def table(ways: Sequence[Way]) -> list[str]:
    """Lines for people."""
    lines = [f"{'':24} stage 1 s  times ours  validation  stage 2 images/s"]
    ours = next((way.stage_1_seconds for way in ways if way.name == OURS), None)
    for way in ways:
        ratio = way.stage_1_seconds / ours if way.stage_1_seconds and ours else None
        rate = way.stage_2_images_per_second
        cells = ((way.stage_1_seconds, 9, 0), (ratio, 10, 1), (way.stage_1_accuracy, 10, 4), (rate, 16, 2))
        shown = "  ".join(
            " " * width if value is None else f"{value:{width},.{digits}f}" for value, width, digits in cells
        )
        lines.append(f"{way.name:24} {shown}".rstrip())
    return lines


def estimated_seconds(plain: Mapping[str, Any], images: int, train: int, validation: int, epochs: int) -> float:
    """What `epochs` of stage 1 take plain Keras over `train` and `validation` images, start-up included.

    Args:
        plain: What `plain_keras` wrote of epochs of `images` images each.
        images: For training, and at most for validation.
    """
    rows = [row for row in plain["history"] if row["stage"] == 1]
    trained, validated = (
        median(row[f"{what}_seconds"] for row in rows[1:]) / images for what in ("train", "validation")
    )
    compiling = rows[0]["train_seconds"] - trained * images
    return float(plain["seconds"]["start"] + compiling + epochs * (train * trained + validation * validated))


def plain_command(
    config: Config, built: Built, epochs: tuple[int, int], out: Path, more: Mapping[str, int]
) -> list[str]:
    """Arguments of Python that run plain Keras as published: the upper 100 layers in stage 2, at a tenth of the rate.

    As a file, and not as a module of this package, which switches oneDNN on.
    """
    options = {
        "weights": config.model.weights,
        "out": out,
        "batch-size": config.global_batch_size,
        "learning-rate": PUBLISHED_RATE,
        "dropout": config.model.dropout,
        "unfreeze-layers": PUBLISHED_LAYERS,
        **more,
    }
    script = Path(__file__).with_name("plain_keras.py")
    command = [str(script), str(built.source), str(built.dataset / "manifest.parquet"), "--epochs", *map(str, epochs)]
    return command + [text for key, value in options.items() for text in (f"--{key}", str(value))]


def _plain(config: Config, built: Built, steps: int, onednn: dict[str, str], out: Path) -> Way:
    manifest = read_manifest(built.dataset)
    train, validation = (len(manifest.split(name)) for name in ("train", "validation"))
    steps = min(steps, validation // config.global_batch_size)
    if not steps:
        raise UserError(f"{built.source}: gives {validation} validation images, less than a batch; give more images")
    environment = {name: value for name, value in os.environ.items() if name != ONEDNN} | onednn
    common.python(plain_command(config, built, (_EPOCHS, _EPOCHS), out, {"steps": steps}), environment)
    plain = json.loads(out.read_text())
    images = steps * config.global_batch_size
    fine_tuning = [row["train_seconds"] for row in plain["history"] if row["stage"] == 2][1:]
    seconds = estimated_seconds(plain, images, train, validation, config.stages[1].epochs)
    return Way("plain Keras" + (", oneDNN" if onednn else ""), seconds, None, images / median(fine_tuning))
