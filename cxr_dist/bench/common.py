"""What several benchmarks share: images to measure on, our commands in processes of their own, and paired rounds."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cxr_dist.config.loading import load_config, resolve_preset
from cxr_dist.config.schema import Config
from cxr_dist.phantoms import CLASS_FOLDERS, write_phantoms
from cxr_dist.runs import run_folder
from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.splitting.splits import TRAIN_PERCENT

IMAGE_SIZE = 224
"""Of the images in a dataset; its raw images have so many bytes squared."""
DATABASE_IMAGE_SIZE = 299
_USER_ERROR = 2
"""Exit status of a command that has said in one line what the user can mend."""


def draw_phantoms(folder: Path, images: int, size: int) -> Path:
    """At least so many phantoms, in a new folder."""
    with progress_bar("phantoms") as progress:
        per_class = math.ceil(images / len(CLASS_FOLDERS))
        write_phantoms(folder, per_class=per_class, size=size, progress=progress)
    return folder


def draw_dataset(folder: Path, training_images: int) -> Path:
    """A dataset of phantoms, with so many images for training, or a few more."""
    images = math.ceil(training_images * 100 / TRAIN_PERCENT)
    draw_phantoms(folder / "phantoms", images, IMAGE_SIZE)
    build_dataset(folder / "phantoms", folder / "dataset", BuildOptions(image_size=IMAGE_SIZE))
    return folder / "dataset"


@dataclass(frozen=True)
class Built:
    """Labelled images, and the dataset that was built of them."""

    source: Path
    dataset: Path
    seconds: float
    """That building took."""


def build(source: Path | None, images: int, work: Path) -> Built:
    """Of `source`, or of so many phantoms, in the empty folder `work`."""
    source = source or draw_phantoms(work / "phantoms", images, IMAGE_SIZE)
    summary = build_dataset(source, work / "dataset", BuildOptions(image_size=IMAGE_SIZE, masks="ignore"))
    return Built(source, work / "dataset", summary.seconds)


@dataclass(frozen=True)
class Recipe:
    """A configuration, and the options of `cxr-dist train` that give it."""

    config: Config
    arguments: tuple[str, ...]

    @classmethod
    def load(cls, preset: Path | None, overrides: Sequence[str]) -> "Recipe":
        """
        Raises:
            UserError: there is no such preset or key.
        """
        path = resolve_preset(preset)
        return cls(load_config(path, list(overrides)), ("--config", str(path), *_set(overrides)))


def _set(overrides: Sequence[str]) -> list[str]:
    return [text for override in overrides for text in ("--set", override)]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    seconds: float
    """Of the whole command."""
    result: dict[str, Any]
    history: list[dict[str, Any]]


def train(dataset: Path, run: Path, arguments: Sequence[str], overrides: Sequence[str]) -> Trained:
    """`cxr-dist train` with `arguments`, and with `overrides` (key=value) on top."""
    started = time.perf_counter()
    command(["train", str(dataset), "--out", str(run), *arguments], overrides)
    seconds = time.perf_counter() - started
    return Trained(seconds, run_folder.finished_result(run), run_folder.read_history(run))


def command(arguments: Sequence[str], overrides: Sequence[str]) -> None:
    """`cxr-dist` with `arguments`, and with `overrides` (key=value) on top."""
    python(["-m", "cxr_dist", *arguments, *_set(overrides)], os.environ)


def python(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """This Python, and wait; what it prints goes to stderr, as it is no result.

    Raises:
        UserError: the command ended with what the user can mend, which it has said.
    """
    try:
        # Our own commands, and paths that the user gave.
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=sys.stderr)  # noqa: S603
    except subprocess.CalledProcessError as error:
        if error.returncode == _USER_ERROR:
            raise UserError(
                "the benchmark stopped, because the command that it measures failed; see its message above"
            ) from None
        raise


@dataclass(frozen=True)
class Round:
    """The same work done by ours and by the baseline, one after the other, in images per second."""

    ours: float
    baseline: float

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline


@dataclass(frozen=True)
class Medians:
    """Over rounds; the ratio is the median of the rounds' own ratios."""

    ours: float
    baseline: float
    ratio: float
    rounds: int

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Medians":
        ours, baseline = median(row.ours for row in rounds), median(row.baseline for row in rounds)
        return cls(ours, baseline, median(row.ratio for row in rounds), len(rounds))
