"""The network: its size, what trains, and that training touches nothing else. On real weights where they are."""

import random
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cxr_dist.cli import main
from cxr_dist.config.schema import Config, ModelConfig, StageConfig
from cxr_dist.model import resnet
from tests.small_training import CLASSES, SIZE, Training, config, small_base
from tfrecords_builder.common.errors import UserError


@pytest.fixture(scope="module")
def fresh() -> Any:
    return resnet.build_model(CLASSES, SIZE, config(), "mixed_bfloat16")


def test_the_published_number_of_parameters(fresh: Any) -> None:
    assert fresh.count_params() == 24_122_500
    assert len(resnet.base_of(fresh).layers) == 175


def test_logits_are_float32_and_preprocessing_is_keras_own(fresh: Any) -> None:
    import keras

    assert fresh.output.dtype == "float32"
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 1)).astype("float32")
    prepared = keras.Model(fresh.input, fresh.get_layer("subtract_mean").output)(pixels)
    expected = keras.applications.resnet50.preprocess_input(np.repeat(pixels, 3, axis=-1).copy())
    np.testing.assert_allclose(np.asarray(prepared), expected, atol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_of_a_model_is_its_own(policy: str, fails: bool) -> None:
    """Keras has one for the process, which other models of the process would take over."""
    import keras

    def base(size: int) -> Any:
        if fails:
            raise RuntimeError("no base")
        return small_base(size)

    keras.config.set_dtype_policy("mixed_float16")
    try:
        if fails:
            with pytest.raises(RuntimeError, match="no base"):
                resnet.build_model(CLASSES, SIZE, config(), policy, base)
        else:
            built = resnet.build_model(CLASSES, SIZE, config(), policy, base)
            assert resnet.head_of(built).get_layer("head_dense").dtype_policy.name == policy
            assert resnet.base_of(built).layers[1].dtype_policy.name == policy
            assert keras.layers.Dense(1).dtype_policy.name == "mixed_float16"
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")


def test_fresh_weights_depend_on_the_seed_and_leave_other_random_numbers_alone() -> None:
    np.random.seed(5)
    random.seed(5)
    before = np.random.random(), random.random()
    np.random.seed(5)
    random.seed(5)
    kernels = [
        np.asarray(resnet.head_of(built).get_layer("head_dense").kernel)
        for seed in (1, 1, 2)
        for built in [resnet.build_model(CLASSES, SIZE, config(), "float32", small_base, seed=seed)]
    ]
    assert (np.random.random(), random.random()) == before
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()


@pytest.mark.parametrize("name", ["momentum", "synchronized"])
def test_a_batch_norm_that_does_not_take_a_setting_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a Keras that keeps it under another name: the attribute that is set then changes nothing."""
    import keras

    kind = keras.layers.BatchNormalization
    own = kind.get_config
    monkeypatch.setattr(kind, "get_config", lambda self: own(self) | {name: own(kind())[name]})
    settings = config(synchronize_batch_norm=True, batch_norm_momentum=0.5)
    with pytest.raises(UserError, match=rf"^keras .*BatchNormalization has {name} .* was set\); install keras"):
        resnet.build_model(CLASSES, SIZE, settings, "float32", small_base)


@pytest.mark.parametrize("unfreeze", [0, 1, 30, 100, 175])
@pytest.mark.parametrize("train_batch_norm", [True, False])
def test_what_trains(fresh: Any, unfreeze: int, train_batch_norm: bool) -> None:
    import keras

    resnet.FrozenBase(unfreeze, train_batch_norm).apply(fresh)
    base = resnet.base_of(fresh)
    upper = base.layers[175 - unfreeze :]
    expected = {
        variable.path
        for layer in upper
        if train_batch_norm or not isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.weights
        if "moving" not in variable.path
    }
    trained = {variable.path for variable in fresh.trainable_variables}
    assert trained == expected | {variable.path for variable in resnet.head_of(fresh).trainable_variables}
    assert len(resnet.head_of(fresh).trainable_variables) == 8


def changed(run: Training, before: dict[str, np.ndarray]) -> set[str]:
    return {
        variable.path
        for variable in resnet.base_of(run.model).weights
        if (np.asarray(variable) != before[variable.path]).any()
    }


@pytest.mark.real
@pytest.mark.nightly
def test_each_stage_changes_exactly_what_it_trains(imagenet_weights: Path) -> None:
    run = Training(make_base=resnet.resnet50, weights=str(imagenet_weights), batch_norm="train", dropout=0.3)
    resnet.load_base_weights(run.model, str(imagenet_weights))
    base = resnet.base_of(run.model)
    before = {variable.path: np.asarray(variable) for variable in base.weights}

    run.stage(StageConfig(epochs=1, learning_rate=1e-3))
    assert changed(run, before) == set()

    run.stage(StageConfig(epochs=1, learning_rate=1e-3, unfreeze_layers=100))
    trainable = {variable.path for variable in base.trainable_variables}
    upper = [variable for layer in base.layers[-100:] for variable in layer.weights]
    assert changed(run, before) == trainable | {variable.path for variable in upper if "moving" in variable.path}
    assert trainable == {variable.path for variable in upper if "moving" not in variable.path}


def test_batch_norm_in_inference_mode_does_not_move() -> None:
    run = Training(weights="of-somewhere.h5", batch_norm="inference")
    before = {variable.path: np.asarray(variable) for variable in resnet.base_of(run.model).weights}
    run.stage(StageConfig(epochs=1, learning_rate=1e-3, unfreeze_layers=100))
    moved = changed(run, before)
    assert moved == {variable.path for variable in resnet.base_of(run.model).trainable_variables}
    assert moved == {path for path in before if not path.endswith(("gamma", "beta", "mean", "variance"))}


@pytest.mark.real
def test_the_weights_are_those_that_keras_loads(imagenet_weights: Path) -> None:
    import keras

    ours = resnet.build_model(CLASSES, SIZE, config(), "float32")
    resnet.load_base_weights(ours, str(imagenet_weights))
    theirs = keras.applications.ResNet50(include_top=False, weights=str(imagenet_weights), input_shape=(SIZE, SIZE, 3))
    for left, right in zip(resnet.base_of(ours).get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_weights_of_another_network_are_refused(fresh: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        for name in ("conv1_conv", "dense"):
            file.create_group(name).attrs["weight_names"] = [f"{name}/kernel"]
    with pytest.raises(UserError, match="another network"):
        resnet.load_base_weights(fresh, str(other))

    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(other.read_bytes()[:400])
    with pytest.raises(UserError, match=r"damaged\.h5"):
        resnet.load_base_weights(fresh, str(damaged))
    with pytest.raises(UserError, match=r"model\.weights"):
        resnet.check_weights(str(tmp_path / "missing.h5"))


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ("predictions", "of a network with its top"),
        ("fc1000", "of a network with its top"),
        ("conv4_block7_1_conv", r"of another network \(a layer conv4_block7_1_conv\)"),
        ("conv5_block4_0_bn", "of another network"),
        ("top_conv", "of another network"),
    ],
)
def test_a_file_of_more_than_the_base_is_refused_before_the_run_begins(
    fresh: Any, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], further: str, expected: str
) -> None:
    """Such as ResNet50 with top, or ResNet101: all layers of ResNet50 are in it."""
    names = [layer.name for layer in resnet.base_of(fresh).layers if layer.weights]

    def write(path: Path, layers: list[str]) -> Path:
        with h5py.File(path, "w") as file:
            for name in layers:
                file.create_group(name).attrs["weight_names"] = [f"{name}/kernel"]
        return path

    resnet.check_weights(str(write(tmp_path / "right.h5", names)))
    wrong = write(tmp_path / "wrong.h5", [*names, further])
    with pytest.raises(SystemExit) as ended:
        main.main(["train", str(dataset), "--out", str(tmp_path / "run"), "--set", f"model.weights={wrong}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(expected, error)
    assert resnet.IMAGENET_MD5 in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_offline_the_two_other_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    def no_network(*_: object, **__: object) -> None:
        raise Exception("URL fetch failure: None -- [Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(keras.applications, "ResNet50", no_network)
    with pytest.raises(UserError, match=r"model\.weights=PATH.*none") as error:
        resnet.check_weights("imagenet")
    assert "\n" not in str(error.value)


def test_batch_norm_always_trains_without_pretrained_weights() -> None:
    for weights, batch_norm, expected in (
        ("none", "inference", True),
        ("none", "train", True),
        ("imagenet", "inference", False),
        ("imagenet", "train", True),
    ):
        settings = Config(model=ModelConfig.model_validate({"weights": weights, "batch_norm": batch_norm}))
        assert resnet.FrozenBase.of(settings.stages[1], settings).train_batch_norm is expected
