"""A notice of the end, such as SIGTERM on a machine that will be taken away, leads to a checkpoint in time."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tfrecords_builder.files import write_text

STOP = "stop"
"""The file in a run's folder that asks for the end; whoever may write there may ask, from any machine."""
NOTICE_LIMIT_S = 25
"""In which a run that was asked must have ended; clusters and clouds kill 30 s after their notice, or later."""


class StoppedError(Exception):
    """The run was asked to end, and has left a checkpoint."""


class RegroupedError(StoppedError):
    """It was asked to so that it can go on with more workers."""


_MORE_WORKERS = "more workers"


class StopRequest:
    """Whether somebody has asked a run to end."""

    def __init__(self, run: Path) -> None:
        self._path = run / STOP

    def make(self, *, for_more_workers: bool = False) -> None:
        """Ask; whoever wants the end is heard before who wants more workers."""
        if not for_more_workers:
            self._path.write_text("")
        elif not self.is_made():
            write_text(self._path, _MORE_WORKERS)  # whole, or an empty file would be seen: a stop

    def is_made(self) -> bool:
        return self._path.exists()

    def is_for_more_workers(self) -> bool:
        """Whether that is all that was asked for."""
        return self._path.read_text() == _MORE_WORKERS

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def stopped_by_sigterm(run: Path) -> Iterator[None]:
    """While it lasts SIGTERM asks the run to end; one that has not by then is ended as it stands.

    Raises:
        StoppedError: it did not end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has signals handled by its main thread alone
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        StopRequest(run).make()
        signal.alarm(NOTICE_LIMIT_S)

    def end(_number: int, _frame: FrameType | None) -> None:
        raise StoppedError(f"{run}: stopped without a checkpoint of this moment; start the same command again to go on")

    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, end)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
