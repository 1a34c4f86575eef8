"""A finished run as a function: gray images in, calibrated probabilities out."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.distributed.devices import prepare_devices
from cxr_dist.distributed.precision import dtype_policy, resolve_precision
from cxr_dist.model import split_point
from cxr_dist.model.resnet import FrozenBase, build_model
from cxr_dist.runs import run_folder
from cxr_dist.runs.calibration_file import Calibration, read_calibration
from cxr_dist.runs.checkpoints import CheckpointFolder, restore_model
from cxr_dist.runs.run_folder import FinishedRun, read_finished, weights_file
from cxr_dist.runs.typical_images import TypicalImages, read_typical
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.seal import check_seal

BATCH_SIZE = 32


def load_model(run: FinishedRun, precision: str) -> Any:
    """The run's network with its weights, all of the base frozen: image float32 [B, S, S, 1] -> logits [B, C].

    Args:
        precision: float32, bfloat16 or float16, of base and head; the logits are float32.

    Raises:
        UserError: the weights are damaged, or of another network.
    """
    model = build_model(len(run.info.class_names), run.info.image_size, run.config, dtype_policy(precision))
    path = weights_file(run.folder) or run.folder / run_folder.MODEL
    try:
        check_seal(path)  # Keras does not read the zip's members to their ends, where their CRCs are
        if path.name == run_folder.MODEL:
            model.load_weights(path)
        else:
            restore_model(model, CheckpointFolder(path.parent).load_best(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be loaded ({one_line(error)}); train the run again") from None
    FrozenBase().apply(model)
    return model


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    predicted: str
    """The class of the highest probability."""
    abstained: bool
    """The class is not to be relied on."""
    probabilities: dict[str, float]
    """Calibrated, by class, in the run's order."""
    reason: str | None = None
    """Why it abstains."""


class Classifier:
    """Predictions for gray images, on one device.

    Attributes:
        class_names: C names, in the order of the probabilities.
        image_size: S, pixels.
        calibration: Of the run, or one that changes nothing.
        typical: What the run's training images have in common; None where the run does not say.
        model: The Keras model, image float32 [B, S, S, 1] -> logits [B, C], for whoever asks where it looks.
    """

    def __init__(
        self,
        class_names: tuple[str, ...],
        image_size: int,
        calibration: Calibration,
        forward: Callable[[npt.NDArray[np.uint8]], Any],
        model: Any,
        typical: TypicalImages | None = None,
    ) -> None:
        self.class_names, self.image_size, self.calibration, self.model = class_names, image_size, calibration, model
        self.typical = typical
        self._forward = forward

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """softmax(logits / temperature) of uint8 [B, S, S], float32 [B, C]; any B, in one step.

        Raises:
            ValueError: other shapes or another dtype.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {images.dtype} {images.shape}, not uint8 [B, {self.image_size}, ...]")
        return self._forward(images).numpy()

    def predict(self, images: npt.NDArray[np.uint8]) -> list[Prediction]:
        """A prediction for each of uint8 [B, S, S]."""
        probabilities = self.probabilities(images)
        unlike = [None] * len(images) if self.typical is None else self.typical.unlike(images)
        return [self.prediction(row, kind) for row, kind in zip(probabilities, unlike, strict=True)]

    def prediction(self, probabilities: npt.NDArray[np.float32], unlike: str | None = None) -> Prediction:
        """Of probabilities float32 [C], for an image that is unlike the training images for this reason, if any."""
        top = int(np.argmax(probabilities))
        reason = None
        if unlike is not None:
            reason = f"unlike the training images: {unlike}"
        elif float(probabilities[top]) < self.calibration.abstain_threshold:
            reason = "probability below the threshold"
        by_class = {name: float(value) for name, value in zip(self.class_names, probabilities, strict=True)}
        return Prediction(self.class_names[top], reason is not None, by_class, reason)


def load_classifier(run: Path, precision: str | None = None) -> Classifier:
    """The classifier of a finished run, on the first GPU or the CPU. Compiles at the first batch.

    Without XLA, which would compile anew for every number of images.

    Args:
        precision: By default the run's own, which evaluate takes too.

    Raises:
        UserError: the run is not finished, or something in its folder is damaged.
    """
    found = read_finished(run)
    calibration = read_calibration(run) or Calibration()
    topology = prepare_devices(1)
    model = load_model(found, precision or resolve_precision(found.config.precision, topology.kind))
    forward = calibrated(split_point.whole_network(model), found.info.image_size, calibration.temperature)
    return Classifier(found.info.class_names, found.info.image_size, calibration, forward, model, read_typical(run))


def calibrated(network: Any, image_size: int, temperature: float) -> Any:
    """A compiled function uint8 [B, S, S] -> softmax(logits / temperature), float32 [B, C], traced once for any B."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size], tf.uint8, name="images")])
    def forward(images: Any) -> Any:
        logits = network(tf.cast(images, tf.float32)[..., None], training=False)
        return tf.nn.softmax(tf.cast(logits, tf.float32) / temperature)

    return forward
