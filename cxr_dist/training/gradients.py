"""A replica's gradient of its share of the loss: one pure function of tensors, which is what XLA may compile.

With gradient accumulation the batch is taken in microbatches, one after another, and their gradients are summed: the
update is that of the whole batch, the memory that of a microbatch. BatchNorm that trains and dropout see one microbatch
at a time, as on as many replicas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import AugmentationConfig
from cxr_dist.data import augmentation as augment
from cxr_dist.data.resident import looked_up
from cxr_dist.model.variables import Variables

# Domains of the counter-based random numbers, so that no two uses share a stream.
_AUGMENTATION, _DROPOUT = 1, 2


@dataclass(frozen=True, eq=False)
class StepSpec:
    """What a training step computes, beside the network and its state."""

    global_batch_size: int
    classes: int
    seed: int
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    """Largest global norm of the reduced gradient."""
    weight_decay: float = 0.0
    augmentation: AugmentationConfig | None = None
    """Of images; None leaves the inputs as they are."""
    class_weights: npt.NDArray[np.float32] | None = None
    """float32 [classes]; None weights all alike."""
    accumulation_steps: int = 1
    """Microbatches in which a replica takes its share of the batch."""
    xla: bool = False
    """Whether XLA compiles forward and backward pass."""
    xla_update: bool = False
    """Whether XLA compiles the update where it does not compile the whole step."""
    measure_wait: bool = True
    """Whether to measure how long steps wait for their batch: with a clock, which is no deterministic operation."""


class RngKey(NamedTuple):
    """Which of all random streams a gradient draws from: scalars, int32."""

    seed: Any
    step: Any
    replica: Any
    """With microbatches, replica * accumulation_steps + microbatch."""


class Gradient(NamedTuple):
    """What a replica computed of its batch, before the reduction."""

    gradients: list[Any]
    """Of the scaled loss, summed over the images and divided by the global batch size."""
    sums: Any
    """float32 [3]: loss, correct answers and images, of the images that are not padding."""
    statistics: list[Any]
    """New moving statistics, float32, in the order of `Variables.statistics`."""


GradientFunction = Callable[[dict[str, Any], Any, RngKey, Any, list[Any], list[Any]], Gradient]
"""(batch, table, key, loss scale, values of the trainable variables, of the others) -> Gradient.

The table is that of `resident.looked_up`.
"""


def make_gradient(model: Any, variables: Variables, spec: StepSpec) -> GradientFunction:
    """The gradient function of `model`, for batches as `pipeline.worker_batches` makes them."""
    import tensorflow as tf

    classes, smoothing = spec.classes, spec.label_smoothing
    weights = np.ones(classes, np.float32) if spec.class_weights is None else spec.class_weights

    def gradient(
        batch: dict[str, Any], table: Any, key: RngKey, scale: Any, trainable: list[Any], other: list[Any]
    ) -> Gradient:
        inputs = tf.cast(looked_up(batch["inputs"], table), tf.float32)
        if spec.augmentation is not None:
            stream = tf.stack([key.seed, key.step * 4 + _AUGMENTATION])
            draws = augment.draw(stream, batch["slot"], spec.global_batch_size)
            inputs = augment.augment(inputs, draws, spec.augmentation)
        other = list(other)
        for number, index in enumerate(variables.seeds):
            # Every layer, replica and step has a stream of its own, which no checkpoint has to hold.
            stream = tf.stack([key.seed + 7919 * (number + 1) + 104729 * key.replica, key.step * 4 + _DROPOUT])
            other[index] = tf.cast(stream, other[index].dtype)
        target = tf.one_hot(batch["label"], classes)
        smoothed = target * (1.0 - smoothing) + smoothing / classes
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            logits, other = model.stateless_call(trainable, other, inputs, training=True)
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)
            losses *= batch["mask"] * tf.gather(tf.constant(weights), batch["label"])
            loss = tf.reduce_sum(losses)
            scaled = loss / spec.global_batch_size * scale
        gradients = tape.gradient(scaled, trainable)
        hit = tf.cast(tf.argmax(logits, -1, tf.int32) == batch["label"], tf.float32)
        sums = tf.stack([loss, tf.reduce_sum(hit * batch["mask"]), tf.reduce_sum(batch["mask"])])
        return Gradient(gradients, sums, [tf.cast(other[index], tf.float32) for index in variables.statistics])

    return gradient


def accumulate_gradients(gradient: GradientFunction, microbatches: int, variables: Variables) -> GradientFunction:
    """`gradient` of a batch that is taken in so many equal microbatches, one after another."""
    import tensorflow as tf

    if microbatches == 1:
        return gradient

    def accumulated(
        batch: dict[str, Any], table: Any, key: RngKey, scale: Any, trainable: list[Any], other: list[Any]
    ) -> Gradient:
        divided = {name: tf.reshape(value, (microbatches, -1, *value.shape[1:])) for name, value in batch.items()}

        def add(number: Any, total: Gradient) -> tuple[Any, Gradient]:
            # The next microbatch's BatchNorm starts from the statistics of the one before.
            values = list(other)
            for index, statistic in zip(variables.statistics, total.statistics, strict=True):
                values[index] = tf.cast(statistic, values[index].dtype)
            own = key._replace(replica=key.replica * microbatches + number)
            microbatch = {name: value[number] for name, value in divided.items()}
            new = gradient(microbatch, table, own, scale, trainable, values)
            gradients = [before + added for before, added in zip(total.gradients, new.gradients, strict=True)]
            return number + 1, Gradient(gradients, total.sums + new.sums, new.statistics)

        zero = Gradient(
            [tf.zeros_like(value) for value in trainable],
            tf.zeros(3),
            [tf.cast(other[index], tf.float32) for index in variables.statistics],
        )
        _, total = tf.while_loop(
            lambda number, _: number < microbatches, add, (tf.constant(0), zero), parallel_iterations=1
        )
        return Gradient(*total)

    return accumulated
