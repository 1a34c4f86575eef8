"""When a checkpoint is written, and that training need not wait for it."""

import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

from cxr_dist.config.schema import CheckpointConfig

MAX_FAILURES = 3


class CheckpointWriter:
    """Writes checkpoints one at a time beside the training, as often as their cost allows."""

    def __init__(
        self,
        config: CheckpointConfig,
        clock: Callable[[], float] = time.monotonic,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Args:
        warn: Told of a checkpoint that storage failed to take, where another one will follow.
        """
        self._config, self._clock, self._warn = config, clock, warn
        self._failed = 0
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        self._begun = clock()
        self._cost = 0.0

    def steps_until_due(self, step: int) -> int | None:
        """How many steps of an epoch, of which `step` are done, until one is due by their number; None: by time.

        It is the same on all workers, whose calls must be equally long.
        """
        every = self._config.every_steps
        return None if every is None else every - step % every

    def is_due(self, step: int) -> bool:
        """Whether now is the time, `step` steps into an epoch (0: at its end)."""
        if self._config.every_steps is not None:
            return step % self._config.every_steps == 0
        if self._running is not None and not self._running.done():
            return False
        return self._clock() - self._begun >= self._cost / self._config.max_overhead

    def write(self, task: Callable[[], None]) -> None:
        """Do `task` beside what follows; waits for the one before.

        Storage may fail now and then: `MAX_FAILURES` in a row are warnings, as the checkpoint before is there still,
        and a newer one is on its way.

        Raises:
            Exception: what the one before met, if it is anything else.
        """
        try:
            self.wait()
        except OSError as error:
            self._failed += 1
            if self._failed > MAX_FAILURES:
                raise
            self._warn(f"a checkpoint could not be written ({error}); the next one will be tried")
        self._begun = self._clock()
        self._running = self._threads.submit(self._timed, task)
        if not self._config.background:
            futures.wait([self._running])

    def wait(self) -> None:
        """Until what was begun is on the disk.

        Raises:
            Exception: what it met.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Until what was begun has ended, well or not; nothing more can be written."""
        self._threads.shutdown(wait=True)

    def _timed(self, task: Callable[[], None]) -> None:
        begun = self._clock()
        try:
            task()
            self._failed = 0
        finally:
            self._cost = self._clock() - begun
