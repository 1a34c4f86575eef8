"""The compiled training and evaluation steps, and the order in which a step does things.

A training step, on every replica:

1. forward and gradient of the replica's share of the loss (`gradients`);
2. one all-reduce of gradients, summed counts and BatchNorm statistics together;
3. unscaling, and a finite check of the reduced gradient, which is therefore the same on every replica;
4. clipping and the optimizer's update, or nothing at all when the check failed.

Keras's own pieces do 2 and 3 the other way round (`LossScaleOptimizer` looks at each replica's own
gradient, `global_clipnorm` clips before the reduction), which gives NaN weights or replicas that differ.

Many steps run in one call (`tf.function` with a loop over steps), so the host is asked once per call.

With XLA and one replica, 1 to 4 are one program of the device: an update of ResNet50 is else 2,000 operations that the
host starts one by one. Collectives do not compile, so several replicas have one program before the reduction and one
after it. So have microbatches, as the memory of a program with a loop over them is planned for the whole batch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.resident import looked_up
from cxr_dist.distributed.strategy import update_replicas
from cxr_dist.model.variables import Variables
from cxr_dist.training import optimizers
from cxr_dist.training.gradients import RngKey, StepSpec, accumulate_gradients, make_gradient
from cxr_dist.training.stage_state import StageState, WeightAverage

MAX_STEPS_PER_CALL = 100

# Rows of the summed counts that a call returns.
TOTALS = 6
LOSS, CORRECT, COUNT, SKIPPED, WAITED, OVERFLOWED = range(TOTALS)
"""WAITED: seconds in which a step was ready and its batch was not. OVERFLOWED: of the skipped steps, those that a lower
loss scale may have saved."""


class TrainStep:
    """The compiled steps of one stage; made by `make_train_step`."""

    def __init__(self, network: Any, state: StageState, spec: StepSpec, table: Any) -> None:
        import tensorflow as tf

        self.traces = 0
        """How often the loop was traced: once a stage."""
        self._state, self._spec, self._table, strategy = state, spec, table, state.strategy
        self._variables = variables = Variables.of(network)
        self._is_one_program = spec.xla and strategy.num_replicas_in_sync == 1 and spec.accumulation_steps == 1
        gradient = make_gradient(network, variables, spec)
        # A microbatch is what is compiled, not the loop over them: the memory of one is then all that is planned for.
        gradient = tf.function(gradient, jit_compile=True) if spec.xla and not self._is_one_program else gradient
        self._gradient = accumulate_gradients(gradient, spec.accumulation_steps, variables)
        self._program = tf.function(self._step_without_branch, jit_compile=True)
        self._compiled_loop = tf.function(self._loop)

    def run(
        self,
        iterator: Any,
        first_step: int,
        learning_rates: npt.NDArray[np.float32],
        totals: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float64]:
        """Train a step for each of `learning_rates`, float32 [n], with n up to MAX_STEPS_PER_CALL.

        Returns:
            `totals`, float64 [TOTALS] (the rows are LOSS, CORRECT and so on), with these steps added one by one: the
            sum does not depend on how many steps there were in a call.
        """
        import tensorflow as tf

        # Of one length whatever the number of steps: another shape would trace the loop again.
        padded = np.zeros(MAX_STEPS_PER_CALL, np.float32)
        padded[: len(learning_rates)] = learning_rates
        result: npt.NDArray[np.float64] = self._compiled_loop(
            iterator,
            tf.constant(first_step, tf.int32),
            tf.constant(len(learning_rates), tf.int32),
            tf.constant(padded),
            tf.constant(totals, tf.float64),
        ).numpy()
        return result

    def _loop(self, iterator: Any, first_step: Any, count: Any, learning_rates: Any, totals: Any) -> Any:
        import tensorflow as tf

        strategy, loss_scale = self._state.strategy, self._state.loss_scale
        self.traces += 1
        for index in tf.range(count):
            with tf.control_dependencies([totals]):  # the step before is done
                begun = self._now()
            with tf.control_dependencies([begun]):
                batch = next(iterator)
            with tf.control_dependencies([part["label"] for part in strategy.experimental_local_results(batch)]):
                waited = self._now() - begun
            step = self._program if self._is_one_program else self._step
            sums, finite = step(batch, first_step + index, learning_rates[index], loss_scale.scale.read_value())
            mendable = loss_scale.may_be_at_fault()
            loss_scale.update(finite)
            counts = tf.cast(sums, tf.float64)
            skipped = tf.cast(~finite, tf.float64)
            totals += tf.concat([counts, [skipped, waited, skipped * mendable]], 0)
        return totals

    def _step(self, batch: Any, step: Any, learning_rate: Any, scale: Any) -> tuple[Any, Any]:
        """Sums of the step, float32 [3] and zero where it was skipped, and whether it was finite, bool."""
        import tensorflow as tf

        gradients, sums, statistics, finite = self._state.strategy.run(
            self._replica_step, args=(batch, self._table, step, scale)
        )
        sums, finite = self._first_of(sums), self._first_of(finite)
        if finite:
            self._apply(gradients, statistics, learning_rate, compiled=self._spec.xla_update)
        else:
            sums = tf.zeros_like(sums)
        return sums, finite

    def _step_without_branch(self, batch: Any, step: Any, learning_rate: Any, scale: Any) -> tuple[Any, Any]:
        """As `_step`, of one replica. What is not finite is computed and not kept: a branch would wait for the host."""
        import tensorflow as tf

        gradients, sums, statistics, finite = self._state.strategy.run(
            self._replica_step, args=(batch, self._table, step, scale)
        )
        changed = [*self._state.updated_variables(), *self._statistics_variables()]
        before = [variable.read_value() for variable in changed]
        self._apply(gradients, statistics, learning_rate, compiled=False)
        for variable, value in zip(changed, before, strict=True):
            variable.assign(tf.where(finite, variable.read_value(), value))
        return tf.where(finite, sums, tf.zeros_like(sums)), finite

    def _replica_step(
        self, batch: dict[str, Any], table: Any, step: Any, scale: Any
    ) -> tuple[list[Any], Any, list[Any], Any]:
        """Reduced gradients, sums and statistics, and whether the gradients and sums are finite."""
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        key = RngKey(tf.constant(self._spec.seed, tf.int32), step, tf.cast(context.replica_id_in_sync_group, tf.int32))
        computed = self._gradient(batch, table, key, scale, *self._variables.values())
        gradients, sums, statistics = _over_replicas(context, *computed)
        if self._state.loss_scale.dynamic:
            gradients = [gradient / scale for gradient in gradients]
        gradients, finite = _clipped(gradients, self._spec.clip_norm)
        return gradients, sums, statistics, finite & tf.reduce_all(tf.math.is_finite(sums))

    def _apply(self, gradients: list[Any], statistics: list[Any], learning_rate: Any, compiled: bool) -> None:
        """Update the weights, their moving average, and the statistics of BatchNorm; outside the replicas."""
        strategy = self._state.strategy
        optimizers.update(
            strategy,
            self._state.optimizer,
            self._variables.trainable,
            gradients,
            learning_rate=learning_rate,
            weight_decay=self._spec.weight_decay,
            compiled=compiled,
        )
        if self._state.average is not None:
            self._state.average.update(strategy, compiled)
        update_replicas(strategy, _assign, self._statistics_variables(), statistics, compiled=compiled)

    def _statistics_variables(self) -> list[Any]:
        return [self._variables.other[index].value for index in self._variables.statistics]

    def _now(self) -> Any:
        import tensorflow as tf

        # A clock is no deterministic operation: TensorFlow refuses it where those alone are allowed.
        return tf.timestamp() if self._spec.measure_wait else tf.constant(0.0, tf.float64)

    def _first_of(self, value: Any) -> Any:
        """The value of the first local replica: all replicas have the same."""
        return self._state.strategy.experimental_local_results(value)[0]


def make_train_step(network: Any, state: StageState, spec: StepSpec, table: Any = None) -> TrainStep:
    """The training of `network`'s trainable variables.

    Args:
        network: From what the batches hold as `inputs` (images uint8 [B, S, S, 1], or what the frozen layers make of
            them, float32 [B, ...]) to logits [B, classes].
        state: Made after what trains was set. Every step that changes the weights moves its average.
        spec: What the step computes.
        table: Of the inputs, where batches hold their positions: see `resident.table_of`.
    """
    return TrainStep(network, state, spec, table)


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


def _assign(variables: list[Any], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def make_evaluation_step(
    strategy: Any, model: Any, classes: int, xla: bool, average: WeightAverage | None = None, table: Any = None
) -> Callable[..., Any]:
    """run(iterator, steps) -> (confusion int64 [C, C] with true classes as rows, summed loss float).

    Inference mode, of the weights' `average` where there is one; masked slots count nowhere. The loss is the plain
    cross-entropy. `table` as in `make_train_step`.
    """
    import tensorflow as tf

    variables = Variables.of(model)

    def forward(batch: dict[str, Any], rows: Any, trainable: list[Any], other: list[Any]) -> tuple[Any, Any]:
        inputs = tf.cast(looked_up(batch["inputs"], rows), tf.float32)
        logits, _ = model.stateless_call(trainable, other, inputs, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
        loss = tf.reduce_sum(tf.where(batch["mask"] > 0, losses, 0.0))
        predicted = tf.one_hot(tf.argmax(logits, -1), classes)
        true = tf.one_hot(batch["label"], classes) * batch["mask"][:, None]
        return tf.matmul(true, predicted, transpose_a=True), loss

    inner = tf.function(forward, jit_compile=True) if xla else forward

    def replica_step(batch: dict[str, Any], rows: Any) -> tuple[Any, Any]:
        trainable, other = variables.values()
        return inner(batch, rows, trainable if average is None else average.values(variables.trainable), other)

    @tf.function
    def loop(iterator: Any, steps: Any) -> tuple[Any, Any]:
        confusion, loss = tf.zeros([classes, classes], tf.float64), tf.zeros([], tf.float64)
        for _ in tf.range(steps):
            counts, batch_loss = strategy.run(replica_step, args=(next(iterator), table))
            confusion += tf.cast(strategy.reduce(tf.distribute.ReduceOp.SUM, counts, axis=None), tf.float64)
            loss += tf.cast(strategy.reduce(tf.distribute.ReduceOp.SUM, batch_loss, axis=None), tf.float64)
        return confusion, loss

    def run(iterator: Any, steps: int) -> tuple[npt.NDArray[np.int64], float]:
        confusion, loss = loop(iterator, tf.constant(steps, tf.int32))
        return np.rint(confusion.numpy()).astype(np.int64), float(loss.numpy())

    return run
