"""Which variables of a network are trained, and which are statistics."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variables:
    """A model's variables by what a step does with them, as indices into Keras's own lists."""

    trainable: list[Any]
    other: list[Any]
    statistics: list[int]
    """Of `other`: moving statistics of BatchNorm layers that train."""
    seeds: list[int]
    """Of `other`: states of dropout's seed generators, which are set by the step and never saved."""

    @classmethod
    def of(cls, model: Any) -> "Variables":
        import keras

        trainable, other = list(model.trainable_variables), list(model.non_trainable_variables)
        place = {id(variable): index for index, variable in enumerate(other)}
        statistics, seeds = [], []
        for layer in _layers(model):
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
                statistics += [place[id(layer.moving_mean)], place[id(layer.moving_variance)]]
            if isinstance(layer, keras.layers.Dropout) and layer.rate > 0:
                seeds += [place[id(state)] for state in layer.non_trainable_variables]
        return cls(trainable, other, statistics, seeds)

    def values(self) -> tuple[list[Any], list[Any]]:
        """This replica's values, as tensors: what `stateless_call` takes."""
        import tensorflow as tf

        return (
            [tf.convert_to_tensor(variable.value) for variable in self.trainable],
            [tf.convert_to_tensor(variable.value) for variable in self.other],
        )


def _layers(model: Any) -> Iterator[Any]:
    """The layers of a model and of the models in it, the last layer of an inner model first.

    The order numbers the streams of dropout: another one changes the results.
    """
    pending = deque(model.layers)
    while pending:
        layer = pending.popleft()
        yield layer
        pending.extendleft(getattr(layer, "layers", ()))
