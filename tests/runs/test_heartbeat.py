"""A worker that gets nowhere is ended, and names whom it waited for."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_dist.runs import heartbeat
from cxr_dist.runs.heartbeat import Watchdog, exit_reasons, silent_workers

LIMIT_S = 120.0
"""For what another thread does at once on a machine that is not busy."""


class Clock:
    """In place of the module `time` of the watchdogs: theirs goes on when a test says so, and not while it waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(heartbeat, "time", made)
    return made


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_ends_what_makes_no_progress_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    ended, wrong = threading.Event(), threading.Event()
    with (  # who has not written for three intervals is silent
        Watchdog(tmp_path, 0, 60.0, interval_s=0.5, end=ended.set) as hung,
        Watchdog(tmp_path, 1, 60.0, interval_s=0.5, end=wrong.set) as busy,
    ):
        hung.heartbeat("stage 2, epoch 1, step 8")
        clock.now += 59.0
        busy.heartbeat("stage 2, epoch 1, step 16")
        wait_until(lambda: "step 16" in (tmp_path / "0001.json").read_text())
        assert not ended.is_set()
        clock.now += 2.0
        assert ended.wait(LIMIT_S)
    assert not wrong.is_set()
    (reason,) = exit_reasons(tmp_path)
    assert reason.startswith("worker 0 has been at stage 2, epoch 1, step 8 for 61 s")
    assert reason.endswith("worker 1 is alive, at stage 2, epoch 1, step 16")


def test_who_is_silent_is_told_by_the_clock_of_the_storage(tmp_path: Path) -> None:
    for rank in range(3):
        with Watchdog(tmp_path, rank, 60.0) as dog:
            dog.heartbeat(f"step {rank}")
    now = (tmp_path / "0000.json").stat().st_mtime
    os.utime(tmp_path / "0001.json", (now - 10, now - 10))
    os.utime(tmp_path / "0002.json", (now - 100, now - 100))
    said = silent_workers(tmp_path, 0, 5.0)
    assert silent_workers(tmp_path, 2, 5.0) == said, "whoever asks"
    assert "worker 2 (process" in said
    assert "is silent for 100 s" in said
    assert "worker 1" not in said
    assert exit_reasons(tmp_path, 5.0) == [said]


def test_a_storage_that_fails_keeps_it_from_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one failure while all is well, nor one when the worker has to go."""
    ended, failures = threading.Event(), []

    def fail(*_arguments: object, **_named: object) -> None:
        failures.append(clock.now)
        raise OSError(116, "Stale file handle")

    with Watchdog(tmp_path, 0, 60.0, interval_s=0.02, end=ended.set):
        monkeypatch.setattr(heartbeat, "write_whole", fail)
        monkeypatch.setattr(heartbeat, "_heartbeats", fail)
        wait_until(lambda: len(failures) >= 3)
        assert not ended.is_set()
        clock.now += 60.0
        assert ended.wait(LIMIT_S)


def test_heartbeats_wait_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of workers beat every two seconds; each beat is whole, and none is synced."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Watchdog(tmp_path / "run" / "workers", 3, 600.0, interval_s=0.005) as dog:
        until, modified = time.monotonic() + LIMIT_S, set[int]()
        while len(modified) < 5:
            assert time.monotonic() < until, "it does not beat"
            dog.heartbeat("step 1")
            modified.add((tmp_path / "run" / "workers" / "0003.json").stat().st_mtime_ns)
            assert "worker 3 is alive, at " in silent_workers(tmp_path / "run" / "workers", 0, 60.0)
    assert synced == []
    assert [path.name for path in (tmp_path / "run" / "workers").iterdir()] == ["0003.json"]
