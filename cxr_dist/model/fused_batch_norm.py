"""BatchNorm that trains as one operation of TensorFlow's, forward and backward.

Keras 3 writes it as moments and arithmetic in float32: on a GPU without XLA some ten passes over tensors of twice the
size. `FusedBatchNormV3` makes two passes over tensors in their own format, and sums in float32.
"""

import functools
from typing import Any


@functools.cache
def fused_batch_norm() -> Any:
    """The layer `FusedBatchNorm(batch_norm)`: the same function, sharing its variables.

    Made when it is first asked for, as Keras is not imported before a process has prepared its devices.
    """
    import keras
    import tensorflow as tf

    class FusedBatchNorm(keras.layers.Layer):
        def __init__(self, batch_norm: Any) -> None:
            super().__init__(name=f"{batch_norm.name}_fused", dtype="float32", autocast=False)
            self.batch_norm = batch_norm
            self.layers = [batch_norm]
            """As a model has them, so that who looks for BatchNorm finds it."""
            self.built = True

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            """[B, H, W, C] to the same, in BatchNorm's compute dtype."""
            norm = self.batch_norm
            trains = bool(training) and norm.trainable
            mean, variance = tf.convert_to_tensor(norm.moving_mean), tf.convert_to_tensor(norm.moving_variance)
            outputs, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=tf.cast(inputs, norm.compute_dtype),
                scale=tf.convert_to_tensor(norm.gamma),
                offset=tf.convert_to_tensor(norm.beta),
                mean=tf.zeros([0]) if trains else mean,
                variance=tf.zeros([0]) if trains else variance,
                epsilon=norm.epsilon,
                is_training=trains,
            )
            if trains:
                # The operation gives the variance with Bessel's correction, which Keras's does not have.
                count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
                batch_variance *= (count - 1.0) / count
                momentum = norm.momentum
                norm.moving_mean.assign(mean * momentum + batch_mean * (1.0 - momentum))
                norm.moving_variance.assign(variance * momentum + batch_variance * (1.0 - momentum))
            return outputs

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

    return FusedBatchNorm


def can_fuse(layer: Any) -> bool:
    """Whether `FusedBatchNorm` computes the function of a layer."""
    import keras

    return (
        isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and layer.axis in (-1, 3)
        and layer.scale
        and layer.center
        and not layer.renorm
        and not layer.synchronized
    )
