"""Requests to end a run: none is lost, and no timer or handler of somebody else is touched."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cxr_dist.runs import stop_request
from cxr_dist.runs.stop_request import RegroupedError, StoppedError, StopRequest, stopped_by_sigterm

# Requests


def interrupted_at(call: int, act: Callable[[], object], then: Callable[[], object]) -> bool:
    """Run `act`, and `then` just before its `call`-th system call on a path; whether it has so many."""
    patch, count, busy = pytest.MonkeyPatch(), itertools.count(), False

    def wrapped(original: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal busy
            if not busy and next(count) == call:
                busy = True
                then()
                busy = False
            return original(*arguments, **options)

        return run

    with patch.context() as scope:
        for name in ("open", "stat", "unlink", "replace", "rename", "link", "utime"):
            scope.setattr(os, name, wrapped(getattr(os, name)))
        act()
    return next(count) > call


ACTIONS: dict[str, Callable[[StopRequest], object]] = {
    "more workers": lambda request: request.make(for_more_workers=True),
    "take": lambda request: request.take(),
    "stop": lambda request: request.make(),
}


def record(results: list[object], act: Callable[[StopRequest], object], request: StopRequest) -> None:
    results.append(act(request))


@pytest.mark.parametrize("before", [(), ("more workers",)], ids=str)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_stop_is_never_lost(action: str, before: tuple[str, ...], tmp_path: Path) -> None:
    """Made at whatever moment of another request, or of the run that takes one, it is taken then or afterwards."""
    for call in itertools.count():
        run = tmp_path / str(call)
        run.mkdir()
        request = StopRequest(run)
        for name in before:
            ACTIONS[name](request)
        results: list[object] = []
        more = interrupted_at(call, partial(record, results, ACTIONS[action], request), StopRequest(run).make)
        taken = [*results, request.take()]
        assert (StoppedError in taken) == (more or action == "stop")
        if not more:
            assert call > 0, "no moment was tried"
            break


def test_what_was_asked_for(tmp_path: Path) -> None:
    request = StopRequest(tmp_path)
    assert not request.is_made()
    assert request.take() is None
    request.make(for_more_workers=True)
    assert request.is_made()
    assert request.take() is RegroupedError
    assert not request.is_made()
    for order in itertools.permutations([True, False]):
        for for_more_workers in order:
            request.make(for_more_workers=for_more_workers)
        assert request.take() is StoppedError, "whoever wants the end is heard first"
        request.clear()
        assert not list(tmp_path.iterdir())


# Signals


@pytest.fixture
def others_timer() -> Iterator[list[int]]:
    """An alarm of somebody else, minutes ahead, with a handler of its own; what it was called with."""
    rang: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _frame: rang.append(number))
    before = signal.setitimer(signal.ITIMER_REAL, 600.0)
    yield rang
    signal.setitimer(signal.ITIMER_REAL, *before)
    signal.signal(signal.SIGALRM, handler)


def test_the_timers_of_others_go_on(others_timer: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run ends by itself, is asked to and does, or is late."""
    threads = set(threading.enumerate())
    alarm, term = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)
    with stopped_by_sigterm(tmp_path):
        pass
    with stopped_by_sigterm(tmp_path):
        signal.raise_signal(signal.SIGTERM)
        assert StopRequest(tmp_path).is_made()
        assert signal.getsignal(signal.SIGALRM) is alarm
    monkeypatch.setattr(stop_request, "NOTICE_LIMIT_S", 0.01)

    def be_late() -> None:
        with stopped_by_sigterm(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            threading.Event().wait(120)  # a main thread in a system call is woken
            pytest.fail("it was not ended")

    with pytest.raises(StoppedError, match="without a new checkpoint"):
        be_late()
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getsignal(signal.SIGTERM) is term
    assert others_timer == []
    assert set(threading.enumerate()) <= threads, "of others some may have ended"


def test_a_run_that_ends_as_its_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either it was late, or it was done; never is SIGTERM left for the handler that was there before."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        for delay in range(60):
            monkeypatch.setattr(stop_request, "NOTICE_LIMIT_S", 0.001)
            try:
                with stopped_by_sigterm(tmp_path):
                    signal.raise_signal(signal.SIGTERM)
                    until = time.monotonic() + delay * 5e-5
                    while time.monotonic() < until:
                        pass
            except StoppedError:
                continue
        assert heard == []
    finally:
        signal.signal(signal.SIGTERM, before)
