"""Where a run stands: what a checkpoint holds of it beside arrays."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cxr_dist.runs import checkpoints
from cxr_dist.runs.ranking import rank
from cxr_dist.training import train_step


@dataclass
class Best:
    """The best validation so far."""

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
    kept_cuts: dict[str, bool] = field(default_factory=dict)
    """By the stage's number, whether it reads kept tensors. Decided once: they are rounded, and change the numbers."""

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

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what passes meanwhile for `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
