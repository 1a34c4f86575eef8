"""What is kept in place of images is what the frozen network makes of them, and it is computed once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_dist.config.schema import AugmentationConfig, Config, FeaturesConfig, StageConfig
from cxr_dist.data import augmentation as augment
from cxr_dist.data.arrays import ArraySource
from cxr_dist.data.batch_sampler import TrainBatchSampler
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.features import cache
from cxr_dist.features.store import FeatureStore
from cxr_dist.model import resnet, split_point
from tests.small_training import CLASSES, SIZE, config, images, local_topology, pixels_of, small_base
from tfrecords_builder.common.errors import UserError

COUNT = 75  # no multiple of what a step takes


class Features:
    """A small network, frozen, and the features of its images, on one device or several."""

    def __init__(self, folder: Path, replicas: int = 1, **settings: Any) -> None:
        import keras

        self.config = Config.model_validate(config().tree() | {"features": settings, "seed": 5})
        topology = local_topology(replicas)
        strategy = make_strategy(topology)
        keras.utils.set_random_seed(0)
        with strategy.scope():
            self.model = resnet.build_model(CLASSES, SIZE, self.config, "float32", small_base)
            resnet.FrozenBase().apply(self.model)
        self.told: list[int] = []
        self.frozen = cache.FrozenFeatures(
            self.config,
            strategy,
            topology,
            FeatureStore(folder, 1 << 30),
            precision="float32",
            xla=False,
            progress=lambda done, _total, _rate: self.told.append(done),
        )
        self.images = cache.SplitImages("a dataset", "train", images(COUNT))

    def of(self, name: str, *also: str, augmentation: AugmentationConfig | None = None) -> ArraySource:
        return self.frozen.sources(self.model, [name, *also], self.images, augmentation)


@pytest.mark.parametrize("replicas", [1, 2])
def test_they_are_those_of_every_image_in_order(tmp_path: Path, replicas: int) -> None:
    made = Features(tmp_path, replicas)
    pooled, below = made.of("pool", "block_relu"), made.of("block_relu")
    pixels = pixels_of(made.images.source).astype(np.float32)
    for source, name, tolerance in ((pooled, "pool", 1e-5), (below, "block_relu", 1e-3)):
        expected = split_point.frozen_outputs(made.model, [name])(pixels).numpy()
        assert source.count == COUNT
        np.testing.assert_allclose(pixels_of(source)[np.arange(COUNT)], expected, atol=tolerance * expected.max())
    np.testing.assert_array_equal(pooled.labels, made.images.source.labels)
    assert made.told[-1] == COUNT
    assert len(made.told) == -(-COUNT // (32 * replicas))  # one pass for both


def test_views_are_augmented_by_fresh_draws(tmp_path: Path) -> None:
    augmentation = AugmentationConfig(shift=0.1)
    made = Features(tmp_path, augmented_copies=3)
    source = made.of("pool", augmentation=augmentation)
    assert source.count == 3 * COUNT
    np.testing.assert_array_equal(source.labels, np.tile(made.images.source.labels, 3))
    pixels = pixels_of(made.images.source).astype(np.float32)
    network = split_point.frozen_outputs(made.model, ["pool"])
    rows = pixels_of(source)[np.arange(3 * COUNT)].reshape(3, COUNT, -1)
    for view in range(3):
        changed = augment.augment(pixels, cache.copy_draws(COUNT, 5, view), augmentation)
        np.testing.assert_allclose(rows[view], network(changed), rtol=1e-4, atol=1e-4)
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_epochs_take_the_copies_in_turn(copies: int) -> None:
    plan = TrainBatchSampler(10, 5, 1, seed=0, copies=copies)
    plain = TrainBatchSampler(10, 5, 1, seed=0)
    for step in range(8):
        epoch = step // 2
        np.testing.assert_array_equal(plan.positions(step, 0), plain.positions(step, 0) + epoch % copies * 10)


def test_a_second_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Features(tmp_path).of("pool", "block_relu")
    augmented = Features(tmp_path, augmented_copies=2).of("pool", augmentation=AugmentationConfig())
    with monkeypatch.context() as patch:
        patch.setattr(cache.FrozenFeatures, "_compute", lambda *_: pytest.fail("computed again"))
        Features(tmp_path, replicas=2).of("pool", "block_relu")
        Features(tmp_path).of("block_relu")
        again = Features(tmp_path, augmented_copies=2).of("pool", augmentation=AugmentationConfig())
    rows = np.arange(again.count)
    np.testing.assert_array_equal(pixels_of(again)[rows], pixels_of(augmented)[rows])


def test_another_run_is_waited_for_while_it_writes_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by 10 s with every wait."""
    now, waits = 0.0, 0

    def wait() -> None:
        nonlocal now, waits
        now, waits = now + 10.0, waits + 1

    monkeypatch.setattr(cache, "WAIT_S", 0.01)
    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: now))
    made, written = Features(tmp_path), iter(range(6))
    made.config = made.frozen._config = made.config.model_copy(update={"worker_timeout_s": 35.0})
    made.frozen._waiting = wait
    monkeypatch.setattr(FeatureStore, "written", lambda *_: next(written, 5))
    entry = describe(made, "pool")
    with (
        FeatureStore(tmp_path, 1 << 30).computing([entry]),
        pytest.raises(UserError, match="another run holds the same features, but wrote nothing for 35 s"),
    ):
        made.of("pool")
    assert waits == 6 + 3, "as long as it wrote, and then for the limit"
    # The next wait is another one, however long ago that was.
    now += 1000.0
    with FeatureStore(tmp_path, 1 << 30).computing([entry]), pytest.raises(UserError, match="another run holds"):
        made.of("pool")
    assert waits == 6 + 3 + 4


def describe(made: Features, name: str, copy: cache.AugmentedCopy | None = None) -> dict[str, Any]:
    return made.frozen._describe(made.model, [name], made.images, [copy])[copy][name]


@pytest.mark.parametrize("change", ["weights", "dataset", "split", "augmentation", "seed", "precision"])
def test_what_decides_the_numbers_decides_the_entry(tmp_path: Path, change: str) -> None:
    made = Features(tmp_path)
    augmentation = AugmentationConfig()
    before = describe(made, "pool", cache.AugmentedCopy(augmentation, 0))
    assert before == describe(made, "pool", cache.AugmentedCopy(augmentation, 0))
    if change == "weights":
        base = resnet.base_of(made.model)
        base.get_layer("top_bn").moving_mean.assign_add([1e-3] * 2048)
    elif change in ("dataset", "split"):
        made.images = cache.SplitImages(
            *(("another", "train") if change == "dataset" else ("a dataset", "validation")), made.images.source
        )
    elif change == "augmentation":
        augmentation = AugmentationConfig(shift=0.06)
    elif change == "seed":
        made.frozen._config = made.config.model_copy(update={"seed": 6})
    else:
        made.frozen._precision = "bfloat16"
    assert describe(made, "pool", cache.AugmentedCopy(augmentation, 0)) != before


def test_weights_above_a_split_point_do_not_decide_it(tmp_path: Path) -> None:
    made = Features(tmp_path)
    before = describe(made, "block_relu")
    resnet.base_of(made.model).get_layer("top_bn").moving_mean.assign_add([1e-3] * 2048)
    assert describe(made, "block_relu") == before


def test_a_value_that_does_not_fit_says_what_to_set(tmp_path: Path) -> None:
    made = Features(tmp_path)
    resnet.base_of(made.model).get_layer("block_out_bn").beta.assign([1e6] * 16)
    with pytest.raises(UserError, match=r"features\.cache_activations=off"):
        made.of("block_relu")


@pytest.mark.parametrize(
    ("settings", "stage", "name", "expected"),
    [
        ({}, {}, "pool", "on"),
        ({"cache": "off"}, {}, "pool", "off"),
        ({"cache": "off", "cache_activations": "on"}, {}, "x", "off"),
        ({"augmented_copies": 4}, {"augment": True, "epochs": 10}, "pool", "on"),
        ({"augmented_copies": 4}, {"augment": True, "epochs": 4}, "pool", "off"),
        ({"augmented_copies": 4, "cache": "on"}, {"augment": True, "epochs": 4}, "pool", "on"),
        ({}, {}, "x", "auto"),
        ({}, {"augment": True}, "x", "off"),
        ({"cache_activations": "on"}, {"augment": True}, "x", "on"),
        ({"cache_activations": "off"}, {}, "x", "off"),
    ],
)
def test_use_of_cache(settings: dict[str, Any], stage: dict[str, Any], name: str, expected: str) -> None:
    assert cache.use_of_cache(FeaturesConfig(**settings), StageConfig(**stage), name) == expected


def test_the_cache_pays_when_reading_costs_less_than_computing() -> None:
    def pays(**changes: Any) -> bool:
        known = {"epochs": 3, "bytes_per_image": 800_000, "seconds_below": 0.025}
        return cache.cache_pays(**{**known, "read_rate": 5e8, "write_rate": 2e8, **changes})

    assert pays()
    assert not pays(epochs=1)  # computed once either way, and written beside
    assert not pays(seconds_below=0.0005)  # a GPU
    assert not pays(read_rate=2e7)
    assert not pays(bytes_per_image=20_000_000)
