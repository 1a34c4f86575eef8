"""A notice of the end, such as SIGTERM on a machine that will be taken away, leads to a checkpoint in time."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cxr_dist.runs.interrupt import RESUME

STOP = "stop"
"""The file in a run's folder that asks for the end; whoever may write there may ask, from any machine."""
REGROUP = "regroup"
"""The file that asks for the end so that the run can resume with more workers.

A file of its own, because then neither request can overwrite the other, nor be removed with it unseen."""
NOTICE_LIMIT_S = 25
"""In which a run that was asked must have ended; clusters and clouds kill 30 s after their notice, or later."""


class StoppedError(Exception):
    """The run was asked to end, and has left a checkpoint."""


class RegroupedError(StoppedError):
    """It was asked to so that it can resume with more workers."""


class StopRequest:
    """Whether somebody has asked a run to end."""

    def __init__(self, run: Path) -> None:
        self._stop, self._regroup = run / STOP, run / REGROUP

    def make(self, *, for_more_workers: bool = False) -> None:
        """Ask for the end, or for the end and a new start with more workers."""
        (self._regroup if for_more_workers else self._stop).touch()

    def is_made(self) -> bool:
        """Whether there is a request of either kind."""
        return self._stop.exists() or self._regroup.exists()

    def take(self) -> type[StoppedError] | None:
        """Remove the requests there are and say what they ask for; a stop comes before more workers.

        A stop that comes after the look stays, and ends the run that resumes.
        """
        for path, kind in ((self._stop, StoppedError), (self._regroup, RegroupedError)):
            if path.exists():
                path.unlink(missing_ok=True)
                return kind
        return None

    def clear(self) -> None:
        """Forget what was asked of an earlier start."""
        self._stop.unlink(missing_ok=True)
        self._regroup.unlink(missing_ok=True)


@contextmanager
def stopped_by_sigterm(run: Path) -> Iterator[None]:
    """While it lasts SIGTERM asks the run to end; one that has not by `NOTICE_LIMIT_S` is ended as it stands.

    No timer signal is used: a process has one of each kind, and it may be somebody else's.

    Raises:
        StoppedError: it did not end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has signals handled by its main thread alone
        return
    timer: threading.Timer | None = None
    is_late = is_over = False

    def be_late() -> None:
        nonlocal is_late
        is_late = True
        # A signal, as it also wakes a main thread that waits in a system call.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal timer
        if is_over:
            return
        if is_late:
            raise StoppedError(f"{run}: stopped without a new checkpoint; {RESUME}")
        if timer is None:
            timer = threading.Timer(NOTICE_LIMIT_S, be_late)
            timer.daemon = True
            timer.start()
        StopRequest(run).make()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        is_over = True
        if timer is not None:
            timer.cancel()
            timer.join()  # before the handler goes: what the timer sends is for it
        signal.signal(signal.SIGTERM, before)
