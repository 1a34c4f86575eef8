"""How a command ends at a terminal or in a pipe: Ctrl-C, a closed pipe, and a locale that lacks letters."""

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from cxr_dist.runs.interrupt import INTERRUPTED, exit_now, exit_silently, say_interrupted

CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit status, as a shell gives it of a program that the signal has killed."""


class _Interrupts:
    """Ctrl-C as `KeyboardInterrupt`, and again where a destructor or the like has swallowed that."""

    def __init__(self) -> None:
        self._hook = sys.unraisablehook
        self._timers: list[threading.Timer] = []
        self.has_come = self._is_swallowed = False

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """A handler of SIGINT."""
        self.has_come = True
        if self._is_swallowed:  # the hook has not returned, and would swallow this one too
            self._resend()
        else:
            raise KeyboardInterrupt

    def unraisable(self, failure: "sys.UnraisableHookArgs") -> None:
        """In place of `sys.unraisablehook`."""
        if self.has_come and issubclass(failure.exc_type, KeyboardInterrupt):
            self._is_swallowed = True
            self._resend()
            self._is_swallowed = False
        else:
            self._hook(failure)

    def cancel(self) -> None:
        """Send none that is not under way."""
        for timer in self._timers:
            timer.cancel()

    def _resend(self) -> None:
        main = threading.main_thread().ident or 0
        timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()


@contextmanager
def manners(arguments: Sequence[str]) -> Iterator[None]:
    """While a command runs with these arguments.

    Ctrl-C unwinds it, as `KeyboardInterrupt`, and becomes one line and `INTERRUPTED`, whatever exception comes out in
    the end. A closed pipe becomes `CLOSED_PIPE`. What the locale's encoding lacks is printed as escapes.

    Raises:
        SystemExit: for the one or the other.
    """
    _prepare_streams()
    interrupts, hook = _Interrupts(), sys.unraisablehook
    sys.unraisablehook = interrupts.unraisable
    before = signal.getsignal(signal.SIGINT)
    # Left alone where it is ignored (nohup, a job in the background) and where another program has its own.
    takes = threading.current_thread() is threading.main_thread() and before in (signal.default_int_handler, exit_now)
    if takes:
        signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield
    except BaseException as error:
        if interrupts.has_come or isinstance(error, KeyboardInterrupt):
            if takes:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                before = exit_silently if before is exit_now else before
            say_interrupted(list(arguments))
            raise SystemExit(INTERRUPTED) from None
        if isinstance(error, BrokenPipeError) and _silence_closed():
            raise SystemExit(CLOSED_PIPE) from None
        raise
    finally:
        sys.unraisablehook = hook
        interrupts.cancel()
        if takes:
            signal.signal(signal.SIGINT, before)


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`): the next file would get its number, and C++ would write there
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as it runs
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write out what was printed, so that a failure is met here and not at the exit of the interpreter.

    Raises:
        OSError: it cannot be written; what is left of it is dropped.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            raise  # for `manners`, which looks whose pipe it is
        except OSError:
            _silence(stream)
            raise


def _silence_closed() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads; drops what would be written there at exit."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]
    for stream in closed:
        _silence(stream)
    return bool(closed)


def _is_closed_pipe(stream: TextIO) -> bool:
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _silence(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
