"""Searches in real processes, with trials that fail in every way, and with the search itself killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxr_dist.tuning.experiment import BEST, PAGE, Experiment, best_run
from cxr_dist.tuning.page import write_page
from tests.integration.workers import FAULTS, small_search

DROPOUT = "model.dropout"
COMPLETE = [0.05, 0.5]
QUICK_FAULTS = [0.1, 0.3]
REASONS = {
    "raises": "a fault of two lines",
    "diverges": "diverged",
    "is killed": "signal 9",
    "leaves": "status 9",
    "hangs": "exceeded its time limit of 1 s",
}


@pytest.fixture(
    scope="module", params=[QUICK_FAULTS, pytest.param(list(FAULTS), marks=pytest.mark.nightly)], ids=["few", "all"]
)
def choices(request: pytest.FixtureRequest) -> list[float]:
    """Dropout rates: those of trials that fail, then those of trials that end."""
    return [*request.param, *COMPLETE]


@pytest.fixture(scope="module")
def faulty(choices: list[float], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A search of the head in which all but two fail, each in its own way."""
    out = tmp_path_factory.mktemp("search") / "experiment"
    return small_search(dataset, out, {DROPOUT: {"choices": choices}})


def test_a_failed_trial_is_named_and_the_others_end(faulty: Experiment, choices: list[float]) -> None:
    trials = {trial.values[DROPOUT]: trial for trial in faulty.trials()}
    assert trials.keys() == set(choices)
    for value, trial in trials.items():
        assert trial.state == ("complete" if value in COMPLETE else "failed")
        assert value in COMPLETE or REASONS[FAULTS[value]] in str(trial.reason)


def test_a_search_leaves_its_table_its_best_and_a_page(faulty: Experiment, choices: list[float]) -> None:
    table = pq.read_table(faulty.folder / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == list(range(len(choices)))
    complete = [row for row in table if row["state"] == "complete"]
    best = json.loads((faulty.folder / BEST).read_text())
    assert best["metrics"]["val_accuracy"] == max(row["val_accuracy"] for row in complete)
    assert best["config"]["model"]["dropout"] == best["values"][DROPOUT]
    assert best_run(faulty.folder).samefile(faulty.folder / best["run"])
    assert (faulty.folder / best["checkpoint"]).is_file()
    assert (faulty.folder / best["model"]).is_file()
    write_page(faulty)
    page = (faulty.folder / PAGE).read_text()
    assert "a fault of two lines" in page
    assert page.count("<figure>") == 3


def test_tensorboard_reads_what_a_trial_set_and_how_it_went(faulty: Experiment) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorboard.util.tensor_util import make_ndarray

    run = best_run(faulty.folder)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    shown = [float(make_ndarray(event.tensor_proto)) for event in events.Tensors("val_accuracy")]
    assert shown == pytest.approx([row["val_accuracy"] for row in history])
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    best = json.loads((faulty.folder / BEST).read_text())
    assert started.hparams[DROPOUT].number_value == best["values"][DROPOUT]


def test_a_finished_search_started_again_runs_nothing(faulty: Experiment, choices: list[float], dataset: Path) -> None:
    before = faulty.trials()
    small_search(dataset, faulty.folder, {DROPOUT: {"choices": choices}})
    assert faulty.trials() == before


SCRIPT = """
import sys
from pathlib import Path
from tests.integration.workers import small_search
if __name__ == "__main__":
    dataset, out = map(Path, sys.argv[1:])
    small_search(dataset, out, {parameters}, stage_2_epochs=12)
"""


@pytest.mark.nightly
def test_a_killed_search_goes_on_where_it_was(dataset: Path, tmp_path: Path) -> None:
    parameters = {"stages.2.learning_rate": {"choices": [1e-4, 2e-4, 3e-4, 4e-4]}, DROPOUT: {"choices": [0.0]}}
    out = tmp_path / "experiment"
    experiment = Experiment(out)
    script = tmp_path / "search.py"
    script.write_text(SCRIPT.replace("{parameters}", repr(parameters)))
    command = [sys.executable, str(script), str(dataset), str(out)]
    driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    until = time.monotonic() + 240
    try:
        while not _two_are_in_stage_2(experiment):
            assert driver.poll() is None, "the search ended before it could be killed"
            assert time.monotonic() < until, "no two trials came to stage 2"
            time.sleep(0.1)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = {trial.number: trial for trial in experiment.trials()}
    done = [trial for trial in before.values() if trial.state == "complete"]
    begun = [trial for trial in before.values() if trial.state == "running"]
    assert len(begun) == 2
    small_search(dataset, out, parameters, stage_2_epochs=12)
    after = {trial.number: trial for trial in experiment.trials()}
    assert len(after) == 4
    assert {trial.state for trial in after.values()} == {"complete"}
    assert all(after[trial.number] == trial for trial in done), "a finished trial ran again"
    assert [after[trial.number].attempts for trial in begun] == [2, 2]
    results = [experiment.result(trial).result for trial in after.values()]
    assert all(len(experiment.result(trial).history) == 14 for trial in after.values())
    # One trial alone ran the first stage: 56 images in batches of 8, two epochs.
    assert sum(result["resumed_from"] is not None for result in results if result) >= 3
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert sorted(row["attempts"] for row in table) == sorted(trial.attempts for trial in after.values())


def _two_are_in_stage_2(experiment: Experiment) -> bool:
    if not (experiment.folder / "trials").is_dir():
        return False
    running = [trial for trial in experiment.trials() if trial.state == "running"]
    return len(running) == 2 and all(len(experiment.result(trial).history) >= 3 for trial in running)
