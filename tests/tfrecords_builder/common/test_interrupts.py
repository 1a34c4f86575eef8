"""Processes that are started for work never see Ctrl-C: from their first moment, so that imports are covered too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tfrecords_builder.common.pool import Pool

# A process of its own, so that the child is the first one that multiprocessing starts.
FIRST_CHILD = """
import multiprocessing
from tests.tfrecords_builder.common.test_interrupts import tell
from tfrecords_builder.common.interrupts import interrupts_held
context = multiprocessing.get_context("spawn")
process = context.Process(target=tell)
with interrupts_held():
    process.start()
process.join()
"""


def is_blocked(_task: object) -> bool:
    """In a worker, whose mask nothing has changed since its start."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def tell() -> None:
    print(is_blocked(None), flush=True)


def test_processes_of_the_pool() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with Pool(2) as pool:
        assert list(pool.map(is_blocked, [1, 2, 3, 4])) == [True] * 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


def test_the_first_process_of_all() -> None:
    """Before it multiprocessing starts its tracker, and Python 3.11 then lets signals through."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", FIRST_CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    assert done.stdout == "True\n", done.stderr


THREAD = """
import os, signal, threading, time
from tfrecords_builder.common.interrupts import interrupts_held

threading.Thread(target=time.sleep, args=(300,), daemon=True).start()  # it takes the signal that this thread blocks
try:
    with interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100_000):
            pass
        print("the context ended", flush=True)
    time.sleep(60)  # where that thread is slow to take it
except KeyboardInterrupt:
    print("then the interrupt came", flush=True)
"""


def test_an_interrupt_that_another_thread_takes_waits_too() -> None:
    done = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["the context ended", "then the interrupt came"], done.stderr
