"""The processes that are started for work: the parent alone answers Ctrl-C, and none runs the user's script again."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from types import ModuleType


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C, not even while they import; this one does at the end.

    Ctrl-C reaches the whole process group, and a process that has not come to `prepare_child` would end in a traceback.
    It would too where this process ended before it had sent what the new one reads first.

    Nor do processes that multiprocessing spawns meanwhile import the program that runs here, of which they need
    nothing: a script without `if __name__ == "__main__"` would start its work again in each of them.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it first, and let signals through from then on
    with ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            restored.enter_context(_handler_held())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        restored.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        restored.callback(sys.modules.__setitem__, "__main__", sys.modules["__main__"])
        sys.modules["__main__"] = ModuleType("__main__")
        yield


@contextmanager
def _handler_held() -> Iterator[None]:
    """Call the handler of Ctrl-C at the end alone. Blocking is not enough: a library's thread may take the signal, and
    Python then runs the handler in the main thread."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    interrupted = False

    def note(_number: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupted:
            signal.raise_signal(signal.SIGINT)
