"""A disk that is full at any call that writes: nothing half-written is ever taken for whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_dist.phantoms import write_phantoms

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    built = tmp_path_factory.mktemp("library") / "full_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, HERE / "full_disk.c", "-ldl"], check=True)
    return built


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "phantoms"
    write_phantoms(folder, per_class=8, size=32, workers=1)
    return folder


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("scenario", "least"), [("build", 60), ("keep", 20), ("report", 20), ("cache", 15)])
def test_the_disk_is_full_at_every_call(
    library: Path, few_images: Path, tmp_path: Path, scenario: str, least: int, every: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.faults.full_disk",
        library,
        scenario,
        str(every),
        tmp_path / "disk",
        few_images,
    ]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=1000, env=environment, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout.split()[-1])
    assert calls >= least
    print(f"{scenario}: full from each of {calls} calls on, every {every}.")
