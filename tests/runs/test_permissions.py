"""Files and folders have the modes that the umask gives: what shows patients is read by whom the user lets read it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL_RUN


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


@pytest.mark.nightly
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("umask", [pytest.param(0o077, id="077"), pytest.param(0o022, id="022")], indirect=True)
def test_all_that_a_build_a_run_and_an_evaluation_leave(umask: int, tmp_path: Path) -> None:
    from cxr_dist.config.loading import load_config
    from cxr_dist.evaluation.evaluate import evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.launch.train import run_training
    from cxr_dist.phantoms import write_phantoms
    from tfrecords_builder.build import BuildOptions, build_dataset
    from tfrecords_builder.eda.page import write_analysis

    out = tmp_path / "out"
    write_phantoms(out / "source", per_class=20, size=48, workers=1)
    build_dataset(out / "source", out / "dataset", BuildOptions(image_size=32, workers=2))
    write_analysis(out / "dataset", out / "eda")
    settings = [*SMALL_RUN, "stages.1.epochs=1", "features.cache=on", f"features.folder={out / 'features'}"]
    run_training(load_config(None, settings), out / "dataset", out / "run", launcher="local")
    evaluate_run(EvaluationSpec(out / "run", out / "evaluation"))
    found = modes(tmp_path)
    for part in ("source", "dataset", "eda", "features", "run", "run/model.keras", "run/checkpoints", "evaluation"):
        assert f"out/{part}" in found
    for name, mode in found.items():
        plain = 0o777 if (tmp_path / name).is_dir() else 0o666
        assert mode == plain & ~umask, f"{name}: {mode:04o}"
