"""Ctrl-C and the processes that are started for work: the parent alone answers it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C, not even while they import; this one does at the end.

    Ctrl-C reaches the whole process group, and a process that has not come to `prepare_child` would end in a traceback.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it first, and let signals through from then on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
