"""A worker that gets nowhere is ended, and names whom it waited for."""

import os
import threading
import time
from pathlib import Path

import pytest

from cxr_dist.runs.heartbeat import Watchdog, exit_reasons, silent_workers


def test_it_ends_what_makes_no_progress_and_nothing_else(tmp_path: Path) -> None:
    ended = threading.Event()
    with (
        Watchdog(tmp_path, 0, 0.5, interval_s=0.02, end=ended.set) as hung,
        Watchdog(tmp_path, 1, 0.5, interval_s=0.02, end=lambda: os.abort()) as busy,
    ):
        hung.heartbeat("stage 2, epoch 1, step 8")
        until = time.monotonic() + 20
        while not ended.is_set():
            assert time.monotonic() < until, "it never ended"
            busy.heartbeat("stage 2, epoch 1, step 16")
            time.sleep(0.02)
    (reason,) = exit_reasons(tmp_path)
    assert reason.startswith("worker 0 has been at stage 2, epoch 1, step 8 for ")
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


def test_a_storage_that_fails_keeps_it_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one failure while all is well, nor one when the worker has to go."""
    from cxr_dist.runs import heartbeat

    ended, failures = threading.Event(), []

    def fail(*_arguments: object, **_named: object) -> None:
        failures.append(time.monotonic())
        raise OSError(116, "Stale file handle")

    with Watchdog(tmp_path, 0, 0.3, interval_s=0.02, end=ended.set) as dog:
        monkeypatch.setattr(heartbeat, "write_whole", fail)
        monkeypatch.setattr(heartbeat, "_heartbeats", fail)
        for _ in range(10):
            dog.heartbeat("stage 1, epoch 1, step 1")
            time.sleep(0.02)
        assert failures
        assert not ended.is_set()
        assert ended.wait(20)


def test_heartbeats_wait_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of workers beat every two seconds; each beat is whole, and none is synced."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Watchdog(tmp_path / "run" / "workers", 3, 60.0, interval_s=0.005) as dog:
        until, modified = time.monotonic() + 20, set[int]()
        while len(modified) < 5:
            assert time.monotonic() < until, "it does not beat"
            dog.heartbeat("step 1")
            modified.add((tmp_path / "run" / "workers" / "0003.json").stat().st_mtime_ns)
            assert "worker 3 is alive, at " in silent_workers(tmp_path / "run" / "workers", 0, 60.0)
    assert synced == []
    assert [path.name for path in (tmp_path / "run" / "workers").iterdir()] == ["0003.json"]
