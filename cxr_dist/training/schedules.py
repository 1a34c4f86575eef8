"""What a stage does at each step, as pure functions of its row in the configuration."""

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import StageConfig


def learning_rates(stage: StageConfig, steps_per_epoch: int) -> npt.NDArray[np.float32]:
    """The learning rate of every step of the stage: float32 [epochs * steps_per_epoch].

    Linear warm-up from zero, which reaches the peak with its last step, then constant or half a cosine
    (Loshchilov and Hutter 2017, without restarts) that ends just above zero.
    """
    total = stage.epochs * steps_per_epoch
    peak = stage.learning_rate
    if peak is None:
        raise ValueError("the stage has no learning rate: the configuration was not resolved")
    warmup = min(round(stage.warmup_epochs * steps_per_epoch), total)
    step = np.arange(total, dtype=np.float64)
    factor = np.ones(total)
    if stage.schedule == "cosine":
        factor = 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(total - warmup, 1)))
    factor[:warmup] = (step[:warmup] + 1) / max(warmup, 1)
    return (peak * factor).astype(np.float32)


def class_weights(labels: npt.NDArray[np.int32], classes: int) -> npt.NDArray[np.float32]:
    """Weights inverse to the class frequencies, float32 [classes], whose mean over the images is 1."""
    counts = np.bincount(labels, minlength=classes)
    if counts.shape != (classes,) or not counts.all():
        raise ValueError(f"every class needs training images; counts are {counts.tolist()}")
    return (len(labels) / (classes * counts)).astype(np.float32)
