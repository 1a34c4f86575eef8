"""How many steps a call of the compiled loop runs. Pure."""

from typing import NamedTuple

from cxr_dist.distributed.devices import DeviceKind
from cxr_dist.training.train_step import MAX_STEPS_PER_CALL

SECONDS_PER_CALL = 1.0
"""About the length of a call: long enough to hide the host, short enough to show progress."""


class FixedStepsPerCall(NamedTuple):
    """Steps per call where no clock may decide: of training by several workers, and of validation.

    Between two calls the host looks for a request to stop, and has 25 s to leave a checkpoint then: a call must be
    short on the slowest device that it may run on.
    """

    training: int
    validation: int

    @classmethod
    def of(cls, kind: DeviceKind, head_alone: bool) -> "FixedStepsPerCall":
        """Of a stage on devices of a kind; `head_alone`: the base is neither trained nor computed."""
        # ResNet50 on a CPU takes seconds a step.
        return cls(8, 64) if kind == "GPU" or head_alone else cls(1, 2)


class StepsPerCall:
    """Steps of the next call, and the speed of the calls before; the first call, which compiles, does not count.

    Workers must all run calls of the same lengths: TensorFlow knows a collective inside a loop by the number of the
    iteration, and workers whose calls begin at different steps wait for each other for ever. So with several workers
    the lengths do not depend on anybody's clock.
    """

    def __init__(self, fixed: int | None = None) -> None:
        """Args:
        fixed: Steps of every call after the first two; None: by time.
        """
        self._fixed = fixed
        self.count = 1
        self._compiled = False
        self._steps = 0
        self._seconds = 0.0
        self._first = (0, 0.0)

    @property
    def steps_per_second(self) -> float:
        if self._seconds:
            return self._steps / self._seconds
        steps_run, seconds = self._first
        return steps_run / seconds if seconds else 0.0

    def start_epoch(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def record(self, count: int, seconds: float) -> None:
        """Take in a call of `count` steps."""
        if not self._compiled:
            self._compiled, self._first = True, (count, seconds)
            return
        self._steps += count
        self._seconds += seconds
        by_time = max(SECONDS_PER_CALL * count / seconds, 1)
        self.count = self._fixed or int(min(by_time, 2 * self.count, MAX_STEPS_PER_CALL))
