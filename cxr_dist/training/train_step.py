"""The compiled training and evaluation steps, and the order in which a step does things.

A training step, on every replica:

1. forward and gradient of the replica's share of the loss (`gradients`);
2. one all-reduce of gradients, summed counts and BatchNorm statistics together;
3. unscaling, and a finite check of the reduced gradient, which is therefore the same on every replica;
4. clipping and the optimizer's update, or nothing at all when the check failed.

Keras's own pieces do 2 and 3 the other way round (`LossScaleOptimizer` looks at each replica's own
gradient, `global_clipnorm` clips before the reduction), which gives NaN weights or replicas that differ.

Many steps run in one call (`tf.function` with a loop over steps), so the host is asked once per call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import AugmentationConfig, StageConfig
from cxr_dist.model.variables import Variables
from cxr_dist.training import optimizers
from cxr_dist.training.gradients import Place, in_parts, make_gradient
from cxr_dist.training.loss_scale import LossScale
from cxr_dist.training.weight_average import WeightAverage

MOST_STEPS_PER_CALL = 100

# Rows of the summed counts that a call returns.
TOTALS = 6
LOSS, CORRECT, COUNT, SKIPPED, WAITED, OVERFLOWED = range(TOTALS)
"""WAITED: seconds in which a step was ready and its batch was not. OVERFLOWED: of the skipped steps, those that a lower
loss scale may have saved."""


@dataclass
class TrainStep:
    """The compiled steps of one stage. `traces` counts how often the loop was traced: once per stage."""

    run: Callable[..., npt.NDArray[np.float64]]
    """run(iterator, first_step, learning_rates float32 [n], totals float64 [TOTALS]) -> totals, these steps added.

    n is at most MOST_STEPS_PER_CALL; the rows are LOSS, CORRECT and so on. As the sum goes on where it was, step by
    step, it does not depend on how many steps there were in a call.
    """
    traces: list[str] = field(default_factory=list)


def make_train_step(
    strategy: Any,
    model: Any,
    optimizer: Any,
    stage: StageConfig,
    *,
    global_batch_size: int,
    classes: int,
    seed: int,
    augmentation: AugmentationConfig | None,
    class_weights: npt.NDArray[np.float32] | None,
    loss_scale: LossScale,
    xla: bool,
    accumulation_steps: int = 1,
    measure_wait: bool = True,
    average: WeightAverage | None = None,
) -> TrainStep:
    """Compile the training of `model`'s trainable variables (set them, and build the optimizer, first).

    `model` takes what the batches hold as `inputs`: images uint8 [B, S, S, 1], or pooled features
    float32 [B, 2048] for the head alone. `augmentation` is for images; None leaves them as they are. A replica's batch
    is taken in `accumulation_steps` parts. Every step that changes the weights moves `average`. Without `measure_wait`
    the row WAITED stays 0.
    """
    import tensorflow as tf

    variables = Variables.of(model)
    traces: list[str] = []
    compute = make_gradient(
        model,
        variables,
        global_batch_size=global_batch_size,
        classes=classes,
        label_smoothing=stage.label_smoothing,
        augmentation=augmentation,
        class_weights=class_weights,
    )
    # The part is what is compiled, not the loop over parts: the memory of one is then all that is planned for.
    compute = in_parts(tf.function(compute, jit_compile=True) if xla else compute, accumulation_steps, variables)

    def replica_step(batch: dict[str, Any], step: Any, scale: Any) -> tuple[list[Any], Any, list[Any], Any]:
        context = tf.distribute.get_replica_context()
        place = Place(tf.constant(seed, tf.int32), step, tf.cast(context.replica_id_in_sync_group, tf.int32))
        computed = compute(batch, place, scale, *variables.values())
        gradients, sums, statistics = _over_replicas(context, *computed)
        if loss_scale.dynamic:
            gradients = [gradient / scale for gradient in gradients]
        gradients, finite = _clipped(gradients, stage.clip_norm)
        return gradients, sums, statistics, finite & tf.reduce_all(tf.math.is_finite(sums))

    def now() -> Any:
        # A clock is no deterministic operation: TensorFlow refuses it where those alone are allowed.
        return tf.timestamp() if measure_wait else tf.constant(0.0, tf.float64)

    def first_of(value: Any) -> Any:
        """The value of the first local replica: all replicas have the same."""
        return strategy.experimental_local_results(value)[0]

    @tf.function
    def loop(iterator: Any, first_step: Any, count: Any, learning_rates: Any, totals: Any) -> Any:
        traces.append(f"{len(variables.trainable)} trainable variables")
        for index in tf.range(count):
            with tf.control_dependencies([totals]):  # the step before is done
                begun = now()
            with tf.control_dependencies([begun]):
                batch = next(iterator)
            with tf.control_dependencies([part["label"] for part in strategy.experimental_local_results(batch)]):
                waited = now() - begun
            gradients, sums, statistics, finite = strategy.run(
                replica_step, args=(batch, first_step + index, loss_scale.scale.read_value())
            )
            finite = first_of(finite)
            mendable = loss_scale.may_be_at_fault()
            loss_scale.update(finite)
            if finite:
                optimizers.update(
                    strategy,
                    optimizer,
                    variables.trainable,
                    gradients,
                    learning_rate=learning_rates[index],
                    weight_decay=stage.weight_decay,
                )
                if average is not None:
                    average.update(strategy)
                for position, statistic in zip(variables.statistics, statistics, strict=True):
                    strategy.extended.update(variables.other[position].value, _assign, args=(statistic,), group=False)
                totals += tf.concat([tf.cast(first_of(sums), tf.float64), [0.0, waited, 0.0]], 0)
            else:
                totals += tf.concat([tf.constant([0.0, 0.0, 0.0, 1.0], tf.float64), [waited, mendable]], 0)
        return totals

    def run(
        iterator: Any, first_step: int, learning_rates: npt.NDArray[np.float32], totals: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        # Of one length whatever the number of steps: another shape would trace the loop again.
        padded = np.zeros(MOST_STEPS_PER_CALL, np.float32)
        padded[: len(learning_rates)] = learning_rates
        count = tf.constant(len(learning_rates), tf.int32)
        begun = tf.constant(totals, tf.float64)
        result: npt.NDArray[np.float64] = loop(
            iterator, tf.constant(first_step, tf.int32), count, tf.constant(padded), begun
        ).numpy()
        return result

    return TrainStep(run, traces)


def _over_replicas(
    context: Any, gradients: list[Any], sums: Any, statistics: list[Any]
) -> tuple[list[Any], Any, list[Any]]:
    """Gradients and sums of all replicas together, and the mean of their BatchNorm statistics, in one reduction."""
    import tensorflow as tf

    replicas, count = context.num_replicas_in_sync, len(gradients)
    if replicas == 1:
        return gradients, sums, statistics
    reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [*gradients, sums, *statistics])
    return reduced[:count], reduced[count], [statistic / replicas for statistic in reduced[count + 1 :]]


def _clipped(gradients: list[Any], clip_norm: float | None) -> tuple[list[Any], Any]:
    """The gradients, of at most the global norm `clip_norm`, and whether they are finite.

    One pass over each serves both. A finite gradient above 1e19, whose square is not, counts as an overflow too.
    """
    import tensorflow as tf

    norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients]))
    if clip_norm:
        factor = clip_norm / tf.maximum(norm, clip_norm)
        gradients = [gradient * factor for gradient in gradients]
    return gradients, tf.math.is_finite(norm)


def _assign(variable: Any, value: Any) -> Any:
    return variable.assign(value)


def make_evaluation_step(
    strategy: Any, model: Any, classes: int, xla: bool, average: WeightAverage | None = None
) -> Callable[..., Any]:
    """run(iterator, steps) -> (confusion int64 [C, C] with true classes as rows, summed loss float).

    Inference mode, of the weights' `average` where there is one; masked slots count nowhere. The loss is the plain
    cross-entropy.
    """
    import tensorflow as tf

    variables = Variables.of(model)

    def forward(batch: dict[str, Any], trainable: list[Any], other: list[Any]) -> tuple[Any, Any]:
        inputs = tf.cast(batch["inputs"], tf.float32)
        logits, _ = model.stateless_call(trainable, other, inputs, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
        loss = tf.reduce_sum(tf.where(batch["mask"] > 0, losses, 0.0))
        predicted = tf.one_hot(tf.argmax(logits, -1), classes)
        true = tf.one_hot(batch["label"], classes) * batch["mask"][:, None]
        return tf.matmul(true, predicted, transpose_a=True), loss

    inner = tf.function(forward, jit_compile=True) if xla else forward

    def replica_step(batch: dict[str, Any]) -> tuple[Any, Any]:
        trainable, other = variables.values()
        return inner(batch, trainable if average is None else average.values(variables.trainable), other)

    @tf.function
    def loop(iterator: Any, steps: Any) -> tuple[Any, Any]:
        confusion, loss = tf.zeros([classes, classes], tf.float64), tf.zeros([], tf.float64)
        for _ in tf.range(steps):
            counts, batch_loss = strategy.run(replica_step, args=(next(iterator),))
            confusion += tf.cast(strategy.reduce(tf.distribute.ReduceOp.SUM, counts, axis=None), tf.float64)
            loss += tf.cast(strategy.reduce(tf.distribute.ReduceOp.SUM, batch_loss, axis=None), tf.float64)
        return confusion, loss

    def run(iterator: Any, steps: int) -> tuple[npt.NDArray[np.int64], float]:
        confusion, loss = loop(iterator, tf.constant(steps, tf.int32))
        return np.rint(confusion.numpy()).astype(np.int64), float(loss.numpy())

    return run
