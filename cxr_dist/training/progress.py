"""Where a run stands: what a checkpoint holds of it beside arrays."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import StageConfig
from cxr_dist.runs import checkpoints
from cxr_dist.runs.ranking import rank
from cxr_dist.training import train_step


@dataclass
class Best:
    """The best validation so far."""

    selection: float = -math.inf
    """What the selection maximises; see `ranking.SELECTION`."""
    val_accuracy: float = -1.0
    val_loss: float = float("inf")
    epochs_done: int = 0
    """After which epoch over all stages; 0 before the first."""
    stage: int = 0
    epoch: int = 0

    def is_beaten_by(self, row: dict[str, Any]) -> bool:
        """Whether an epoch is better."""
        return rank(row) > rank(vars(self))


@dataclass
class Progress:
    """A run between two steps."""

    stage: int = 1
    epoch: int = 0
    """Epochs of the stage that are done."""
    epochs_done: int = 0
    """Over all stages."""
    step: int = 0
    """Steps of the epoch after those that are done."""
    totals: list[float] = field(default_factory=lambda: [0.0] * train_step.TOTALS)
    """Of these steps."""
    seconds_in_steps: float = 0.0
    epochs_without_gain: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase; `total` is that of the whole run."""
    reads_cache: dict[str, bool] = field(default_factory=dict)
    """By stage, split point and setting, whether a stage reads cached activations. Decided once: they are rounded, and
    change the numbers."""

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Progress":
        """What `dataclasses.asdict` and JSON made of one.

        Raises:
            KeyError, TypeError, ValueError: the state is not one of this version.
        """
        progress = cls(**state | {"best": Best(**state["best"])})
        if len(progress.totals) != train_step.TOTALS:
            raise ValueError(f"{len(progress.totals)} totals, not {train_step.TOTALS}")
        return progress

    @property
    def position(self) -> checkpoints.Position:
        return checkpoints.Position(self.epochs_done, self.step)

    def begin_stage(self, number: int) -> None:
        """Stand at the beginning of a stage, unless the run stands within it."""
        if self.stage != number:
            self.stage, self.epoch, self.epochs_without_gain = number, 0, 0

    def has_finished(self, number: int, stage: StageConfig) -> bool:
        """Whether the current stage is `number` and has done its epochs or stops early."""
        stops = stage.early_stopping is not None and self.epochs_without_gain >= stage.early_stopping
        return self.stage == number and (self.epoch >= stage.epochs or stops)

    def add_steps(self, count: int, totals: npt.NDArray[np.float64], seconds: float) -> None:
        """Count `count` steps, after which the epoch's sums are `totals`."""
        self.totals, self.step = totals.tolist(), self.step + count
        self.seconds_in_steps += seconds
        self.add_seconds(f"stage_{self.stage}", seconds)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Take the row of an epoch into the history; `best`, whether it is the best so far, is added to it."""
        row["best"] = self.best.is_beaten_by(row)
        self.epoch, self.epochs_done = row["epoch"], row["epochs_done"]
        self.step, self.totals, self.seconds_in_steps = 0, [0.0] * train_step.TOTALS, 0.0
        self.epochs_without_gain = 0 if row["best"] else self.epochs_without_gain + 1
        self.history.append(row)
        if row["best"]:
            self.best = Best(**{known.name: row[known.name] for known in fields(Best)})

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what passes meanwhile for `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(phase, time.perf_counter() - started)
