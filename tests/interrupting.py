"""Commands in process groups of their own, to which Ctrl-C comes at chosen moments, as a terminal sends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 300
# The interpreter's own start, some hundredths of a second, is nobody's to protect: the moments are counted from here.
STARTED = """
from cxr_dist.runs.interrupt import exit_on_interrupt
exit_on_interrupt()
import os, signal, sys
os.write(2, b"started\\n")
"""
RUN = """
from cxr_dist.__main__ import main
main()
"""
AT_IMPORT = """
class Interrupting:
    count = 0
    def find_spec(self, *_arguments):
        self.count += 1
        if self.count == {number}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


def start(*arguments: object, code: str = "") -> "subprocess.Popen[str]":
    """`cxr-dist` with `arguments`, after `code`; returns when Ctrl-C is its own affair."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_CPP", "PYTHONUNBUF"))}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED + code + RUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    return process


def lines_of(process: "subprocess.Popen[str]") -> list[str]:
    """What it wrote to stderr, when it has ended."""
    try:
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return err.splitlines()


def duration(*arguments: object) -> float:
    """Of a command that nobody interrupts, in seconds from its start."""
    process = start(*arguments)
    begun = time.monotonic()
    lines = lines_of(process)
    assert process.returncode == 0, lines
    return time.monotonic() - begun


def interrupted_after(seconds: float, *arguments: object) -> tuple[int, list[str]]:
    """Status, as a shell gives it, and the lines on stderr."""
    process = start(*arguments)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # what has ended is a zombie until it is waited for
    lines = lines_of(process)
    # In its last moments, when Python's handlers are gone, the signal itself ends the process.
    return (process.returncode if process.returncode >= 0 else 128 - process.returncode), lines


def interrupted_at_import(number: int, *arguments: object) -> tuple[int, list[str]]:
    """The same at the `number`-th module that is looked for, in whatever that is part of."""
    process = start(*arguments, code=AT_IMPORT.format(number=number))
    lines = lines_of(process)
    return process.returncode, lines
