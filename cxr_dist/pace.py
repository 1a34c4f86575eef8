"""How many steps a call of the compiled loop runs. Pure."""

from cxr_dist.steps import MOST_STEPS_PER_CALL

SECONDS_PER_CALL = 1.0
"""Steps are run in calls of about this length: long enough to hide the host, short enough to show progress."""
STEPS_PER_CALL_OF_WORKERS = 8
"""With several workers, calls have this length, whatever the time: see `Pace`."""


class Pace:
    """How many steps to run in a call, and how fast they are; the first call, which compiles, does not count.

    Workers must all run calls of the same lengths: TensorFlow knows a collective inside a loop by the number of the
    iteration, and workers whose calls begin at different steps wait for each other for ever. So with several workers
    the lengths do not depend on anybody's clock.
    """

    def __init__(self, by_time: bool) -> None:
        self._by_time = by_time
        self.steps_per_call = 1
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
        if not self._compiled:
            self._compiled, self._first = True, (count, seconds)
            return
        self._steps += count
        self._seconds += seconds
        if not self._by_time:
            self.steps_per_call = STEPS_PER_CALL_OF_WORKERS
            return
        per_step = seconds / count
        self.steps_per_call = int(
            min(max(SECONDS_PER_CALL / per_step, 1), 2 * self.steps_per_call, MOST_STEPS_PER_CALL)
        )
