"""What the comparison with plain Keras makes of the seconds it measured, and the baseline itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_dist.bench import common, features, plain_keras, scaling
from cxr_dist.bench.cost_model import Cluster, Measured
from cxr_dist.bench.features import Way
from cxr_dist.phantoms import write_phantoms
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError


def test_seconds_are_estimated_from_epochs_that_were_not_first() -> None:
    """Start 9 s and compiling 20 s once; then 4 epochs of 300 images at 10 and 100 at 20 images/s."""
    rows = [{"stage": 1, "train_seconds": seconds, "validation_seconds": 3.0} for seconds in (26.0, 6.0, 6.0)]
    plain = {"seconds": {"start": 9.0}, "history": [*rows, {"stage": 2, "train_seconds": 99, "validation_seconds": 99}]}
    assert features.estimated_seconds(plain, 60, 300, 100, epochs=4) == pytest.approx(9 + 20 + 4 * (30 + 5))


def test_the_table_says_how_often_ours_fits_into_theirs() -> None:
    lines = features.table([Way("plain Keras", 110.0, None, 2.5), Way(features.OURS, 10.0, 0.9, None)])
    assert "11.0" in lines[1]
    assert "2.50" in lines[1]
    assert "0.9000" in lines[2]
    assert "1.0" in lines[2]


@pytest.mark.nightly
def test_the_baseline_times_its_epochs(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", per_class=8, size=32)
    build_dataset(tmp_path / "phantoms", tmp_path / "dataset", BuildOptions(image_size=32))
    command = [sys.executable, str(Path(plain_keras.__file__)), str(tmp_path / "phantoms")]
    command += [str(tmp_path / "dataset" / "manifest.parquet"), "--out", str(tmp_path / "out.json")]
    command += ["--weights", "none", "--image-size", "32", "--batch-size", "4", "--steps", "1", "--epochs", "2", "0"]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["stage"] for row in found["history"]] == [1, 1]
    assert all(row["train_seconds"] > 0 and row["validation_seconds"] > 0 for row in found["history"])
    epochs = sum(row["train_seconds"] + row["validation_seconds"] for row in found["history"])
    assert found["history"][-1]["elapsed_seconds"] >= found["seconds"]["start"] + epochs, "since the command began"
    assert found["parameters"] == 24_122_500


# Scaling: from runs to a table


def test_runs_become_points() -> None:
    rows = [
        {"stage": stage, "images_per_second": rate, "trainable_parameters": 1000 * stage}
        for stage, full in {1: 16.0, 2: 8.0}.items()
        for rate in (full / 9, full, full)  # the first compiles
    ]
    measured = scaling.stages_of(common.Trained(9.0, {"workers": 2, "device": "CPU"}, rows), 32)
    assert [(row.stage, row.images_per_second, row.trainable_parameters) for row in measured] == [
        (1, 16.0, 1000),
        (2, 8.0, 2000),
    ]
    assert (measured[1].workers, measured[1].share, measured[1].step_seconds) == (2, 0.5, 4.0)


def test_the_table_of_scaling() -> None:
    measured = [
        Measured(2, workers, batch, rate, 20_000_000, "CPU")
        for workers, batch, rate in ((1, 32, 8.0), (1, 64, 8.0), (2, 32, 7.0), (2, 64, 7.5))
    ]
    fitted = scaling.fit_stages(measured)
    assert fitted[0].model.seconds_per_image == pytest.approx(1 / 8, rel=0.02)
    assert max(map(abs, fitted[0].held_out_errors)) < 0.05
    cluster = Cluster(name="six", machines=6, relative_speed=1, network_gigabits=10, storage_gigabytes=1)
    assert len(scaling.table(measured, fitted)) == 1 + 4 + 2
    lines = scaling.prediction_table(cluster, 3600, scaling.predict_stages(fitted, cluster, 3600, 50_000))
    assert [line.split()[1] for line in lines[-4:]] == ["1", "2", "4", "6"]


def test_what_a_child_command_says_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="see its message above"):
        common.train(tmp_path / "missing", tmp_path / "run", ["--launcher", "local"], ["stages.1.epochs=1"])
    with pytest.raises(subprocess.CalledProcessError):
        common.python(["-c", "raise SystemExit(3)"], {})
