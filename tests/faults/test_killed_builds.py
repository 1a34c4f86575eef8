"""A build whose worker processes are killed at random moments ends with the bytes of an undisturbed one."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from cxr_dist.launch import ray_pool
from cxr_dist.launch.ray_pool import RayPool
from cxr_dist.phantoms import write_phantoms
from tests.faults.build_tasks import Log, logged_tasks
from tests.tfrecords_builder.poisoned import POISON, poisoned_ingest
from tfrecords_builder import build as build_module
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.pool import Pool
from tfrecords_builder.writing import parts
from tfrecords_builder.writing.output_folder import WORK_FOLDER

ROOT = Path(__file__).parents[2]
SIZE = 16
IMAGES = 4 * 16
PER_PART = 8
FIRST_PASS = {"decode", "whole"}
UNDISTURBED_LINES = 2 * IMAGES + IMAGES // PER_PART


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IMAGES_PER_PART", PER_PART)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "phantoms"
    write_phantoms(folder, per_class=IMAGES // 4, size=32, workers=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    dataset = tmp_path_factory.mktemp("undisturbed") / "d"
    build_dataset(images, dataset, BuildOptions(image_size=SIZE, masks="ignore", workers=1))
    return content(dataset)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


class Killer:
    """Kills the process that wrote this line of the log, counted from 1, which waits for it."""

    def __init__(self, log: Log, number: int) -> None:
        self._log, self._number = log, number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self.killed: list[str] = []
        """The line."""

    def _wait(self) -> None:
        while not self._ended.is_set():
            lines = self._log.lines()
            if len(lines) >= self._number:
                self.killed = lines[self._number - 1]
                os.kill(int(self.killed[0]), signal.SIGKILL)
                self._log.forget_fatal()
                return
            time.sleep(0.002)

    def __enter__(self) -> "Killer":
        self._log.name_fatal(self._number)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def check_kills(images: Path, undisturbed: dict[str, bytes], folder: Path, where: str, kills: int, seed: int) -> None:
    """One kill a build, each in its own share of the build's time."""
    rng = random.Random(seed)
    decoded, passes = 0, []
    for number in range(kills):
        moment = int((number + rng.random()) / kills * (UNDISTURBED_LINES - 1)) + 1
        log = Log(folder / "d" / WORK_FOLDER)
        pool = nullcontext(RayPool()) if where == "ray" else Pool(2)
        with logged_tasks(), pool as workers, Killer(log, moment) as killer:
            build_dataset(images, folder / "d", BuildOptions(image_size=SIZE, masks="ignore"), pool=workers)
        assert killer.killed, f"nobody was killed at line {moment}"
        assert content(folder / "d") == undisturbed, f"killed at {killer.killed}"
        check_decoded_once(log.lines())
        decoded += sum(what == "decode" for _, what, _ in log.lines()) - IMAGES
        passes.append(killer.killed[1])
        shutil.rmtree(folder)
        folder.mkdir()
    assert set(passes) & FIRST_PASS, "in the first pass"
    assert "record" in passes, "in the second pass"
    lost = 1 if where == "ray" else 2  # a process of this machine takes its pool with it
    assert decoded < kills * PER_PART * lost, "a kill costs the parts in progress, and in the second pass nothing"
    print(f"{where}: {kills} of {kills} builds the same, killed at {passes}; {decoded} images decoded again")


def check_decoded_once(lines: list[list[str]]) -> None:
    whole = set()
    for process, what, which in lines:
        assert what != "decode" or which not in whole, f"part {which} was whole and is decoded again by {process}"
        if what == "whole":
            whole.add(which)
    # A process may end between the part and its line: the one that is killed, or the other one of its pool.
    assert len(whole) >= IMAGES // PER_PART - 1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kills", "seed"), [(2, 1), pytest.param(20, 2, marks=pytest.mark.nightly)])
def test_workers_of_this_machine_are_killed(
    images: Path, undisturbed: dict[str, bytes], tmp_path: Path, kills: int, seed: int
) -> None:
    check_kills(images, undisturbed, tmp_path / "local", "local", kills, seed)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kills", "seed"), [(2, 1), pytest.param(20, 2, marks=pytest.mark.nightly)])
def test_workers_of_a_cluster_are_killed(
    images: Path, undisturbed: dict[str, bytes], tmp_path: Path, kills: int, seed: int
) -> None:
    check_kills(images, undisturbed, tmp_path / "ray", "ray", kills, seed)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_an_image_that_kills_its_process_ends_a_build_on_a_cluster(
    images: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray_pool, "PAUSES_S", (0.0, 0.0))
    victim = sorted(images.glob("*/images/*"))[20]
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "ingest", poisoned_ingest)
        remote = partial(ray.remote, runtime_env={"env_vars": {POISON: victim.name, "PYTHONPATH": str(ROOT)}})
        patch.setattr(ray, "remote", remote)
        with pytest.raises(UserError, match=r"^the images .* to .*: the process was lost 3 times \(") as caught:
            build_dataset(images, tmp_path / "d", BuildOptions(image_size=SIZE, masks="ignore"), pool=RayPool())
    assert "start the same command again to resume" in str(caught.value)
    assert list((tmp_path / "d" / WORK_FOLDER).glob("part-*.json")), "what was decoded is kept"
    build_dataset(images, tmp_path / "d", BuildOptions(image_size=SIZE, masks="ignore"), pool=RayPool())
    assert content(tmp_path / "d") == undisturbed
