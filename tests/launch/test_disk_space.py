"""What a run needs of the disk, from ResNet50 itself, and that it is refused before it begins."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.config.loading import load_config, resolve_preset
from cxr_dist.launch import disk_space
from cxr_dist.launch.disk_space import Needed, cache_bytes, check_space, needed_by_run, needed_by_search, trained_bytes
from cxr_dist.launch.train import run_training
from tests.conftest import SMALL_RUN
from tfrecords_builder.common.errors import UserError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the free bytes of every disk."""

    def set_free(count: float) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: Usage(1 << 50, 0, int(count)))

    return set_free


def test_the_layers_that_train_are_those_of_resnet50() -> None:
    from cxr_dist.model.resnet import BASE_NAME, build_model

    config = load_config(None, ["model.weights=none"])
    model = build_model(16, 32, config, "float32")
    base = model.get_layer(BASE_NAME)
    assert base.count_params() == disk_space.BASE_PARAMETERS
    assert 4 * model.count_params() <= disk_space.MODEL_BYTES
    head = model.count_params() - base.count_params()
    for layers in (0, 1, 10, 11, 20, 21, 32, 33, 100, 175):
        real = 4 * (head + sum(layer.count_params() for layer in base.layers[len(base.layers) - layers :]))
        assert real <= trained_bytes(layers)
        if layers in disk_space.UPPER_PARAMETERS:
            assert trained_bytes(layers) - real < 100_000


def test_more_of_anything_needs_more() -> None:
    def run(*changes: str) -> int:
        return needed_by_run(load_config(None, ["stages.2.epochs=1", *changes]), 1000).run

    plain = run("stages.2.unfreeze_layers=20")
    assert run("stages.2.unfreeze_layers=32") > plain
    assert run("stages.2.unfreeze_layers=20", "checkpoint.keep=3") > plain
    assert run("stages.2.unfreeze_layers=20", "stages.2.ema_decay=0.9") > plain
    assert run("stages.2.unfreeze_layers=20", "stages.2.optimizer=sgd") < plain
    assert run("stages.2.epochs=0", "stages.2.unfreeze_layers=20") == run("stages.2.epochs=0")


def test_the_cache_is_what_stages_of_the_head_read_within_its_limit() -> None:
    def cache(*changes: str) -> int:
        return cache_bytes(load_config(None, [*changes]), 1_000_000)

    assert cache() == 8_192_000_000
    assert cache("stages.1.augment=true", "features.augmented_copies=3") == 3 * 8_192_000_000
    assert cache("features.limit_gb=1") == 1_000_000_000
    assert cache("features.cache=off") == 0
    assert cache("stages.1.epochs=0") == 0


def test_small_runs_fit_on_small_disks() -> None:
    """A run of the head alone writes 0.3 GB; one that trains conv5 too, in the preset for CPUs, below 1.5 GB."""
    assert needed_by_run(load_config(resolve_preset(Path("smoke")), ["stages.2.epochs=0"]), 100).run < 0.4e9
    assert needed_by_run(load_config(resolve_preset(Path("cpu"))), 100).run < 1.5e9
    head = load_config(None, ["stages.2.epochs=0"])
    assert needed_by_search(head, 100, trials=40, concurrent=2, keep=1).run < 1e9


def test_what_does_not_fit_is_refused_in_a_line(free: Any, tmp_path: Path) -> None:
    out, cache = tmp_path / "deep" / "run", tmp_path / "cache"
    free(3e9)
    check_space(out, cache, Needed(2_000_000_000, 1_000_000_000))
    with pytest.raises(UserError, match=r"run: needs up to 3\.50 GB, and its disk has 3\.00 GB free; give --out on"):
        check_space(out, cache, Needed(2_000_000_000, 1_500_000_000))
    out.mkdir(parents=True)
    (out / "held").write_bytes(b"x" * 1000)
    free(0)
    check_space(out, cache, Needed(1000, 0))
    with pytest.raises(UserError, match=r"lower checkpoint\.keep$"):
        check_space(out, cache, Needed(1001, 0))


def test_a_cache_on_another_disk_is_counted_there(free: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "_disk", lambda path: path.name == "cache")
    free(1e9)
    check_space(tmp_path / "run", tmp_path / "cache", Needed(900_000_000, 900_000_000))
    with pytest.raises(UserError, match=r"cache: needs up to 1\.10 GB.*lower features\.limit_gb"):
        check_space(tmp_path / "run", tmp_path / "cache", Needed(0, 1_100_000_000))


def test_a_run_is_refused_before_it_begins(dataset: Path, tmp_path: Path, free: Any) -> None:
    free(1e6)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"run: needs up to .* GB, and its disk has 0\.00 GB free"):
        run_training(load_config(None, SMALL_RUN), dataset, run, launcher="local")
    assert not run.exists()


def test_a_finished_run_needs_nothing(dataset: Path, finished_run: Path, free: Any) -> None:
    free(0)
    run_training(load_config(None, SMALL_RUN), dataset, finished_run, launcher="local")
