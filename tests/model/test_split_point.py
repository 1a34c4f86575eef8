"""The network on either side of a split point, and with BatchNorm folded, computes what Keras's own layers compute."""

from typing import Any

import numpy as np
import pytest

from cxr_dist import compat
from cxr_dist.model import batch_norm_folding, resnet as model, split_point
from cxr_dist.model.resnet import FrozenBase
from cxr_dist.model.split_point import SplitPoint
from tests.small_training import CLASSES, SIZE, config, small_base


def randomized(network: Any) -> Any:
    """With statistics and scales that change something."""
    rng = np.random.default_rng(0)
    for variable in network.variables:
        if any(name in variable.path for name in ("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif any(name in variable.path for name in ("beta", "moving_mean", "bias")):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    return network


@pytest.fixture(scope="module")
def resnet() -> Any:
    return randomized(model.build_model(CLASSES, SIZE, config(), "float32"))


@pytest.fixture
def small() -> Any:
    return randomized(model.build_model(CLASSES, SIZE, config(), "float32", small_base))


PIXELS = np.random.default_rng(1).uniform(0, 255, (4, SIZE, SIZE, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("unfreeze", "name", "shape"),
    [
        (0, "pool", (2048,)),
        (2, "pool", (2048,)),  # the last two layers have no weights
        (20, "conv5_block1_out", (1, 1, 2048)),
        (100, "conv3_block3_out", (4, 4, 512)),
        (170, "pool1_pool", (8, 8, 64)),
    ],
)
def test_below_then_above_is_the_whole(resnet: Any, unfreeze: int, name: str, shape: tuple[int, ...]) -> None:
    frozen = FrozenBase(unfreeze)
    frozen.apply(resnet)
    expected = resnet(PIXELS, training=False).numpy()
    assert SplitPoint.of(resnet, frozen) == SplitPoint(name, shape)
    above = split_point.network_above(resnet, name)
    values = split_point.frozen_outputs(resnet, [name])(PIXELS, training=False)
    for logits in (above(values), split_point.whole_network(resnet)(PIXELS, training=False)):
        np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())
    paths = [variable.path for variable in resnet.trainable_variables]
    for network in (above, split_point.whole_network(resnet)):
        assert [variable.path for variable in network.trainable_variables] == paths


@pytest.mark.parametrize("left_by", [0, 100, 175])
def test_the_split_point_does_not_depend_on_what_the_model_trains_now(resnet: Any, left_by: int) -> None:
    FrozenBase(left_by, train_batch_norm=True).apply(resnet)
    flags = [layer.trainable for layer in model.base_of(resnet).layers]
    assert SplitPoint.of(resnet, FrozenBase(100)) == SplitPoint("conv3_block3_out", (4, 4, 512))
    assert [layer.trainable for layer in model.base_of(resnet).layers] == flags


def test_two_split_points_in_one_pass(resnet: Any) -> None:
    FrozenBase().apply(resnet)
    both = split_point.frozen_outputs(resnet, ["pool", "conv3_block3_out"])(PIXELS)
    for name, value in zip(("pool", "conv3_block3_out"), both, strict=True):
        np.testing.assert_allclose(value, split_point.frozen_outputs(resnet, [name])(PIXELS), rtol=1e-4, atol=1e-4)


def test_every_batch_norm_of_a_frozen_resnet50_is_folded(resnet: Any) -> None:
    FrozenBase().apply(resnet)
    folded = batch_norm_folding.fold_frozen_batch_norm(model.base_of(resnet))
    kinds = [type(node.operation).__name__ for node in compat.functional_nodes(folded)]
    assert kinds.count("FoldedConvolution") == 53
    assert not {"Conv2D", "BatchNormalization"} & set(kinds)


@pytest.mark.parametrize(("train_batch_norm", "fuse"), [(False, False), (True, False), (True, True)])
def test_gradients_are_those_of_the_layers_as_they_were(small: Any, train_batch_norm: bool, fuse: bool) -> None:
    """And BatchNorm that trains sees batches, as one operation or several, and its statistics move alike."""
    import tensorflow as tf

    FrozenBase(12, train_batch_norm).apply(small)
    labels = np.arange(len(PIXELS)) % CLASSES

    def gradients(network: Any) -> tuple[list[Any], list[Any]]:
        trainable = [variable.value for variable in network.trainable_variables]
        other = [variable.value for variable in network.non_trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(trainable)
            logits, moved = network.stateless_call(trainable, other, PIXELS, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        paths = [variable.path for variable in network.non_trainable_variables]
        return tape.gradient(loss, trainable), [value for _, value in sorted(zip(paths, moved, strict=True))]

    whole = split_point.whole_network(small, fuse)
    kinds = [type(node.operation).__name__ for node in compat.functional_nodes(whole.get_layer(model.BASE_NAME))]
    assert ("FusedBatchNorm" in kinds) is fuse
    assert [variable.path for variable in whole.trainable_variables] == [
        variable.path for variable in small.trainable_variables
    ]
    for left, right in zip(gradients(small), gradients(whole), strict=True):
        for expected, value in zip(left, right, strict=True):
            scale = max(float(np.abs(expected).max()), 1e-2)
            np.testing.assert_allclose(value, expected, atol=1e-3 * scale)


@pytest.mark.parametrize("layers", [173, 174, 175])
def test_padding_alone_is_nothing_to_keep(resnet: Any, layers: int) -> None:
    """Below the first convolution of ResNet50 there is a layer without weights."""
    assert SplitPoint.of(resnet, FrozenBase(layers, train_batch_norm=True)) is None


def test_what_trains_whole_has_no_split_point(small: Any) -> None:
    assert SplitPoint.of(small, FrozenBase(len(model.base_of(small).layers), train_batch_norm=True)) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_folded_numbers_do_not_depend_on_the_policy_of_the_process(precision: str) -> None:
    """The scale is rounded once, whatever model the layer is called in."""
    import keras

    network = randomized(model.build_model(CLASSES, SIZE, config(), f"mixed_{precision}", small_base))
    FrozenBase().apply(network)
    found = [np.asarray(split_point.whole_network(network)(PIXELS))]
    keras.config.set_dtype_policy(f"mixed_{precision}")
    try:
        found.append(np.asarray(split_point.whole_network(network)(PIXELS)))
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(*found)


def test_a_convolution_that_others_read_is_not_folded() -> None:
    import keras

    inputs = keras.Input((8, 8, 3))
    shared = keras.layers.Conv2D(4, 3, name="shared")(inputs)
    normed = keras.layers.BatchNormalization(name="norm")(shared)
    network = randomized(keras.Model(inputs, keras.layers.Add()([shared, normed])))
    network.trainable = False
    folded = batch_norm_folding.fold_frozen_batch_norm(network)
    assert [type(node.operation).__name__ for node in compat.functional_nodes(folded)].count("FoldedConvolution") == 0
    pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(folded(pixels), network(pixels), atol=1e-6)
