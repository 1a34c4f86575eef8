"""The processes that are started for work: the parent alone answers Ctrl-C, and none runs the user's script again."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import ModuleType


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C, not even while they import; this one does at the end.

    Ctrl-C reaches the whole process group, and a process that has not come to `prepare_child` would end in a traceback.

    Nor do processes that multiprocessing spawns meanwhile import the program that runs here, of which they need
    nothing: a script without `if __name__ == "__main__"` would start its work again in each of them.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it first, and let signals through from then on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
