"""A split that the processes of a machine share: one file, one reader, the same batches."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.data.batch_sampler import EvaluationBatchSampler
from cxr_dist.data.pipeline import worker_batches
from cxr_dist.data.shards import ShardSource
from cxr_dist.data.shared_array import shared_array
from cxr_dist.launch.train import run_training
from cxr_dist.runs import run_folder
from tests.conftest import SMALL_RUN
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

WORKER = """
import sys, time
from pathlib import Path
from cxr_dist.data.shared_array import shared_array

def fill(array):
    print("fills")
    time.sleep(1)
    array[:] = 7

array = shared_array(Path(sys.argv[1]), (100, 50), fill)
assert (array == 7).all()
inode = Path(sys.argv[1]).stat().st_ino
print(any(line.split()[4] == str(inode) for line in open("/proc/self/maps")))
"""


def must_not_fill(_: npt.NDArray[np.uint8]) -> None:
    raise AssertionError("is there already")


def test_batches_are_those_of_each_workers_own(dataset: Path, tmp_path: Path) -> None:
    source = ShardSource(dataset, read_manifest(dataset), "train")
    own, first, second = (source.in_memory(1 << 30, folder) for folder in (None, tmp_path / "a", tmp_path / "a"))
    plan = EvaluationBatchSampler(source.count, 7, 1)
    for elements in zip(
        *(
            worker_batches(each, plan, first_replica=0, local_replicas=1).take(plan.steps).as_numpy_iterator()
            for each in (own, first, second)
        ),
        strict=True,
    ):
        for element in elements[1:]:
            for name, value in elements[0].items():
                np.testing.assert_array_equal(value, element[name], err_msg=name)
    assert len(list((tmp_path / "a").glob("*.uint8"))) == 1


def test_each_split_and_what_is_left_out_has_its_file(dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    paths = ShardSource(dataset, manifest, "train").paths
    for split, without in (("train", []), ("train", paths[:1]), ("train", paths[1:2]), ("validation", [])):
        source = ShardSource(dataset, manifest, split, without)
        source.in_memory(1 << 30, tmp_path)
        source.in_memory(1 << 30, tmp_path)
    assert len(list(tmp_path.glob("*.uint8"))) == 4


def test_two_processes_map_one_file_that_one_of_them_fills(tmp_path: Path) -> None:
    path = tmp_path / "shared.uint8"
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = sorted(worker.communicate(timeout=300)[0] for worker in workers)
    assert said == ["True\n", "fills\nTrue\n"]
    assert all(worker.returncode == 0 for worker in workers)


def test_what_a_process_writes_stays_its_own(tmp_path: Path) -> None:
    path = tmp_path / "shared.uint8"
    array = shared_array(path, (4, 2), lambda array: array.fill(1))
    array[0] = 9
    assert shared_array(path, (4, 2), must_not_fill).tolist() == [[1, 1]] * 4


def test_a_fill_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "shared.uint8"

    def fails(array: npt.NDArray[np.uint8]) -> None:
        array[0] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared_array(path, (4, 2), fails)
    assert [left.name for left in tmp_path.iterdir()] == ["shared.uint8.lock"]
    assert shared_array(path, (4, 2), lambda array: array.fill(3)).tolist() == [[3, 3]] * 4


def test_what_a_stopped_process_left_is_removed_and_a_torn_file_written_again(tmp_path: Path) -> None:
    path = tmp_path / "shared.uint8"
    left, other = tmp_path / ".shared.uint8.0123.tmp", tmp_path / ".other.uint8.0123.tmp"
    for file in (left, other, path):
        file.write_bytes(b"torn")
    assert shared_array(path, (4, 2), lambda array: array.fill(3)).tolist() == [[3, 3]] * 4
    assert (left.exists(), other.exists()) == (False, True)


@pytest.mark.usefixtures("small_network")
def test_a_run_shares_both_splits_and_learns_the_same(dataset: Path, tmp_path: Path) -> None:
    config = load_config(None, [*SMALL_RUN, f"input.shared_folder={tmp_path / 'shared'}", "features.cache=off"])
    own = load_config(None, [*SMALL_RUN, "features.cache=off"])
    losses = []
    for name, each in (("shared", config), ("own", own)):
        run_training(each, dataset, tmp_path / f"run-{name}", launcher="local")
        losses.append([row["val_loss"] for row in run_folder.read_history(tmp_path / f"run-{name}")])
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "shared").glob("*.uint8"))) == 2


def test_a_relative_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"input.shared_folder 'shared': must be an absolute path"):
        load_config(None, ["input.shared_folder=shared"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        shared_array(tmp_path / "shared.uint8", (4, 2), must_not_fill)
