"""Single bits that flip in what lies on the disk: found before anything is computed from them."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.data.shards import ShardSource
from cxr_dist.evaluation.evaluate import evaluate_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.features.store import FeatureStore
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import CheckpointFolder
from tests.conftest import use_small_base
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.tfrecord import CorruptRecordError
from tfrecords_builder.splitting.splits import SPLITS

COUNT = 75
"""Flips of each kind."""
KINDS = ["shard", "manifest", "checkpoint", "cache"]
Use = Callable[[], None]


def use_shard(folder: Path, damaged: Path) -> None:
    """Every image once, as training reads them."""
    manifest = read_manifest(folder)
    for split in SPLITS:
        ShardSource(folder, manifest, split).in_memory(1 << 30)


def use_manifest(folder: Path, damaged: Path) -> None:
    read_manifest(folder)


def use_checkpoint(folder: Path, damaged: Path) -> None:
    """As a run that goes on: passing a damaged one over is finding it."""
    checkpoints = CheckpointFolder(folder)
    if damaged.name.startswith("best-"):
        checkpoints.load_best(damaged)
        return
    newest = checkpoints.newest_position()
    assert newest is not None
    if damaged.name.startswith("base-"):
        checkpoints.load(newest)
        return
    warnings: list[str] = []
    checkpoints.newest(warnings.append)
    if warnings:
        raise UserError(warnings[0])


def use_cache(folder: Path, damaged: Path) -> None:
    """An entry that is not found is computed anew."""
    description = {"number": 0}
    if FeatureStore(folder, 1 << 30).find(description) is None:
        raise UserError(f"{damaged}: not found")


USES = {"shard": use_shard, "manifest": use_manifest, "checkpoint": use_checkpoint, "cache": use_cache}


def write_cache(folder: Path) -> None:
    store, description = FeatureStore(folder, 1 << 30), {"number": 0}
    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float16)
    with store.computing([description]):
        store.begin(description, rows.nbytes)
        for number, part in enumerate((rows[:7], rows[7:])):
            with store.part(description, number, (8,), "float16") as writer:
                writer.append(part)
        store.commit(description, 2, (8,), "float16")


@pytest.fixture(params=KINDS)
def victim(
    request: pytest.FixtureRequest, dataset: Path, run_with_checkpoints: Path, tmp_path: Path
) -> tuple[str, Path]:
    """What is damaged: its kind, and a copy of the folder that holds it."""
    folder = tmp_path / "folder"
    if request.param == "cache":
        write_cache(folder)
    else:
        whole = run_with_checkpoints / run_folder.CHECKPOINTS if request.param == "checkpoint" else dataset
        shutil.copytree(whole, folder)
    return request.param, folder


def files_of(kind: str, folder: Path) -> list[Path]:
    """Those that may be damaged."""
    newest = CheckpointFolder(folder).newest_position()
    patterns = {
        "shard": ["*.tfrecord*"],
        "manifest": ["manifest.parquet"],
        "checkpoint": [newest.file_name if newest else "", "best-*", "base-*"],
        "cache": ["*/entry.json", "*/part-00000", "*/part-00001"],
    }[kind]
    return sorted(path for pattern in patterns if pattern for path in folder.glob(pattern))


def flips(files: list[Path], count: int, seed: int) -> Iterator[Path]:
    """Flip a bit of one of the files, and undo it when the caller goes on."""
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(files)
        with path.open("r+b") as file:
            bit = rng.randrange(8 * path.stat().st_size)
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
            file.flush()
            yield path
            file.seek(bit // 8)
            file.write(bytes([byte]))


def test_a_flipped_bit_is_found_before_it_is_used(victim: tuple[str, Path]) -> None:
    kind, folder = victim
    files = files_of(kind, folder)
    assert files
    for path in files:
        USES[kind](folder, path)  # whole: nothing is found
    found = 0
    for path in flips(files, COUNT, seed=0):
        with pytest.raises(UserError, match=path.name) as raised:
            USES[kind](folder, path)
        found += 1
        if kind == "shard":
            assert isinstance(raised.value, CorruptRecordError)
            assert raised.value.record is not None
    assert found == COUNT
    for path in files:
        USES[kind](folder, path)
    print(f"{kind}: {found} of {COUNT} flips in {len(files)} files were found")


def test_the_model_of_a_finished_run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_base(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for _ in flips([run / run_folder.MODEL], 5, seed=0):
        with pytest.raises(UserError, match=r"model\.keras: cannot be loaded .*checksum"):
            evaluate_run(EvaluationSpec(run, tmp_path / "evaluation"))
    assert not (tmp_path / "evaluation").exists()
    evaluate_run(EvaluationSpec(run, tmp_path / "evaluation"))
