"""What the training of a stage changes, beside its progress: a checkpoint holds all of it."""

from dataclasses import dataclass
from typing import Any

from cxr_dist.config.schema import StageConfig
from cxr_dist.runs import checkpoints
from cxr_dist.runs.checkpoint_file import Arrays
from cxr_dist.training import optimizers
from cxr_dist.training.loss_scale import LossScale
from cxr_dist.training.weight_average import WeightAverage


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
