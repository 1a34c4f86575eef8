"""What the training of a stage changes, beside its progress: a checkpoint holds all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import StageConfig
from cxr_dist.distributed.strategy import update_replicas
from cxr_dist.runs import checkpoints
from cxr_dist.runs.checkpoint_file import Arrays
from cxr_dist.training import optimizers


@dataclass
class LossScale:
    """Dynamic loss scale for float16 (Micikevicius et al. 2018): halved on overflow, doubled now and then."""

    scale: Any
    good_steps: Any
    dynamic: bool
    growth_interval: int = 2000

    @classmethod
    def create(cls, precision: str, initial: float = 2.0**15) -> "LossScale":
        """Outside the strategy's scope: every worker makes the same decisions on a variable of its own."""
        import tensorflow as tf

        dynamic = precision == "float16"
        scale = tf.Variable(initial if dynamic else 1.0, dtype=tf.float32, trainable=False, name="loss_scale")
        return cls(scale, tf.Variable(0, dtype=tf.int32, trainable=False, name="good_steps"), dynamic)

    def update(self, finite: Any) -> None:
        """Called once per step, outside the replicas, inside the compiled loop."""
        import tensorflow as tf

        if not self.dynamic:
            return
        good = tf.where(finite, self.good_steps + 1, 0)
        grow = good >= self.growth_interval
        changed = tf.where(finite, tf.where(grow, self.scale * 2.0, self.scale), self.scale * 0.5)
        self.scale.assign(tf.clip_by_value(changed, 1.0, 2.0**24))
        self.good_steps.assign(tf.where(grow, 0, good))

    def may_be_at_fault(self) -> Any:
        """1 where an overflow may be the scale's fault, as it can still go down, else 0: a float64 scalar."""
        import tensorflow as tf

        return tf.cast(self.scale > 1.0, tf.float64) if self.dynamic else tf.zeros([], tf.float64)

    def arrays(self) -> Arrays:
        """What a checkpoint holds of it."""
        return {"loss_scale": np.asarray(self.scale), "loss_scale_good_steps": np.asarray(self.good_steps)}

    def restore(self, arrays: Arrays) -> None:
        """Assign what `arrays` gave."""
        self.scale.assign(arrays["loss_scale"])
        self.good_steps.assign(arrays["loss_scale_good_steps"])


class WeightAverage:
    """The average of a model's trainable variables, a copy on every device. Make it under the strategy's scope.

    Steadier than the last step's weights, and often as good sooner. After every step that changed something:
    average <- d average + (1 - d) weight. At the t-th such step, counted from 0, d = min(decay, (1 + t) / (10 + t)), so
    that the start, from which training leads away, is soon forgotten (the warm-up is that of TensorFlow's
    `tf.train.ExponentialMovingAverage` with `num_updates`; averaging is that of Polyak and Juditsky, SIAM J. Control
    Optim. 30, 1992). Statistics of BatchNorm are averages already, and are taken as they are.
    """

    def __init__(self, variables: Sequence[Any], decay: float) -> None:
        """Args:
        variables: Keras variables; the average begins as what they are.
        decay: d of later steps, 0 to 1.
        """
        import tensorflow as tf

        self._variables, self._decay = list(variables), decay
        self._averages = [tf.Variable(variable.numpy(), trainable=False) for variable in self._variables]
        self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)

    @property
    def variables(self) -> list[Any]:
        """The tf.Variables that `update` changes."""
        return [*self._averages, self._steps]

    def update(self, strategy: Any, compiled: bool = False) -> None:
        """Take a step's weights in, compiled by XLA or not; called outside the replicas, inside the compiled loop."""
        import tensorflow as tf

        done = tf.cast(self._steps.read_value(), tf.float32)
        decay = tf.minimum(self._decay, (1.0 + done) / (10.0 + done))

        def move(copies: list[Any], _values: list[Any]) -> None:
            averages, weights = copies[: len(copies) // 2], copies[len(copies) // 2 :]
            for average, weight in zip(averages, weights, strict=True):
                average.assign(decay * average + (1.0 - decay) * weight)

        weights = [variable.value for variable in self._variables]
        update_replicas(strategy, move, [*self._averages, *weights], [], compiled=compiled)
        self._steps.assign_add(1)

    def values(self, variables: Sequence[Any]) -> list[Any]:
        """This replica's averages, as tensors, of `variables` in their order."""
        import tensorflow as tf

        of = {id(variable): average for variable, average in zip(self._variables, self._averages, strict=True)}
        return [tf.convert_to_tensor(of[id(variable)]) for variable in variables]

    def model_arrays(self) -> Arrays:
        """In place of the weights' own, as `checkpoints.model_arrays` names them."""
        return {f"model/{variable.path}": np.asarray(average) for variable, average in self._pairs()}

    def arrays(self) -> Arrays:
        """What a checkpoint holds of it."""
        return {
            "average_steps": np.asarray(self._steps),
            **{f"average/{variable.path}": np.asarray(average) for variable, average in self._pairs()},
        }

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Assign what `arrays` gave.

        Raises:
            KeyError: it is not there.
        """
        self._steps.assign(arrays["average_steps"])
        for variable, average in self._pairs():
            average.assign(arrays[f"average/{variable.path}"])

    def _pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self._variables, self._averages, strict=True))


@dataclass(frozen=True)
class StageState:
    """The model, and what a stage keeps from step to step to train it."""

    strategy: Any
    model: Any
    optimizer: Any
    loss_scale: LossScale
    average: WeightAverage | None
    """Of the trainable weights; None where the stage asks for none."""

    @classmethod
    def create(cls, strategy: Any, model: Any, stage: StageConfig, precision: str) -> "StageState":
        """As it is before the stage's first step, of the weights as they stand. What trains is set on `model`.

        Raises:
            UserError: the installed Keras makes other updates than the optimizer's formulas.
        """
        optimizers.check_updates(strategy, stage)
        with strategy.scope():
            optimizer = optimizers.make_optimizer(stage)
            optimizer.build(model.trainable_variables)
            decay = stage.ema_decay
            average = None if decay is None else WeightAverage(model.trainable_variables, decay)
        return cls(strategy, model, optimizer, LossScale.create(precision), average)

    def updated_variables(self) -> list[Any]:
        """The tf.Variables that an update of the weights changes."""
        average = [] if self.average is None else self.average.variables
        trained = [*self.model.trainable_variables, *self.optimizer.variables]
        return [variable.value for variable in trained] + average

    def arrays(self) -> Arrays:
        """What a checkpoint holds of it."""
        average = {} if self.average is None else self.average.arrays()
        kept = checkpoints.model_arrays(self.model) | checkpoints.optimizer_arrays(self.optimizer)
        return kept | self.loss_scale.arrays() | average

    def restore(self, arrays: Arrays) -> None:
        """Assign what `arrays` gave; the model's weights were restored before the state was made.

        Raises:
            KeyError: something is not there.
            ValueError: a variable of the optimizer is not there, or has another shape.
        """
        checkpoints.restore_optimizer(self.optimizer, arrays)
        self.loss_scale.restore(arrays)
        if self.average is not None:
            self.average.restore(arrays)

    def evaluated_arrays(self) -> Arrays:
        """The weights that validation measures: the averages where there are some, by the names of `model_arrays`."""
        average = {} if self.average is None else self.average.model_arrays()
        return checkpoints.model_arrays(self.model) | average
