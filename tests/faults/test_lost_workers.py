"""Workers of a real Ray cluster that are killed, or stop answering: the run goes on, to the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.runs import run_folder
from cxr_dist.runs.heartbeat import HEARTBEATS
from tests.conftest import SMALL_RUN
from tests.training.test_loop import comparable

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
ROOT = Path(__file__).parents[2]
SETTINGS = [*SMALL_RUN, "stages.2.epochs=4", "features.cache=off", "checkpoint.max_overhead=0.5", "worker_timeout_s=60"]
LIMIT_S = 420.0
Popen = subprocess.Popen[str]


def start(dataset: Path, run: Path, workers: str = "2", settings: Sequence[str] = SETTINGS, **more: str) -> Popen:
    """The command, with the options `more`."""
    overrides = [part for each in settings for part in ("--set", each)]
    options = [part for name, value in more.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "cxr_dist", "train", str(dataset), "--out", str(run), "--workers", workers]
    command += [*options, *overrides]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: Popen) -> str:
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


def wait_until_in(run: Path, stage: int, epoch: int, process: Popen) -> dict[int, dict[str, Any]]:
    """What the workers tell of themselves, by rank, once the chief has said that it is there."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        events = run / run_folder.EVENTS
        for line in events.read_text().splitlines() if events.exists() else ():
            event = json.loads(line)
            if (event["kind"], event.get("stage"), event.get("epoch")) == ("progress", stage, epoch):
                told = [json.loads(path.read_text()) for path in (run / HEARTBEATS).glob("*.json")]
                return {each["rank"]: each for each in told}
        time.sleep(0.1)
    raise AssertionError("it never got there")


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(dataset, run))
    return comparable(run_folder.read_history(run))


@pytest.mark.parametrize(
    ("rank", "number", "stage"), [(1, signal.SIGKILL, 2), (0, signal.SIGKILL, 1), (1, signal.SIGSTOP, 2)]
)
def test_the_run_goes_on_without_the_user(
    dataset: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], rank: int, number: signal.Signals, stage: int
) -> None:
    run = tmp_path / "run"
    process = start(dataset, run)
    told = wait_until_in(run, stage, 2, process)
    os.kill(told[rank]["process"], number)
    out = finish(process)
    assert "warning: workers were lost" in out
    if number == signal.SIGSTOP:
        assert f"worker {rank} (process {told[rank]['process']}" in out, "the one to blame is named"
    result = run_folder.read_result(run)
    assert result is not None
    assert result["resumed_from"]
    assert result["steps_computed"] < (2 + 4) * 7
    rows = comparable(run_folder.read_history(run))
    assert [(row["stage"], row["epoch"]) for row in rows] == [(row["stage"], row["epoch"]) for row in undisturbed]
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [row[key] for row in rows], [row[key] for row in undisturbed], rtol=1e-2, err_msg=key
        )


def test_a_killed_driver_goes_on_when_it_is_started_again(
    dataset: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    process = start(dataset, run)
    wait_until_in(run, 2, 2, process)
    process.kill()
    process.wait(timeout=30)
    finish(start(dataset, run))
    rows = comparable(run_folder.read_history(run))
    assert [(row["stage"], row["epoch"]) for row in rows] == [(row["stage"], row["epoch"]) for row in undisturbed]
    result = run_folder.read_result(run)
    assert result is not None
    assert result["steps_computed"] < (2 + 4) * 7


def test_ctrl_c_is_no_success_and_says_how_to_go_on(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(dataset, run)
    wait_until_in(run, 2, 2, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, out
    assert "start the same command again to resume" in out
    assert run_folder.read_result(run) is None
    finish(start(dataset, run))
    result = run_folder.read_result(run)
    assert result is not None
    assert result["steps_computed"] < (2 + 4) * 7


@pytest.fixture(scope="module")
def undisturbed_s(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a run takes, from its command to its end."""
    begun = time.monotonic()
    finish(start(dataset, tmp_path_factory.mktemp("timed") / "run"))
    return time.monotonic() - begun


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_whoever_is_killed_at_any_moment(
    dataset: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], undisturbed_s: float, seed: int
) -> None:
    """The driver or a worker, from the first import to the last file: the same end, and no step twice but the lost."""
    rng = random.Random(seed)
    run = tmp_path / "run"
    process = start(dataset, run)
    time.sleep(rng.random() * undisturbed_s)
    workers = [json.loads(path.read_text())["process"] for path in (run / HEARTBEATS).glob("*.json")]
    killed = rng.choice([process.pid, *workers])
    had_checkpoint = any((run / run_folder.CHECKPOINTS).glob("epoch-*.safetensors"))
    was_done = run_folder.read_result(run) is not None
    who = "the driver" if killed == process.pid else "a worker"
    try:
        os.kill(killed, signal.SIGKILL)
    except ProcessLookupError:
        who = "nobody: the workers had ended"
    if who == "the driver":
        process.wait(timeout=30)
        process = start(dataset, run)
    finish(process)
    rows = comparable(run_folder.read_history(run))
    assert [(row["stage"], row["epoch"]) for row in rows] == [(row["stage"], row["epoch"]) for row in undisturbed]
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [row[key] for row in rows], [row[key] for row in undisturbed], rtol=1e-2, err_msg=key
        )
    result = run_folder.read_result(run)
    assert result is not None
    if not who.startswith("nobody") and had_checkpoint and not was_done:
        assert result["resumed_from"]
        assert result["steps_computed"] < (2 + 4) * 7
    print(f"killed {who}; went on from {result['resumed_from']}")


@pytest.mark.usefixtures("ray_stopped")
def test_a_run_grows_when_a_machine_joins(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--workers 1:2` on a machine with room for one, and then a second one: the same steps, none of them twice."""
    import ray
    from ray.cluster_utils import Cluster

    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        run = tmp_path / "run"
        settings = [*SETTINGS, "stages.2.epochs=400", "stages.2.early_stopping=400"]
        process = start(dataset, run, "1:2", settings, address=cluster.address)
        wait_until_in(run, 2, 2, process)
        cluster.add_node(num_cpus=1)
        told = wait_for_workers(run, 2, process)
        assert {each["rank"] for each in told} == {0, 1}
        (run / "stop").touch()
        out, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 143, out
        assert "machines have joined\nresuming with 2 workers" in out
        rows = run_folder.read_history(run)
        assert [row["epochs_done"] for row in rows] == list(range(1, len(rows) + 1))
        # The head's BatchNorm sees half a batch on each of two workers, so numbers of another worker count differ.
        assert all(np.isfinite(row["val_loss"]) and row["skipped_steps"] == 0 for row in rows)
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for_workers(run: Path, count: int, process: Popen) -> list[dict[str, Any]]:
    """What the workers tell of themselves, once there are so many and the chief has made a step with them."""
    until, known = time.monotonic() + LIMIT_S, -1
    while time.monotonic() < until and process.poll() is None:
        told = [json.loads(path.read_text()) for path in (run / HEARTBEATS).glob("*.json")]
        events = len((run / run_folder.EVENTS).read_text().splitlines())
        if len(told) == count:
            known = events if known < 0 else known
            if events > known and all("step" in each["where"] for each in told):
                return told
        time.sleep(0.2)
    raise AssertionError("there were never so many workers")
