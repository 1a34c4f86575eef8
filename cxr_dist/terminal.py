"""How a command ends at a terminal or in a pipe: Ctrl-C, a closed pipe, and a locale that lacks letters.

Imports next to nothing, as it has to be in place before what takes long to import.
"""

import _thread
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

from cxr_dist.stopping import RESUME

INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + signal.SIGPIPE
"""As a shell says it of a program that the signal has killed."""
RESUMED = frozenset({"build", "demo", "download", "train", "tune"})
"""Commands that resume when they are started again."""


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once: for times at which nothing needs to be cleaned up, such as imports.

    An exception would not do: what it becomes depends on where it meets the code, and some of it swallows all.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(_number: int, _frame: FrameType | None) -> None:
    _say_interrupted(sys.argv[1:])
    os._exit(INTERRUPTED)


_is_said = False


def _say_interrupted(arguments: Sequence[str]) -> None:
    global _is_said
    if not _is_said:
        _is_said = True
        command = next((word for word in arguments if not word.startswith("-")), "")
        # Not by way of `sys.stderr`: a signal may come while it is being written.
        with suppress(OSError):
            os.write(2, f"interrupted{f'; {RESUME}' if command in RESUMED else ''}\n".encode())


@contextmanager
def manners(arguments: Sequence[str]) -> Iterator[None]:
    """While a command runs with these arguments.

    Ctrl-C unwinds it, as `KeyboardInterrupt`, and becomes one line and `INTERRUPTED`, whatever exception comes out in
    the end. A closed pipe becomes `CLOSED_PIPE`. What the locale's encoding lacks is printed as escapes.

    Raises:
        SystemExit: for the one or the other.
    """
    global _is_said
    _is_said = is_interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        raise KeyboardInterrupt

    def unraisable(failure: "sys.UnraisableHookArgs") -> None:
        if is_interrupted and issubclass(failure.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()  # it met a destructor or the like, which swallows it: once more
        else:
            hook(failure)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = signal.getsignal(signal.SIGINT)
    # Left alone where it is ignored (nohup, a job in the background) and where another program has its own.
    takes = threading.current_thread() is threading.main_thread() and before in (signal.default_int_handler, _exit)
    if takes:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if is_interrupted or isinstance(error, KeyboardInterrupt):
            if takes:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _say_interrupted(arguments)
            raise SystemExit(INTERRUPTED) from None
        if isinstance(error, BrokenPipeError) and _silence_closed():
            raise SystemExit(CLOSED_PIPE) from None
        raise
    finally:
        sys.unraisablehook = hook
        if takes:
            signal.signal(signal.SIGINT, before)


def flush() -> None:
    """Write out what was printed, so that a failure is met here and not at the exit of the interpreter.

    Raises:
        OSError: it cannot be written; what is left of it is dropped.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
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
