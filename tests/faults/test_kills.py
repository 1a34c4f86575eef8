"""Runs that are killed at random moments, again and again, end as one that nobody disturbed: to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.runs import checkpoint_file, checkpoints, run_folder
from tests.training.test_loop import comparable

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "deterministic=true",
    "precision=float32",
    "global_batch_size=8",
    "model.weights=none",
    "features.cache=on",
    "stages.1.epochs=3",
    "stages.2.epochs=4",
    "stages.2.optimizer=adam",
    "stages.2.augment=true",
    "stages.2.unfreeze_layers=20",
    "checkpoint.max_overhead=0.5",
]
STEPS = 7 * 7
LIMIT_S = 180.0


def start(dataset: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.child", str(dataset), str(run), *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


@dataclass(frozen=True)
class Ended:
    result: dict[str, Any]
    history: list[dict[str, Any]]
    weights: checkpoint_file.Arrays
    lines: int


def finish(dataset: Path, run: Path) -> Ended:
    out, err = "", ""
    process = start(dataset, run)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return ended(run, len(out.splitlines()))


def ended(run: Path, lines: int) -> Ended:
    """What a finished run left, and the final state, which its process copied from the last checkpoint."""
    assert not list((run / run_folder.CHECKPOINTS).iterdir())
    assert (run / run_folder.MODEL).is_file()
    arrays, _ = checkpoint_file.load_arrays(run.parent / "last.safetensors")
    result = run_folder.read_result(run)
    assert result is not None
    return Ended(result, comparable(run_folder.read_history(run)), arrays, lines)


def kill_after(process: subprocess.Popen[str], lines: int, further_s: float) -> bool:
    """Whether the process was still there to be killed."""
    assert process.stdout is not None
    for _ in range(lines):
        if not process.stdout.readline():
            break
    time.sleep(further_s)
    process.send_signal(signal.SIGKILL)
    return process.wait(timeout=LIMIT_S) == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    found = finish(dataset, tmp_path_factory.mktemp("undisturbed") / "run")
    assert found.result["steps_computed"] == STEPS
    assert found.result["resumed_from"] is None
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kills", "seed"), [(2, 2), (40, 3)])
@pytest.mark.nightly
def test_killed_at_random_moments(dataset: Path, tmp_path: Path, undisturbed: Ended, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    done, finished, resumed = 0, 0, 0
    while done < kills:
        folder = tmp_path / str(finished)
        for _ in range(rng.randint(1, 4)):  # of one run, before it is left in peace
            process = start(dataset, folder / "run")
            done += kill_after(process, rng.randrange(undisturbed.lines), rng.random() * 0.5)
        had = bool(list(folder.glob("run/checkpoints/epoch-*.safetensors")))
        was_done = (folder / "run" / run_folder.RESULT).exists()
        found = finish(dataset, folder / "run")
        assert found.history == undisturbed.history
        assert found.weights.keys() == undisturbed.weights.keys()
        for name, value in undisturbed.weights.items():
            np.testing.assert_array_equal(found.weights[name], value, err_msg=name)
        assert found.result["best"] == undisturbed.result["best"]
        if had and not was_done:
            resumed += 1
            assert found.result["resumed_from"]
            assert found.result["steps_computed"] < STEPS
        assert not list(folder.rglob("*.tmp")), "what a killed writer left is removed"
        finished += 1
        shutil.rmtree(folder)
    assert resumed or kills == 1, "a single kill may come before the first checkpoint"
    print(f"{done} kills, {finished} runs, of which {resumed} went on from a checkpoint")


@pytest.mark.nightly
def test_a_notice_leads_to_a_checkpoint_of_that_moment(dataset: Path, tmp_path: Path, undisturbed: Ended) -> None:
    run = tmp_path / "run"
    process = start(dataset, run)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("progress 2 2 "):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert "StoppedError" in err
    assert "stopped with a checkpoint" in err
    position = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS).newest_position()
    assert position is not None
    assert position >= checkpoints.Position(4)
    assert not (run / "stop").exists()
    found = finish(dataset, run)
    assert found.history == undisturbed.history
    assert found.result["steps_computed"] == STEPS - 7 * position.epochs_done - position.step
    assert json.loads((run / "result.json").read_text())["resumed_from"] == position.file_name
