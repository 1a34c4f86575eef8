"""ResNet50 and its head, what of it trains, and the weights it starts from.

    image [B, S, S, 1] 0..255 -> preprocessing -> base [B, S/32, S/32, 2048] -> pool [B, 2048] -> head -> logits [B, C]

The preprocessing (three equal channels, minus the ImageNet mean) is part of the network and has no
parameters, so `resnet.keras` takes gray pixels as they are. With four classes: 24,122,500 parameters.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.runs.versions import unsupported
from tfrecords_builder.common.errors import UserError, one_line

FEATURES = 2048
HIDDEN_UNITS = 256
IMAGENET_MEAN_BGR = (103.939, 116.779, 123.68)
"""What `keras.applications.resnet50.preprocess_input` subtracts; a gray image needs no swap of channels."""

IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
    "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"
"""Both as in Keras's own `applications/resnet.py`."""
SOME_LAYERS = ("conv1_conv", "conv5_block3_3_conv")
"""First and last of the layers of ResNet50 with weights: what a glance at a file looks for."""
TOP_LAYERS = frozenset({"predictions", "probs", "fc1000"})
"""What Keras has called the layer of a thousand classes."""
_OF_RESNET50 = re.compile(r"conv1_(conv|bn)|conv(2_block[1-3]|3_block[1-4]|4_block[1-6]|5_block[1-3])_[0-3]_(conv|bn)")
_RIGHT_FILE = (
    f"give Keras's file without top ({PurePosixPath(IMAGENET_URL).name}, MD5 {IMAGENET_MD5}), imagenet, or none"
)

IMAGE_NAME = "image"
TO_BGR_NAME = "gray_to_bgr"
MEAN_NAME = "subtract_mean"
BASE_NAME = "resnet50"
POOL_NAME = "pool"
HEAD_NAME = "head"


def resnet50(image_size: int) -> Any:
    """Keras's ResNet50 without top, with fresh weights."""
    import keras

    return keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(image_size, image_size, 3), name=BASE_NAME
    )


def build_model(
    classes: int,
    image_size: int,
    config: Config,
    policy: str,
    make_base: Callable[[int], Any] | None = None,
    seed: int | None = None,
) -> Any:
    """The classifier with fresh weights, a `keras.Model`; load weights with `load_base_weights`.

    Made of two models, `base` and `head`, so that either can be run alone.

    Args:
        classes: C, the number of logits.
        image_size: S, pixels.
        policy: Keras dtype policy of base and head; the logits are float32 always.
        make_base: image size -> a model named BASE_NAME, [B, S, S, 3] -> [B, h, w, 2048]; None: `resnet50`.
        seed: Of the fresh weights; None takes the process's own random numbers.

    Raises:
        UserError: the installed Keras does not take the settings of BatchNorm.
    """
    import keras

    with _process_state(policy, seed):
        base = (make_base or resnet50)(image_size)
        head = _head(keras, classes, config.model.dropout)
        image = keras.Input((image_size, image_size, 1), name=IMAGE_NAME, dtype="float32")
        # In float32 under every policy: bfloat16 has too few bits for a pixel minus a mean.
        x = keras.layers.Concatenate(name=TO_BGR_NAME, dtype="float32")([image, image, image])
        x = keras.layers.Rescaling(1.0, offset=[-mean for mean in IMAGENET_MEAN_BGR], name=MEAN_NAME, dtype="float32")(
            x
        )
        pooled = keras.layers.GlobalAveragePooling2D(name=POOL_NAME, dtype="float32")(base(x))
        model = keras.Model(image, head(pooled), name="cxr_classifier")
    if config.model.weights == "none":
        _start_residual_blocks_as_identity(base)
    _set_batch_norm(model, config.model.batch_norm_momentum, config.model.synchronize_batch_norm)
    return model


def _set_batch_norm(model: Any, momentum: float, synchronized: bool) -> None:
    """Set what Keras's ResNet50 takes no argument for.

    Raises:
        UserError: the layers do not take the settings over. They would train with those of Keras.
    """
    wanted = {"momentum": momentum, "synchronized": synchronized}
    for layer in batch_norm_layers(model):
        layer.momentum, layer.synchronized = momentum, synchronized
        taken = layer.get_config()
        for name, value in wanted.items():
            if taken.get(name) != value:
                raise unsupported("keras", f"BatchNormalization has {name} {taken.get(name)} where {value} was set")


@contextmanager
def _process_state(policy: str, seed: int | None) -> Iterator[None]:
    """Keras's policy, and the random seed if one is given, for the layers that are made in the block.

    Afterwards the policy and the global generators of Python and NumPy are what they were before. The seeds of
    TensorFlow and Keras stay set: there is no public way to read what they were.
    """
    import random

    import keras
    import numpy as np

    before = keras.config.dtype_policy(), random.getstate(), np.random.get_state()
    keras.config.set_dtype_policy(policy)
    if seed is not None:
        keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _start_residual_blocks_as_identity(base: Any) -> None:
    """Zero the scale of the last BatchNorm of every residual branch (Goyal et al. 2017, section 5.1).

    From random weights the network then learns from the first epoch on small data, where without it the loss
    stays near chance for several.
    """
    for layer in base.layers:
        if layer.name.endswith("_3_bn"):
            layer.gamma.assign([0.0] * layer.gamma.shape[0])


def _head(keras: Any, classes: int, dropout: float) -> Any:
    layers = keras.layers
    inputs = keras.Input((FEATURES,), name="features", dtype="float32")
    x = layers.BatchNormalization(name="head_bn_1")(inputs)
    x = layers.Dropout(dropout, name="head_dropout_1")(x)
    x = layers.Dense(HIDDEN_UNITS, activation="relu", name="head_dense")(x)
    x = layers.BatchNormalization(name="head_bn_2")(x)
    x = layers.Dropout(dropout, name="head_dropout_2")(x)
    x = layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(inputs, x, name=HEAD_NAME)


def base_of(model: Any) -> Any:
    return model.get_layer(BASE_NAME)


def head_of(model: Any) -> Any:
    return model.get_layer(HEAD_NAME)


def batch_norm_layers(model: Any) -> list[Any]:
    """The BatchNorm layers of base and head, in order."""
    import keras

    return [
        layer
        for part in (base_of(model), head_of(model))
        for layer in part.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


NEW_KEYS = {
    "renorm": ("renorm", "renorm_clipping", "renorm_momentum"),
    "quantization_config": ("quantization_config",),
}
"""By the switch that is off here: what Keras before 3.15 does not know in a layer's config."""


def name_what_older_keras_knows(model: Any) -> None:
    """Leave out of a trained model's config what Keras before 3.15 refuses to load, before the model is saved.

    Initializers (`input_axes` is new) serve training from scratch alone; the other new keys say what is not done.
    """
    import keras

    zeros = keras.initializers.serialize(keras.initializers.Zeros())
    for part in (base_of(model), head_of(model)):
        for layer in part.layers:
            config = layer.get_config()
            if "kernel_initializer" in config:
                config["kernel_initializer"] = zeros
            for switch, keys in NEW_KEYS.items():
                if not config.get(switch):
                    config = {key: value for key, value in config.items() if key not in keys}
            layer.get_config = partial(dict, config)


@dataclass(frozen=True)
class FrozenBase:
    """Which part of the base is frozen; the head always trains."""

    unfreeze_layers: int = 0
    """Upper layers of the base that train."""
    train_batch_norm: bool = False
    """Whether their BatchNorm trains too. Frozen, it runs in inference mode, whatever a call says: Keras ties that to
    `trainable`."""

    @classmethod
    def of(cls, stage: StageConfig, config: Config) -> "FrozenBase":
        """Of a stage. Without pretrained weights there are no statistics worth keeping, so BatchNorm trains."""
        return cls(stage.unfreeze_layers, config.model.batch_norm == "train" or config.model.weights == "none")

    def trained(self, base: Any) -> set[str]:
        """Names of the layers of `base` that train."""
        import keras

        upper = base.layers[max(len(base.layers) - self.unfreeze_layers, 0) :]
        norm = keras.layers.BatchNormalization
        return {layer.name for layer in upper if self.train_batch_norm or not isinstance(layer, norm)}

    def apply(self, model: Any) -> None:
        """Set what trains in `model`."""
        base = base_of(model)
        trained = self.trained(base)
        head_of(model).trainable = True
        base.trainable = True  # the containers' own flags would hide their layers'
        for layer in base.layers:
            layer.trainable = layer.name in trained


def check_weights(weights: str) -> None:
    """Fail early, in words, when the weights cannot be had. Downloads `imagenet` into Keras's cache.

    Raises:
        UserError: the file is missing or of another network, or the download failed.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        _imagenet_file()
        return
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"model.weights {weights}: no such file; give a .h5 file, imagenet, or none")
    _check_layers(path, SOME_LAYERS)


def load_base_weights(model: Any, weights: str) -> None:
    """Fill the base: `imagenet`, a path to Keras's ResNet50 weights without top, or `none` (as it is).

    Raises:
        UserError: the file is missing, unreadable, or of another network.
    """
    if weights == "none":
        return
    base = base_of(model)
    path = _imagenet_file() if weights == "imagenet" else Path(weights).expanduser()
    try:
        _check_layers(path, (layer.name for layer in base.layers if layer.weights))
        base.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.weights {path}: not the weights of ResNet50 without top ({one_line(error)}); {_RIGHT_FILE}"
        ) from None


def _check_layers(path: Path, expected: Iterable[str]) -> None:
    """Keras loads such files by order, so one of another network can pass for ours: compare the names."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            present = {name for name in group if len(group[name].attrs.get("weight_names", ())) or len(group[name])}
    except OSError as error:
        raise UserError(
            f"model.weights {path}: cannot be read as HDF5 ({str(error).splitlines()[0]}); give an intact .h5 file, "
            "imagenet, or none"
        ) from None
    if present & TOP_LAYERS:
        raise UserError(f"model.weights {path}: weights of a network with its top; {_RIGHT_FILE}")
    missing = [f"no layer {name}" for name in expected if name not in present]
    others = [f"a layer {name}" for name in sorted(present) if not _OF_RESNET50.fullmatch(name)]
    if missing or others:
        raise UserError(f"model.weights {path}: weights of another network ({(missing + others)[0]}); {_RIGHT_FILE}")


def _imagenet_file() -> Path:
    """Keras's file of ImageNet weights without top, downloaded at first use. Starts no TensorFlow device."""
    import keras

    try:
        return Path(keras.utils.get_file(origin=IMAGENET_URL, cache_subdir="models", file_hash=IMAGENET_MD5))
    except Exception as error:  # noqa: BLE001 - Keras raises bare Exception for a failed download
        raise UserError(
            f"model.weights imagenet: the download failed ({one_line(error)}); without a network, give a path to the "
            "weights (--set model.weights=PATH), or none to train from scratch"
        ) from None
