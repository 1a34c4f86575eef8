"""Python functions in a tf.data graph which the graph does not keep alive."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from cxr_dist import compat


def weak_numpy_function(method: Callable[..., Any], inputs: Sequence[Any], dtypes: Any) -> Any:
    """As `tf.numpy_function` of a bound method, whose object TensorFlow would else keep for ever.

    The object must be kept by who reads: the function of one that is gone raises RuntimeError. Call it while a graph
    is built.
    """
    import tensorflow as tf

    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        alive = reference()
        if alive is None:
            raise RuntimeError("the source of these batches is gone")
        return alive(*arguments)

    tensors = tf.numpy_function(call, inputs, dtypes)
    forget = compat.forgetting_numpy_function(compat.outermost_graph(), call)
    finalizer = weakref.finalize(method.__self__, forget)  # type: ignore[attr-defined]  # bound: WeakMethod
    finalizer.atexit = False  # iterators may still read then
    return tensors
