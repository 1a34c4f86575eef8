"""Ray Train for real: clusters of this machine, two worker processes, bundles of declared GPUs."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.launch import ray_train
from cxr_dist.launch.placement import cluster_nodes, plan_workers
from cxr_dist.launch.ray_connection import WITHOUT_DASHBOARD
from cxr_dist.launch.ray_pool import RayPool
from cxr_dist.launch.ray_train import launch
from cxr_dist.launch.train import run_training
from cxr_dist.runs import run_folder
from tests.conftest import SMALL_RUN, use_small_base
from tests.integration import workers
from tests.training.test_train_step import curve
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import MANIFEST_NAME
from tfrecords_builder.images.decoded import ImageError

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train gives the workers a minute, in which a slow machine may not have started them."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")


def start_cluster(**resources: float) -> None:
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"} | WITHOUT_DASHBOARD},
        **resources,
    )


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A cluster that these tests share, in which every task and actor of a test has ended with it."""
    import ray

    ray.shutdown()
    start_cluster(num_cpus=2)
    yield
    ray.shutdown()


def reports(folder: Path, pattern: str = "[0-9]*.json") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_stopped")
def test_bundles_of_gpus_that_are_only_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    start_cluster(num_cpus=8, num_gpus=8)
    for asked, devices in ((2, 4), (8, None)):
        out = tmp_path / str(asked)
        out.mkdir()
        plan = plan_workers(cluster_nodes(), asked, devices)
        launch(workers.record_bundle, {"out": str(out)}, plan, out / "run")
        check_bundles(reports(out), asked)


@pytest.mark.usefixtures("two_cpus")
def test_what_a_worker_says_the_user_can_mend_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shard 7: damaged$"):
        launch(workers.fail_in_words, {}, plan_workers(cluster_nodes(), 1, None), tmp_path / "run")


def check_bundles(found: list[dict[str, Any]], asked: int) -> None:
    assert [worker["rank"] for worker in found] == list(range(asked))
    assert {worker["workers"] for worker in found} == {asked}
    gpus = [worker["gpus"] for worker in found]
    assert {len(ids) for ids in gpus} == {8 // asked}
    assert sorted(gpu for ids in gpus for gpu in ids) == list(range(8)), "every GPU in one bundle"
    assert [bundle.get("GPU") for bundle in found[0]["bundles"] if bundle.get("GPU")] == [8 / asked] * asked


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.nightly
def test_two_workers_follow_one_device(tmp_path: Path) -> None:
    """The same curve, whatever compiles it and in what precision, the same weights on both workers, and an overflow
    on one skips the step on both."""
    variants: dict[str, dict[str, Any]] = {
        "synchronized": {"synchronize_batch_norm": True},
        "synchronized float16": {"synchronize_batch_norm": True, "precision": "float16"},
        "plain": {},
        "plain xla": {"xla": True},
        "plain bfloat16": {"precision": "bfloat16"},
        "plain float16": {"precision": "float16"},
    }
    plan = plan_workers(cluster_nodes(), 2, None)
    launch(workers.curves_and_overflow, {"out": str(tmp_path), "variants": variants}, plan, tmp_path / "run")
    first, second = reports(tmp_path)
    for name in variants:
        assert first[name] == second[name], f"{name}: the workers differ"
    one = curve()
    for key, expected in (("losses", one.losses), ("validation", one.validation)):
        np.testing.assert_allclose(first["synchronized"][key], expected, atol=1e-4)
        for name in variants:
            base, _, change = name.partition(" ")
            tolerance = {"": 0.0, "xla": 1e-3}.get(change, 0.05)
            np.testing.assert_allclose(first[name][key], first[base][key], atol=tolerance, err_msg=name)
    assert reports(tmp_path, "poisoned-*.json") == [{"skipped": [4], "same": True, "scale": 2.0**11}] * 2


@pytest.mark.usefixtures("two_cpus")
def test_who_asks_for_the_dashboard_hears_at_once_that_there_is_none() -> None:
    """Ray Train does, before a run ends."""
    import ray

    @ray.remote(num_cpus=0)
    def ask() -> str:
        from ray.util.state import get_actor

        try:
            return str(get_actor("0" * 32, timeout=30))
        except Exception as error:  # noqa: BLE001 - its kind is what is looked for
            return type(error).__name__

    assert ray.get(ask.remote()) == "ServerUnavailable"


@pytest.mark.usefixtures("two_cpus")
def test_tasks_on_a_cluster_build_what_processes_build(phantom_source: Path, dataset: Path, tmp_path: Path) -> None:
    build_dataset(phantom_source, tmp_path / "d", BuildOptions(image_size=32), pool=RayPool())
    for path in dataset.iterdir():
        assert (tmp_path / "d" / path.name).read_bytes() == path.read_bytes(), path.name
    damaged = Path(shutil.copytree(phantom_source, tmp_path / "damaged"))
    victim = next((damaged / "COVID" / "images").iterdir())
    victim.write_bytes(b"no image")
    with pytest.raises(ImageError, match=f"^{victim}: is not a PNG, JPEG, TIFF, BMP, WebP or DICOM image; ") as caught:
        build_dataset(damaged, tmp_path / "e", BuildOptions(image_size=32), pool=RayPool())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e" / MANIFEST_NAME).exists()


def wait_until_free(cpus: int) -> None:
    """What a task or a reservation held is free again some time after its end; until the test's own limit."""
    import ray

    while ray.available_resources().get("CPU", 0) != cpus:
        time.sleep(0.1)


@pytest.mark.usefixtures("two_cpus")
def test_the_cpus_that_are_free_are_taken_and_a_busy_cluster_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cxr_dist.launch import ray_tune
    from cxr_dist.launch.ray_tune import reserved

    monkeypatch.setattr(ray_tune, "SECONDS_TO_PLACE", 300.0)

    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> None: ...

    wait_until_free(2)
    with reserved(2, 0.0) as (cores, _):
        assert cores == 2
    first = Busy.remote()
    ray.get(first.ready.remote())
    wait_until_free(1)
    with reserved(2, 0.0) as (cores, _):
        assert cores == 1
        assert capfd.readouterr().err == ""
        wait_until_free(0)
        monkeypatch.setattr(ray_tune, "SECONDS_TO_PLACE", 1.0)
        with (
            pytest.raises(UserError, match="no machine of the cluster had 1 CPU free for 1 s"),
            reserved(2, 0.0, limit_s=1.0),
        ):
            pass
    # Once, however often it looks.
    assert capfd.readouterr().err.splitlines() == ["waiting for 1 CPU of the cluster, which is busy"]


def command(*arguments: object, timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "cxr_dist", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def settings_of(*changes: str) -> list[str]:
    return [word for change in (*SMALL_RUN, *changes) for word in ("--set", change)]


def test_two_workers_train_as_one_device_does(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that `train --workers 2` does in stage 2, on the small network and a cluster of its own."""
    import ray

    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))  # whatever the machine has
    monkeypatch.setattr(ray_train, "_train_worker", workers.train_small_worker)
    use_small_base(monkeypatch)
    changes = ["stages.1.epochs=0", "model.dropout=0", "model.synchronize_batch_norm=true"]
    config = load_config(None, [*SMALL_RUN, *changes])
    result = run_training(config, dataset, tmp_path / "two", launcher="ray", workers=(2, 2))
    assert (result["launcher"], result["workers"], result["replicas"]) == ("ray", 2, 2)
    assert result["strategy"] == "CollectiveAllReduceStrategy"
    assert "stage 2 epoch 1" in capsys.readouterr().err
    run_training(config, dataset, tmp_path / "one", launcher="local")
    (two,), (one,) = (run_folder.read_history(tmp_path / name) for name in ("two", "one"))
    for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert two[key] == pytest.approx(one[key], abs=1e-4), key


@pytest.mark.nightly
def test_the_commands_train_resnet50_in_both_stages(dataset: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    done = command("train", dataset, "--out", run, *settings_of(), "--workers", 2)
    check_trained(done, run, "stage 2 epoch 1")
    evaluated = command("evaluate", run, "--out", out)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((out / "metrics.json").read_text())["n"] == 12


def check_trained(done: subprocess.CompletedProcess[str], run: Path, last: str) -> None:
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    expected = ("ray", 2, "CollectiveAllReduceStrategy", 24_122_500)
    assert tuple(result[key] for key in ("launcher", "workers", "strategy", "parameters")) == expected
    assert "Traceback" not in done.stderr
    assert last in done.stderr


def test_too_many_workers_are_refused_before_the_run(dataset: Path, tmp_path: Path) -> None:
    done = command("train", dataset, "--out", tmp_path / "other", *settings_of(), "--workers", "64")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --workers 64")
    assert not (tmp_path / "other").exists()
