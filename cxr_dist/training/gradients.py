"""A replica's gradient of its share of the loss: one pure function of tensors, which is what XLA may compile.

The batch may be taken in parts, one behind another (gradient accumulation): their gradients are summed, so that the
update is that of the whole batch, and the memory that of a part. BatchNorm that trains sees a part at a time, as it
does on as many replicas, and so dropout draws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import AugmentationConfig
from cxr_dist.data import augmentation as augment
from cxr_dist.model.variables import Variables

# Domains of the counter-based random numbers, so that no two uses share a stream.
_AUGMENTATION, _DROPOUT = 1, 2


class Place(NamedTuple):
    """Which of all random streams a gradient draws from: scalars, int32."""

    seed: Any
    step: Any
    replica: Any
    """Or, of a batch in parts, replica * parts + part."""


class Gradient(NamedTuple):
    """What a replica knows after its batch, before it hears of the others."""

    gradients: list[Any]
    """Of the scaled loss, summed over the images and divided by the global batch size."""
    sums: Any
    """float32 [3]: loss, correct answers and images, of the images that are not padding."""
    statistics: list[Any]
    """New moving statistics, float32, in the order of `Variables.statistics`."""


GradientFunction = Callable[[dict[str, Any], Place, Any, list[Any], list[Any]], Gradient]
"""(batch, place, loss scale, values of the trainable variables, of the others) -> Gradient."""


def make_gradient(
    model: Any,
    variables: Variables,
    *,
    global_batch_size: int,
    classes: int,
    label_smoothing: float,
    augmentation: AugmentationConfig | None,
    class_weights: npt.NDArray[np.float32] | None,
) -> GradientFunction:
    """The gradient function of `model`, for batches as `pipeline.worker_batches` makes them."""
    import tensorflow as tf

    weights = np.ones(classes, np.float32) if class_weights is None else class_weights

    def gradient(batch: dict[str, Any], place: Place, scale: Any, trainable: list[Any], other: list[Any]) -> Gradient:
        inputs = tf.cast(batch["inputs"], tf.float32)
        if augmentation is not None:
            stream = tf.stack([place.seed, place.step * 4 + _AUGMENTATION])
            draws = augment.draw(stream, batch["slot"], global_batch_size)
            inputs = augment.augment(inputs, draws, augmentation)
        other = list(other)
        for number, index in enumerate(variables.seeds):
            # Every layer, replica and step has a stream of its own, which no checkpoint has to hold.
            stream = tf.stack([place.seed + 7919 * (number + 1) + 104729 * place.replica, place.step * 4 + _DROPOUT])
            other[index] = tf.cast(stream, other[index].dtype)
        target = tf.one_hot(batch["label"], classes)
        smoothed = target * (1.0 - label_smoothing) + label_smoothing / classes
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trainable)
            logits, other = model.stateless_call(trainable, other, inputs, training=True)
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)
            losses *= batch["mask"] * tf.gather(tf.constant(weights), batch["label"])
            loss = tf.reduce_sum(losses)
            scaled = loss / global_batch_size * scale
        gradients = tape.gradient(scaled, trainable)
        hit = tf.cast(tf.argmax(logits, -1, tf.int32) == batch["label"], tf.float32)
        sums = tf.stack([loss, tf.reduce_sum(hit * batch["mask"]), tf.reduce_sum(batch["mask"])])
        return Gradient(gradients, sums, [tf.cast(other[index], tf.float32) for index in variables.statistics])

    return gradient


def in_parts(gradient: GradientFunction, parts: int, variables: Variables) -> GradientFunction:
    """`gradient` of a batch that is taken in so many equal parts, one after another."""
    import tensorflow as tf

    if parts == 1:
        return gradient

    def accumulated(
        batch: dict[str, Any], place: Place, scale: Any, trainable: list[Any], other: list[Any]
    ) -> Gradient:
        divided = {name: tf.reshape(value, (parts, -1, *value.shape[1:])) for name, value in batch.items()}

        def add(part: Any, total: Gradient) -> tuple[Any, Gradient]:
            # The next part's BatchNorm goes on from the statistics of the one before.
            values = list(other)
            for index, statistic in zip(variables.statistics, total.statistics, strict=True):
                values[index] = tf.cast(statistic, values[index].dtype)
            own = place._replace(replica=place.replica * parts + part)
            found = gradient({name: value[part] for name, value in divided.items()}, own, scale, trainable, values)
            gradients = [before + new for before, new in zip(total.gradients, found.gradients, strict=True)]
            return part + 1, Gradient(gradients, total.sums + found.sums, found.statistics)

        nothing = Gradient(
            [tf.zeros_like(value) for value in trainable],
            tf.zeros(3),
            [tf.cast(other[index], tf.float32) for index in variables.statistics],
        )
        _, total = tf.while_loop(lambda part, _: part < parts, add, (tf.constant(0), nothing), parallel_iterations=1)
        return Gradient(*total)

    return accumulated
