"""How a run of several workers resumes: after losses, with more workers, and when it asks for them."""

from pathlib import Path
from typing import Any

import pytest

from cxr_dist import compat
from cxr_dist.launch import ray_train
from cxr_dist.launch.placement import WorkerPlan
from cxr_dist.launch.restarts import REPLACEMENT_LIMIT_S, LostWorkersError, Restart, RestartPolicy, UnplacedError
from cxr_dist.runs.stop_request import RegroupedError, StoppedError, StopRequest
from tfrecords_builder.common.errors import UserError


def plan_of(workers: int) -> WorkerPlan:
    return WorkerPlan(workers, 1, "CPU", 1.0)


class Heard:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.texts.append(event["text"])


def resumed(
    policy: RestartPolicy, error: Exception, *, workers: int = 2, progressed: bool = False, now: float = 0.0
) -> Restart:
    return policy.after(error, plan_of(workers), has_progressed=progressed, reasons=["said"], now=now)


def test_a_run_grows_to_what_the_cluster_has(tmp_path: Path) -> None:
    restart = resumed(RestartPolicy(tmp_path, may_grow=True), RegroupedError(""), now=5.0)
    assert restart == Restart({"kind": "message", "text": "machines have joined"}, None, 5.0 + REPLACEMENT_LIMIT_S)


def test_a_machine_that_is_taken_by_other_work_costs_a_restart_and_not_the_run(tmp_path: Path) -> None:
    policy = RestartPolicy(tmp_path, may_grow=True)
    resumed(policy, RegroupedError(""), workers=2)
    restart = resumed(policy, UnplacedError("busy"), workers=4)
    assert restart.plan == plan_of(2)
    assert not policy.may_grow, "the cluster has no room for more: it is not tried again"
    with pytest.raises(UnplacedError, match="busy"):
        resumed(policy, UnplacedError("busy"), workers=2, now=1.0)


def test_losses_count_from_the_last_checkpoint_and_the_last_growth(tmp_path: Path) -> None:
    policy, lost = RestartPolicy(tmp_path, may_grow=True), LostWorkersError("gone")
    for error in [lost, lost, lost, RegroupedError(""), lost, lost, lost]:
        resumed(policy, error)
    restart = resumed(policy, lost, progressed=True)
    assert restart.event == {"kind": "warning", "text": "workers were lost (gone; said)"}
    resumed(policy, lost)
    resumed(policy, lost)
    with pytest.raises(UserError, match=r"workers were lost 4 times with no checkpoint between \(gone; said\)"):
        resumed(policy, lost)


def test_after_a_loss_the_cluster_gets_time_to_replace_machines(tmp_path: Path) -> None:
    policy = RestartPolicy(tmp_path, may_grow=False)
    deadline = resumed(policy, LostWorkersError("gone"), now=10.0).deadline
    assert deadline == 10.0 + REPLACEMENT_LIMIT_S
    assert resumed(policy, UnplacedError("busy"), now=deadline) == Restart(None, None, deadline)
    with pytest.raises(UnplacedError, match="busy"):
        resumed(policy, UnplacedError("busy"), now=deadline + 1)
    with pytest.raises(UnplacedError, match="busy"):
        resumed(RestartPolicy(tmp_path, may_grow=False), UnplacedError("busy"))


def test_names_of_ray_that_are_not_public_are_there_and_a_lost_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(issubclass(error, Exception) for error in compat.ray_lost_worker_errors())
    assert issubclass(compat.ray_startup_timeout_error(), Exception)
    monkeypatch.setattr("ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError", None)
    monkeypatch.delattr("ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError")
    with pytest.raises(UserError, match=r"^ray 2\..*WorkerGroupStartupTimeoutError.*install ray"):
        compat.ray_startup_timeout_error()


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
        until = time.monotonic() + 90
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
        assert enough.wait(120)
    missing, other = "growth: KeyError: 'missing'; trying again", "growth: KeyError: 'other'; trying again"
    assert heard.texts == [missing, missing, other]
    calls = 0
    enough.clear()
    with ray_train._every(0.001, look, "growth", None):  # type: ignore[arg-type]
        assert enough.wait(120)
