"""Damaged records that a run leaves out by choice."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.data.shards import ShardSource
from cxr_dist.evaluation.evaluate import predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.launch.train import run_training
from cxr_dist.runs import run_folder
from cxr_dist.runs.corrupt_records import ExcludedRecords, exclude_corrupt, find_corrupt, load_excluded
from tests.conftest import SMALL_RUN
from tests.training.test_loop import comparable
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.tfrecord import HEADER_BYTES, scan

Damage = Callable[[str, int], str]
"""Flip a bit of the record at a position of a split; the path of its source image."""


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "dataset"))


@pytest.fixture
def flip(copy: Path) -> Damage:
    def flipped(split: str, position: int) -> str:
        index = read_manifest(copy).split(split)
        with (copy / index.shard_names[index.shard[position]]).open("r+b") as file:
            file.seek(int(index.offset[position]) + HEADER_BYTES + 40)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        return index.paths[position]

    return flipped


def train(dataset: Path, run: Path, *settings: str) -> dict[str, object]:
    return run_training(load_config(None, [*SMALL_RUN, "stages.2.epochs=0", *settings]), dataset, run, launcher="local")


def test_what_is_damaged_is_found_and_nothing_else(copy: Path, flip: Damage) -> None:
    manifest = read_manifest(copy)
    assert list(find_corrupt(copy, manifest)) == []
    damaged = {flip("train", 0), flip("train", 17), flip("validation", 11)}
    flip("test", 3)  # a run does not read it
    found = list(find_corrupt(copy, manifest))
    assert {record.path for record in found} == damaged
    for record in found:
        with pytest.raises(UserError) as said:
            list(scan(copy / record.shard))
        assert f"record {record.record} at byte {record.offset}" in str(said.value)
        assert "checksum" in record.reason


def test_a_source_without_them_has_all_others_in_order(copy: Path, flip: Damage) -> None:
    manifest = read_manifest(copy)
    whole = ShardSource(copy, manifest, "train")
    pixels = whole.pixels(np.arange(whole.count))
    gone = [5, 40]
    without = [flip("train", position) for position in gone]
    source = ShardSource(copy, manifest, "train", without)
    assert source.paths == [path for path in whole.paths if path not in without]
    np.testing.assert_array_equal(source.labels, np.delete(whole.labels, gone))
    np.testing.assert_array_equal(source.pixels(np.arange(source.count)), np.delete(pixels, gone, axis=0))


def test_the_decision_is_taken_once(copy: Path, flip: Damage, tmp_path: Path) -> None:
    run, manifest = tmp_path / "run", read_manifest(copy)
    run.mkdir()
    first = flip("train", 1)
    decided = exclude_corrupt(run, copy, manifest, 1)
    assert decided.paths == {first}
    assert load_excluded(run) == decided
    assert exclude_corrupt(run, copy, manifest, 1) == decided
    second = flip("train", 2)
    with pytest.raises(UserError, match=f"{second} has been damaged since the run began"):
        exclude_corrupt(run, copy, manifest, 5)
    flip("train", 1), flip("train", 2)  # mended: the run still does without the first
    assert exclude_corrupt(run, copy, manifest, 1) == decided


def test_more_than_the_limit_is_refused_and_nothing_is_written(copy: Path, flip: Damage, tmp_path: Path) -> None:
    flip("train", 1), flip("validation", 2)
    with pytest.raises(
        UserError,
        match=r"input\.max_corrupt_records 1: 2 records are damaged, the first is record \d+ at byte \d+ of .*",
    ):
        exclude_corrupt(tmp_path, copy, read_manifest(copy), 1)
    assert load_excluded(tmp_path) == ExcludedRecords()
    assert not list(tmp_path.glob("*.json"))


def test_the_content_has_another_name(copy: Path, flip: Damage, tmp_path: Path) -> None:
    """Or features of another set of images would be taken from the cache."""
    flip("train", 1)
    one = exclude_corrupt(tmp_path, copy, read_manifest(copy), 9)
    assert ExcludedRecords().fingerprint("abc") == "abc"
    assert one.fingerprint("abc") not in ("abc", one.fingerprint("abd"))


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_run_leaves_them_out_counts_them_and_says_so(
    copy: Path, flip: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    flip("train", 1), flip("train", 30), flip("validation", 4)
    with pytest.raises(UserError, match=r"record \d+ at byte \d+: the checksum of its content does not match"):
        train(copy, tmp_path / "strict", f"features.cache={cache}")
    result = train(copy, tmp_path / "run", f"features.cache={cache}", "input.max_corrupt_records=3")
    assert result["damaged_records"] == 3
    assert f"3 damaged records are left out; {tmp_path / 'run' / 'damaged.json'} lists them" in capsys.readouterr().err
    # 54 images in batches of 8: the same 6 steps an epoch as 48 to 55 images have.
    assert result["steps_computed"] == 2 * 6
    validation = predict_run(EvaluationSpec(tmp_path / "run", tmp_path / "evaluation", "validation"))
    assert len(validation.paths) == 11
    accuracy = float((validation.probabilities.argmax(1) == validation.labels).mean())
    assert accuracy == pytest.approx(run_folder.read_result(tmp_path / "run")["best"]["val_accuracy"])


@pytest.mark.usefixtures("small_network")
@pytest.mark.nightly
def test_without_damage_the_key_changes_no_number(copy: Path, tmp_path: Path) -> None:
    histories = []
    for name, most in (("strict", 0), ("lenient", 5)):
        assert train(copy, tmp_path / name, f"input.max_corrupt_records={most}")["damaged_records"] == 0
        histories.append(comparable(run_folder.read_history(tmp_path / name)))
    assert histories[0] == histories[1]


def test_a_decision_of_other_data_or_settings_is_forgotten(copy: Path, flip: Damage, tmp_path: Path) -> None:
    """Until a checkpoint is there, a run may begin anew with others: what was left out then is whole now."""
    run, manifest = tmp_path / "run", read_manifest(copy)
    config = run_folder.resolve_config(load_config(None, [*SMALL_RUN, "input.max_corrupt_records=3"]), manifest)
    run_folder.prepare(run, config, copy, manifest)
    flip("train", 1)
    assert exclude_corrupt(run, copy, manifest, 3).records
    flip("train", 1)
    run_folder.prepare(run, run_folder.resolve_config(load_config(None, SMALL_RUN), manifest), copy, manifest)
    assert load_excluded(run) == ExcludedRecords()


def test_later_damage_in_a_shard_with_records_left_out_has_its_right_number(copy: Path, flip: Damage) -> None:
    manifest = read_manifest(copy)
    first, last = flip("validation", 0), flip("validation", 11)
    source = ShardSource(copy, manifest, "validation", [first])
    with pytest.raises(UserError) as raised:
        source.pixels(np.arange(source.count))
    (found,) = (record for record in find_corrupt(copy, manifest) if record.path == last)
    assert f"record {found.record} at byte {found.offset}" in str(raised.value)
