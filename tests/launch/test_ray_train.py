"""How a run of several workers goes on: whom it is told of, and with whom; the launches themselves are stood in for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.launch import ray_train
from cxr_dist.launch.placement import WorkerPlan
from cxr_dist.launch.ray_train import LostWorkersError, UnplacedError, launch_training
from cxr_dist.runs.stop_request import RegroupedError, StoppedError, StopRequest
from tfrecords_builder.common.errors import UserError

Launch = Callable[..., tuple[list[int], list[str]]]


def plan_of(workers: int) -> WorkerPlan:
    return WorkerPlan(workers, 1, "CPU", 1.0)


class Heard:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.texts.append(event["text"])


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Launch a run on `first` workers where each launch ends as told; the workers of each launch, and what was said."""

    def run(first: int, there: int, *ends: Exception | None) -> tuple[list[int], list[str]]:
        pending, workers, heard = list(ends), [], Heard()

        def launch(_worker: object, _arguments: object, plan: WorkerPlan, _run: Path) -> None:
            workers.append(plan.workers)
            end = pending.pop(0)
            if end is not None:
                raise end

        monkeypatch.setattr(ray_train, "launch", launch)
        monkeypatch.setattr(ray_train, "_result", lambda _run: {})
        config = load_config(None, [])
        plans = (plan_of(first), lambda: plan_of(there), heard)
        launch_training(config, "dataset", tmp_path, *plans, name="run", grows=True)
        assert not pending
        return workers, heard.texts

    return run


def test_a_run_grows_and_goes_on(launched: Launch) -> None:
    workers, said = launched(2, 4, RegroupedError(""), None)
    assert workers == [2, 4]
    assert said == ["machines have joined: going on with 4 workers"]


def test_a_machine_that_is_taken_by_other_work_costs_a_restart_and_not_the_run(launched: Launch) -> None:
    workers, said = launched(2, 4, RegroupedError(""), UnplacedError("busy"), None)
    assert workers == [2, 4, 2]
    assert said[-1] == "no room for more: going on with 2 workers"


def test_losses_before_a_growth_do_not_count_with_those_after(launched: Launch) -> None:
    lost = LostWorkersError("gone")
    workers, _ = launched(2, 2, lost, lost, lost, RegroupedError(""), lost, lost, lost, None)
    assert len(workers) == 8
    with pytest.raises(UserError, match="workers were lost 4 times"):
        launched(2, 2, lost, lost, lost, lost)


def test_it_asks_until_it_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there has been more room twice in a row, and again where the request was lost; never against a stop."""
    import time

    monkeypatch.setattr(ray_train, "GROWTH_INTERVAL_S", 0.01)
    stop, answers = StopRequest(tmp_path), iter([plan_of(2), plan_of(3), plan_of(2), *[plan_of(3)] * 10_000])
    seen = []

    def plan_again() -> WorkerPlan:
        seen.append(stop.is_made())
        if len(seen) == 2:
            raise UserError("no answer now")
        return next(answers)

    def wait_for_a_request() -> None:
        until = time.monotonic() + 20
        while not stop.is_made():
            assert time.monotonic() < until
            time.sleep(0.01)

    with ray_train._asking_to_grow(tmp_path, plan_of(2), plan_again, Heard()):
        wait_for_a_request()
        assert not any(seen[:5])
        assert stop.take() is RegroupedError
        wait_for_a_request()
        stop.make()
        time.sleep(0.1)
        assert stop.take() is StoppedError, "whoever wants the end is heard"


def test_a_look_that_fails_is_told_once_and_tried_again() -> None:
    """Without an end of its thread, whatever the failure, and also where telling it fails."""
    import threading

    enough, heard, calls = threading.Event(), Heard(), 0

    def look() -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            enough.set()
        if calls in (5, 8):
            return
        raise KeyError("other" if calls > 8 else "missing")

    with ray_train._every(0.001, look, "growth", heard):
        assert enough.wait(20)
    missing, other = "growth: KeyError: 'missing'; trying again", "growth: KeyError: 'other'; trying again"
    assert heard.texts == [missing, missing, other]
    calls = 0
    enough.clear()
    with ray_train._every(0.001, look, "growth", None):  # type: ignore[arg-type]
        assert enough.wait(20)
