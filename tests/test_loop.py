"""A whole run in this process: what it leaves, that it goes on, and that the cached features change nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist import run_folder
from cxr_dist.commands import run_training
from cxr_dist.config import Config, load_config
from tests.conftest import SMALL_RUN
from tfrecords_builder.errors import UserError


def history(run: Path) -> list[dict[str, Any]]:
    return run_folder.read_history(run)


def small(*changes: str) -> Config:
    return load_config(None, [*SMALL_RUN, *changes])


def test_what_a_run_leaves(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert result["launcher"] == "local"
    assert result["parameters"] == 24_122_500
    assert result["steps_computed"] == 3 * (56 // 8)
    assert [(row["stage"], row["epoch"]) for row in history(finished_run)] == [(1, 1), (1, 2), (2, 1)]
    best = max(history(finished_run), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (result["best"]["stage"], result["best"]["epoch"]) == (best["stage"], best["epoch"])
    assert load_config(finished_run / "config.yaml").stages[2].learning_rate == 1e-4
    assert not list(finished_run.rglob("*.tmp*"))


def test_a_finished_run_is_left_alone(finished_run: Path, dataset: Path) -> None:
    before = (finished_run / "result.json").read_bytes()
    run_training(small(), dataset, finished_run, launcher="local")
    assert (finished_run / "result.json").read_bytes() == before


def test_other_settings_need_another_folder(finished_run: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match=r"seed 0, not 1"):
        run_training(small("seed=1"), dataset, finished_run, launcher="local")


def test_an_interrupted_run_goes_on_to_the_same_end(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    """Stopped after stage 1's first epoch: the rest follows the undisturbed run's curve."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for name in ("result.json", "model.keras", "history.jsonl"):
        (run / name).unlink()
    kept = sorted((run / "checkpoints").glob("epoch-*.npz"))
    assert [path.name for path in kept] == ["epoch-00002.npz", "epoch-00003.npz"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])  # a damaged newest one is passed over
    result = run_training(small(), dataset, run, launcher="local")
    assert result["resumed_from"] == "epoch-00002.npz"
    assert result["steps_computed"] == 7
    whole, resumed = history(finished_run), history(run)
    assert [(row["stage"], row["epoch"]) for row in resumed] == [(row["stage"], row["epoch"]) for row in whole]
    np.testing.assert_allclose([row["loss"] for row in resumed], [row["loss"] for row in whole], atol=1e-3)


def test_cached_features_change_no_number(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    """The curve of stage 1 from features computed once is that from images, within float tolerance."""
    config = small("features.cache=off", "stages.2.epochs=0", "model.dropout=0")
    cached = small("features.cache=on", "stages.2.epochs=0", "model.dropout=0")
    for name, settings in (("images", config), ("features", cached)):
        run_training(settings, dataset, tmp_path / name, launcher="local")
    left, right = history(tmp_path / "images"), history(tmp_path / "features")
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose([row[key] for row in left], [row[key] for row in right], atol=1e-4)


def test_a_flipped_bit_ends_the_run_in_words(dataset: Path, tmp_path: Path) -> None:
    broken = tmp_path / "dataset"
    shutil.copytree(dataset, broken)
    shard = max(broken.glob("*train*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        run_training(small("stages.2.epochs=0"), broken, tmp_path / "run", launcher="local")
