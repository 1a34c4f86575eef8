"""The optimizer of a stage: Keras's arithmetic on gradients that are already reduced, checked and clipped.

Keras's `Optimizer.apply` would sum the gradients over the replicas once more. So `update` calls what Keras documents
for writing an optimizer, `update_step`, on each replica's copy of a variable; weight decay and the count of iterations
are here. `check_updates` compares all of it with the formulas before a stage's first step: a Keras that does something
else must not train a wrong model in silence.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import StageConfig
from cxr_dist.distributed.strategy import update_replicas
from cxr_dist.runs.versions import unsupported
from tfrecords_builder.common.errors import one_line

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
"""Of Adam (Kingma and Ba 2015)."""

_START = np.array([[1.0, -2.0, 0.5]], np.float32)
_STEPS = (
    (np.array([[0.1, -0.2, 0.3]], np.float32), np.float32(0.01)),
    (np.array([[-0.4, -0.1, 0.2]], np.float32), np.float32(0.03)),
)
"""Gradients and learning rates of two steps."""


def make_optimizer(stage: StageConfig) -> Any:
    """The stage's Keras optimizer, for `update`; call under the strategy's scope, and build it there."""
    import keras

    if stage.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=stage.momentum, nesterov=False)
    # AdamW is Adam with decoupled weight decay.
    return keras.optimizers.Adam(beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON, amsgrad=False)


def update(
    strategy: Any,
    optimizer: Any,
    variables: Sequence[Any],
    gradients: Sequence[Any],
    *,
    learning_rate: Any,
    weight_decay: float,
    compiled: bool = False,
) -> None:
    """One step of the optimizer; called outside the replicas.

    Args:
        strategy: Under which all of it was made.
        optimizer: Of `make_optimizer`, built with the variables.
        variables: Keras variables.
        gradients: Of each variable, the same tensor on every replica.
        learning_rate: A float32 scalar.
        weight_decay: Decoupled (Loshchilov and Hutter 2019): a variable loses this times the rate times itself. Biases
            and the scales and offsets of BatchNorm, which are all that has one axis, lose nothing.
        compiled: Whether XLA compiles the update.
    """
    optimizer.learning_rate.assign(learning_rate)

    def change(copies: list[Any], gradients: list[Any]) -> None:
        for copy, gradient in zip(copies, gradients, strict=True):
            # Biases and BatchNorm's scales and offsets have one axis.
            if weight_decay and len(copy.shape) > 1:
                copy.assign_sub(copy * weight_decay * optimizer.learning_rate)
            optimizer.update_step(gradient, copy, optimizer.learning_rate)

    update_replicas(strategy, change, [variable.value for variable in variables], gradients, compiled=compiled)
    optimizer.iterations.assign_add(1)


def check_updates(strategy: Any, stage: StageConfig) -> None:
    """Compare two steps on every replica with the formulas, with the optimizer's state copied to another in between.

    Raises:
        UserError: they differ, or this version of Keras lacks what they need.
    """
    try:
        moved = _moved(strategy, stage)
    except Exception as error:
        raise unsupported("keras", f"no step of {stage.optimizer} can be made: {one_line(error)}") from error
    expected = _expected(stage)
    for value in moved:
        if not np.allclose(value, expected, rtol=1e-4, atol=1e-6):
            raise unsupported("keras", f"two steps of {stage.optimizer} give {value[0]}, not {expected[0]}")


def _moved(strategy: Any, stage: StageConfig) -> list[npt.NDArray[np.float32]]:
    """A variable after two steps, on each replica of this process."""
    import keras
    import tensorflow as tf

    with strategy.scope():
        variable = keras.Variable(_START, name="kernel")
    state: list[npt.NDArray[Any]] | None = None
    for gradient, rate in _STEPS:
        with strategy.scope():
            optimizer = make_optimizer(stage)
            optimizer.build([variable])
        if state is not None:  # as a checkpoint is restored
            for own, value in zip(optimizer.variables, state, strict=True):
                own.assign(value)
        update(
            strategy,
            optimizer,
            [variable],
            [tf.constant(gradient)],
            learning_rate=rate,
            weight_decay=stage.weight_decay,
        )
        state = [np.asarray(own) for own in optimizer.variables]
    return [np.asarray(value) for value in strategy.experimental_local_results(variable.value)]


def _expected(stage: StageConfig) -> npt.NDArray[np.float64]:
    """The same by the formulas of the papers, in float64."""
    value, first, second = _START.astype(np.float64), np.zeros((1, 3)), np.zeros((1, 3))
    for number, (gradient, rate) in enumerate(_STEPS, 1):
        value = value - stage.weight_decay * rate * value
        if stage.optimizer == "sgd":
            first = stage.momentum * first - rate * gradient
            value = value + first
        else:
            first = BETA_1 * first + (1 - BETA_1) * gradient
            second = BETA_2 * second + (1 - BETA_2) * gradient.astype(np.float64) ** 2
            size = rate * np.sqrt(1 - BETA_2**number) / (1 - BETA_1**number)
            value = value - size * first / (np.sqrt(second) + EPSILON)
    return value
