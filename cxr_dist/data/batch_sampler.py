"""Which images are in which batch: pure functions of seed, epoch and step.

The order is a function of (seed, epoch) and the place in it a function of the step, so the global batch at a step is
the same set of images for any number of workers and replicas, and a run that goes on from a step needs nothing else.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cxr_dist.data import random_streams
from tfrecords_builder.common.errors import UserError

Positions = npt.NDArray[np.int64]
PADDING = -1
"""The position of a slot without an image, in the last batch of an evaluation."""


def epoch_order(count: int, seed: int, epoch: int) -> Positions:
    """A permutation of the `count` images for the epoch (counted from 0 over the whole run)."""
    return random_streams.permutation(count, "epoch order", seed, epoch)


@dataclass(frozen=True)
class TrainBatchSampler:
    """Which images are in which batch. Every epoch leaves out less than a batch, others each time."""

    count: int
    global_batch_size: int
    replicas: int
    seed: int
    copies: int = 1
    """Of each image, one behind another in the source; an epoch takes one of them, the next epoch the next."""
    accumulation_steps: int = 1
    """Microbatches in which each replica takes its batch."""

    def __post_init__(self) -> None:
        divisor = self.replicas * self.accumulation_steps
        if self.global_batch_size % divisor:
            times = f" times {self.accumulation_steps} accumulation_steps" if self.accumulation_steps > 1 else ""
            raise UserError(
                f"global_batch_size {self.global_batch_size}: must be a multiple of the {self.replicas} replicas{times}"
                f"; try {-(-self.global_batch_size // divisor) * divisor}"
            )
        if self.count < self.global_batch_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size}: the training split has {self.count} images; "
                "give a smaller batch or more images"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.global_batch_size

    @property
    def batch_size(self) -> int:
        """Images per replica and step."""
        return self.global_batch_size // self.replicas

    def positions(self, step: int, replica: int) -> Positions:
        """Of `replica` at `step` (counted over the whole run): int64 [batch_size]."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _cached_order(self.count, self.seed, epoch)
        start = step * self.global_batch_size + replica * self.batch_size
        return order[start : start + self.batch_size] + epoch % self.copies * self.count


@dataclass(frozen=True)
class EvaluationBatchSampler:
    """Every image once, in order, on any number of replicas; the last batches are padded.

    After the last step it begins again, so that one iterator serves any number of passes.
    """

    count: int
    batch_size: int
    """Images per replica and step."""
    replicas: int

    @property
    def steps(self) -> int:
        return -(-self.count // (self.batch_size * self.replicas))

    def positions(self, step: int, replica: int) -> Positions:
        """Of `replica` at `step` (counted over all passes): int64 [batch_size], PADDING where there is no image."""
        start = (step % self.steps * self.replicas + replica) * self.batch_size
        positions = np.arange(start, start + self.batch_size, dtype=np.int64)
        return np.where(positions < self.count, positions, PADDING)


@lru_cache(maxsize=1)
def _cached_order(count: int, seed: int, epoch: int) -> Positions:
    """The last order: it is asked for at every step and changes once an epoch."""
    order = epoch_order(count, seed, epoch)
    order.setflags(write=False)
    return order
