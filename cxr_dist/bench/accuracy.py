"""How soon a validation accuracy is there: plain Keras's best of both its stages, and when ours has as much.

Plain Keras runs all its epochs on the same images in the same split, and `cxr-dist train` its own recipe, one after the
other, each in a process of its own. Plain Keras too has oneDNN switched on, as importing this package does. Time runs
from the start of the command, and ours has building the dataset in it; validation counts on both sides. A validation
accuracy of 637 images has a standard error of 0.011: give several seeds.
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
from cxr_dist.bench.features import OURS, plain_command

PLAIN = "plain Keras"
PLAIN_EPOCHS = (3, 4)


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, validation included."""

    seconds: float
    """Since the command began."""
    stage: int
    val_accuracy: float


@dataclass(frozen=True)
class Course:
    """One training, epoch by epoch."""

    name: str
    seed: int
    epochs: tuple[Epoch, ...]

    @property
    def best(self) -> float:
        return max(epoch.val_accuracy for epoch in self.epochs)

    def seconds_to(self, accuracy: float) -> float | None:
        """When it was first reached; None when it was not."""
        return next((epoch.seconds for epoch in self.epochs if epoch.val_accuracy >= accuracy), None)


def measure(recipe: Recipe, built: Built, seeds: Sequence[int], folder: Path) -> list[Course]:
    """Plain Keras once, with the first seed, then ours with every seed, each from an empty cache; `folder` is empty."""
    out = folder / "plain.json"
    command = plain_command(recipe.config, built, PLAIN_EPOCHS, out, {"seed": seeds[0]})
    common.python(command, os.environ)
    rows = json.loads(out.read_text())["history"]
    epochs = tuple(Epoch(row["elapsed_seconds"], row["stage"], row["val_accuracy"]) for row in rows)
    courses = [Course(PLAIN, seeds[0], epochs)]
    for seed in seeds:
        # A folder of its own, as the feature cache lies beside the run.
        run = folder / f"seed-{seed}" / "run"
        trained = common.train(built.dataset, run, [*recipe.arguments, "--launcher", "local"], [f"seed={seed}"])
        epochs = our_epochs(trained.history, trained.result, built.seconds + trained.seconds)
        courses.append(Course(OURS, seed, epochs))
    return courses


def table(courses: Sequence[Course]) -> list[str]:
    """Lines for people."""
    plain, ours = courses[0], courses[1:]
    lines = []
    for course in courses:
        lines.append(f"{course.name}, seed {course.seed}: validation accuracy by seconds")
        lines += [f"  stage {epoch.stage}  {epoch.val_accuracy:.4f}  {epoch.seconds:8,.0f}" for epoch in course.epochs]
    reached = [seconds for course in ours if (seconds := course.seconds_to(plain.best)) is not None]
    when = plain.seconds_to(plain.best) or 0.0
    lines.append(f"plain Keras reaches its best, {plain.best:.4f}, after {when:,.0f} s; cxr-dist reaches it after:")
    for course in ours:
        seconds = course.seconds_to(plain.best)
        when_reached = (
            f"not reached (best {course.best:.4f})" if seconds is None else f"{seconds:,.0f} s, {when / seconds:.2f}x"
        )
        lines.append(f"  seed {course.seed}: {when_reached}")
    if len(reached) == len(ours) > 1:
        lines.append(f"  median of the seeds: {when / median(reached):.2f} times faster")
    return lines


def our_epochs(
    history: Sequence[Mapping[str, Any]], result: Mapping[str, Any], wall_seconds: float
) -> tuple[Epoch, ...]:
    """Of a run's rows, where the whole command took `wall_seconds`; what the run itself does not count came first."""
    before = wall_seconds - result["seconds"]["total"]
    return tuple(Epoch(before + row["run_seconds"], row["stage"], row["val_accuracy"]) for row in history)
