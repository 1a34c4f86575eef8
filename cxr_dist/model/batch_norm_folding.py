"""Frozen BatchNorm folded into the convolution before it: the same function in fewer passes over memory.

In inference mode BatchNorm is one scale and one shift per channel, and so is its effect on a convolution's kernel
and bias: BN(x * W + b) = x * (W s) + (b - mean) s + beta with s = gamma / sqrt(variance + epsilon) (Jacob et al. 2018,
section 3.2, without quantisation). The products are formed in each step from the model's own variables, so gradients
reach the kernels and nothing is copied. Sums are rounded in another order; the numbers agree within float tolerance.
"""

import functools
from collections import Counter
from typing import Any

from cxr_dist import compat
from cxr_dist.model.fused_batch_norm import can_fuse, fused_batch_norm


@functools.cache
def folded_convolution() -> Any:
    """The layer `FoldedConvolution(convolution, batch_norm)`: both as one, sharing their variables.

    Made when it is first asked for, as Keras is not imported before a process has prepared its devices.
    """
    import keras
    import tensorflow as tf

    class FoldedConvolution(keras.layers.Layer):
        def __init__(self, convolution: Any, batch_norm: Any) -> None:
            # The scale is formed in float32 and rounded once, with the kernel. A mixed policy would round the variables
            # first, unless a model around the layer has one too: Keras then obeys `autocast`.
            super().__init__(name=f"{convolution.name}_folded", dtype="float32", autocast=False)
            self.convolution, self.batch_norm = convolution, batch_norm
            self.built = True

        def call(self, inputs: Any) -> Any:
            """[B, H, W, C] to [B, H', W', filters], in the convolution's compute dtype."""
            convolution, norm = self.convolution, self.batch_norm
            scale = norm.gamma * tf.math.rsqrt(norm.moving_variance + norm.epsilon)
            bias = norm.beta - norm.moving_mean * scale
            if convolution.use_bias:
                bias += convolution.bias * scale
            dtype = convolution.compute_dtype
            kernel = tf.cast(convolution.kernel * scale, dtype)
            padding = convolution.padding.upper()
            # `bias_add` and no plain sum: with the activation behind it TensorFlow runs the three as one kernel.
            return tf.nn.bias_add(
                tf.nn.conv2d(tf.cast(inputs, dtype), kernel, convolution.strides, padding), tf.cast(bias, dtype)
            )

        def compute_output_shape(self, input_shape: Any) -> Any:
            return self.convolution.compute_output_shape(input_shape)

    return FoldedConvolution


def fold_frozen_batch_norm(network: Any, fuse: bool = False) -> Any:
    """`network`, a functional model, with every frozen BatchNorm behind a convolution folded; shares all variables.

    What is frozen is read now: fold again after `trainable` was set. With `fuse`, BatchNorm that trains is one
    operation (`fused_batch_norm`).
    """
    import keras

    nodes = compat.functional_nodes(network)
    uses = Counter(id(tensor) for node in nodes for tensor in node.input_tensors)
    uses.update(id(tensor) for tensor in network.outputs)
    maker = {id(tensor): node.operation for node in nodes for tensor in node.output_tensors}
    convolution_of = {}
    for node in nodes:
        layer = node.operation
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.trainable:
            source = maker[id(node.input_tensors[0])]
            if uses[id(node.input_tensors[0])] == 1 and _is_plain(source):
                convolution_of[layer.name] = source
    replaced = {layer.name for layer in convolution_of.values()}

    def call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name in replaced:
            return args[0]  # computed where its BatchNorm stood
        if layer.name in convolution_of:
            return folded_convolution()(convolution_of[layer.name], layer)(args[0])
        if fuse and can_fuse(layer):
            return fused_batch_norm()(layer)(args[0])
        return layer(*args, **kwargs)

    return keras.models.clone_model(network, clone_function=lambda layer: layer, call_function=call_layer)


def _is_plain(layer: Any) -> bool:
    """A convolution that `FoldedConvolution` computes."""
    import keras

    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.groups == 1
        and layer.dilation_rate == (1, 1)
        and layer.data_format == "channels_last"
        and layer.activation is keras.activations.linear
    )
