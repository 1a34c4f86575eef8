"""Ctrl-C before a command has begun and after it has ended.

Imports nothing that the interpreter has not got by then, as until it is in place Ctrl-C is a traceback.
"""

import os
import signal
import sys

INTERRUPTED = 130
"""Exit status, as a shell gives it of a program that SIGINT has killed."""
RESUME = "start the same command again to resume"
"""What a user is told where that is so."""
_RESUMED = ("build", "demo", "download", "pipeline", "train", "tune")


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, for times at which nothing needs to be cleaned up, such as imports.

    An exception would not do: what becomes of it depends on the code that it meets, and some swallows all.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_now)


def exit_now(_number: int, _frame: object) -> None:
    """A handler of SIGINT."""
    say_interrupted(sys.argv[1:])
    exit_silently(_number, _frame)


def exit_silently(_number: int, _frame: object) -> None:
    """A handler of SIGINT for when the line has been written."""
    os._exit(INTERRUPTED)


def say_interrupted(arguments: list[str]) -> None:
    """One line for a command line with these arguments."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    line = f"interrupted; {RESUME}\n" if command in _RESUMED else "interrupted\n"
    try:
        os.write(2, line.encode())  # not by way of `sys.stderr`, which may be in the middle of something
    except OSError:
        return  # nobody reads it
