"""What the race to an accuracy makes of two trainings, and that both are timed from their commands' starts."""

import json
from pathlib import Path

import pytest

from cxr_dist.bench import accuracy
from cxr_dist.bench.accuracy import OURS, PLAIN, Course, Epoch
from cxr_dist.cli.main import main
from cxr_dist.runs import run_folder


def course(name: str, seed: int, *epochs: tuple[float, float]) -> Course:
    return Course(name, seed, tuple(Epoch(seconds, 1, accuracy) for seconds, accuracy in epochs))


def test_the_first_epoch_that_is_as_good_counts() -> None:
    found = course(OURS, 0, (10, 0.5), (20, 0.9), (30, 0.8), (40, 0.95))
    assert found.best == 0.95
    assert [found.seconds_to(value) for value in (0.4, 0.5, 0.6, 0.9, 0.91, 0.951)] == [10, 10, 20, 20, 40, None]


def test_the_table_compares_with_when_plain_keras_had_its_best() -> None:
    plain = course(PLAIN, 0, (300, 0.8), (600, 0.92), (900, 0.91))
    lines = accuracy.table([plain, course(OURS, 0, (50, 0.9), (200, 0.92)), course(OURS, 1, (60, 0.93))])
    assert "plain Keras reaches its best, 0.9200, after 600 s" in lines[-4]
    assert "seed 0: 200 s, 3.00x" in lines[-3]
    assert "seed 1: 60 s, 10.00x" in lines[-2]
    assert "median of the seeds: 4.62 times faster" in lines[-1]


def test_a_seed_that_never_gets_there_is_not_left_out_of_a_median() -> None:
    plain = course(PLAIN, 0, (600, 0.92))
    lines = accuracy.table([plain, course(OURS, 0, (200, 0.92)), course(OURS, 1, (60, 0.91))])
    assert "seed 1: not reached (best 0.9100)" in lines[-1]
    assert not any("median" in line for line in lines)


def test_what_a_run_does_not_count_itself_came_before_it() -> None:
    """Of 100 s the run knows 80: 20 s of imports and building belong to every epoch."""
    rows = [
        {"run_seconds": 30.0, "stage": 1, "val_accuracy": 0.5},
        {"run_seconds": 75.0, "stage": 2, "val_accuracy": 0.6},
    ]
    assert accuracy.our_epochs(rows, {"seconds": {"total": 80.0}}, 100.0) == (Epoch(50.0, 1, 0.5), Epoch(95.0, 2, 0.6))


def test_a_run_says_when_its_epochs_ended(finished_run: Path) -> None:
    result = run_folder.read_result(finished_run)
    assert result is not None
    ends = [row["run_seconds"] for row in run_folder.read_history(finished_run)]
    assert 0 < ends[0] < ends[1] < ends[2] < result["seconds"]["total"]
    assert 1e8 < result["peak_memory_bytes"] < 1e11


def test_growth_through_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes of noise, the smallest first, each trained on by a command of its own."""
    from cxr_dist.bench import common, growth

    trained = []

    def train(dataset: Path, run: Path, _arguments: object, settings: list[str]) -> common.Trained:
        trained.append(settings)
        images = int(run.parent.name)
        assert (dataset / "manifest.parquet").is_file()
        rows = [{"seconds": seconds} for seconds in (99.0, images / 10, images / 10)]
        return common.Trained(1.0, {"peak_memory_bytes": 1_000_000 * images}, rows)

    monkeypatch.setattr(common, "train", train)
    assert growth.EPOCHS == 3
    main(["bench", "growth", "--sizes", "80", "40", "--json"])
    sizes = json.loads(capsys.readouterr().out)["figures"]
    assert [(size["images"], size["epoch_seconds"]) for size in sizes] == [(40, 4.0), (80, 8.0)]
    assert [size["peak_memory_bytes"] for size in sizes] == [40_000_000, 80_000_000]
    assert all("features.cache=off" in settings for settings in trained)
