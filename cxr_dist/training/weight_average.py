"""An exponential moving average of the weights that train: steadier than the last step's, and often as good sooner.

After every step that changed something: average <- d average + (1 - d) weight. At the t-th such step, counted from 0,
d = min(decay, (1 + t) / (10 + t)), so that the start, from which training leads away, is soon forgotten (the warm-up is
that of TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`; averaging is that of Polyak and Juditsky,
SIAM J. Control Optim. 30, 1992). Statistics of BatchNorm are averages already, and are taken as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class WeightAverage:
    """The average of a model's trainable variables, a copy on every device. Make it under the strategy's scope."""

    def __init__(self, variables: Sequence[Any], decay: float) -> None:
        """Args:
        variables: Keras variables; the average begins as what they are.
        decay: d of later steps, 0 to 1.
        """
        import tensorflow as tf

        self._variables, self._decay = list(variables), decay
        self._averages = [tf.Variable(variable.numpy(), trainable=False) for variable in self._variables]
        self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)

    def update(self, strategy: Any) -> None:
        """Take a step's weights in; called outside the replicas, inside the compiled loop."""
        import tensorflow as tf

        done = tf.cast(self._steps.read_value(), tf.float32)
        decay = tf.minimum(self._decay, (1.0 + done) / (10.0 + done))

        def move(average: Any, weight: Any) -> Any:
            return average.assign(decay * average + (1.0 - decay) * weight)

        for average, variable in zip(self._averages, self._variables, strict=True):
            strategy.extended.update(average, move, args=(variable.value,), group=False)
        self._steps.assign_add(1)

    def values(self, variables: Sequence[Any]) -> list[Any]:
        """This replica's averages, as tensors, of `variables` in their order."""
        import tensorflow as tf

        of = {id(variable): average for variable, average in zip(self._variables, self._averages, strict=True)}
        return [tf.convert_to_tensor(of[id(variable)]) for variable in variables]

    def model_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """In place of the weights' own, as `checkpoints.model_arrays` names them."""
        return {f"model/{variable.path}": np.asarray(average) for variable, average in self._pairs()}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
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
