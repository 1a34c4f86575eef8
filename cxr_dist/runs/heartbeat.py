"""No worker waits for ever: one that gets nowhere is ended, and says who kept it waiting.

A collective of TensorFlow waits for the slowest worker without a limit of its own (its timeouts are for debugging), and
a worker that was stopped, or is cut off from the network, is slow for ever.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tfrecords_builder.common.files import write_whole

HEARTBEATS = "workers"
"""The folder in a run's folder with a file for each worker: that it lives, and where it is."""
EXIT_STATUS = 75
"""Of a worker that was ended: EX_TEMPFAIL, as another try may do better."""
INTERVAL_S = 2.0


class Watchdog:
    """Ends this process when no `heartbeat` has come for the time-out."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        timeout_s: float,
        *,
        interval_s: float = INTERVAL_S,
        end: Callable[[], None] = lambda: os._exit(EXIT_STATUS),
    ) -> None:
        self._folder, self._rank, self._end = folder, rank, end
        self._timeout_s, self._interval_s = timeout_s, interval_s
        self._last = time.monotonic()
        self._where = "its start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def heartbeat(self, where: str) -> None:
        """Say that there was progress, and where the worker goes from here, such as "stage 2, epoch 1, step 8"."""
        self._last, self._where = time.monotonic(), where

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            waited = time.monotonic() - self._last
            if waited < self._timeout_s:
                # A storage that fails now and then must not end the watch, nor keep it from ending a worker.
                with suppress(OSError):
                    self._write()
                continue
            reason = f"worker {self._rank} has been at {self._where} for {waited:.0f} s"
            try:
                with suppress(OSError, ValueError):
                    reason += f"; {silent_workers(self._folder, self._rank, self._interval_s)}"
                print(reason, file=sys.stderr, flush=True)
                with suppress(OSError):
                    self._write(ended=reason)
            finally:
                self._end()
            return

    def _write(self, **more: Any) -> None:
        content = {"rank": self._rank, "host": socket.gethostname(), "process": os.getpid(), "where": self._where}
        self._folder.mkdir(parents=True, exist_ok=True)
        # Renamed, so that it is read whole; not synced, as every worker writes one every 2 s and none outlives its run.
        path, text = self._folder / f"{self._rank:04d}.json", json.dumps(content | more)
        write_whole(path, lambda file: file.write(text.encode()), durable=False)


def silent_workers(folder: Path, rank: int, interval_s: float) -> str:
    """Which other workers have not been heard from lately, and else where the others are, in words.

    Ages are differences between times that the storage gave, so the clocks of the machines do not matter.
    """
    others = [
        f"worker {worker['rank']} is alive, at {worker['where']}"
        for worker, _ in _heartbeats(folder)
        if worker["rank"] != rank
    ]
    return "; ".join(_silent(folder, interval_s) or others) or "there is no other worker"


def exit_reasons(folder: Path, interval_s: float = INTERVAL_S) -> list[str]:
    """What the workers said that were ended; without such words, which ones fell silent before the others."""
    reasons = [worker["ended"] for worker, _ in _heartbeats(folder) if "ended" in worker]
    return reasons or _silent(folder, interval_s)


def _silent(folder: Path, interval_s: float) -> list[str]:
    heartbeats = _heartbeats(folder)
    newest = max((time_s for _, time_s in heartbeats), default=0.0)
    return [
        f"worker {worker['rank']} (process {worker['process']} on {worker['host']}) "
        f"is silent for {newest - time_s:.0f} s"
        for worker, time_s in heartbeats
        if newest - time_s > 3 * interval_s
    ]


def _heartbeats(folder: Path) -> list[tuple[dict[str, Any], float]]:
    """The last heartbeat of each worker, by rank, and its time in seconds of the storage's clock."""
    paths = sorted(folder.glob("*.json"))
    return [(json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime) for path in paths]
