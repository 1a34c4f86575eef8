"""Python functions in a tf.data graph which the graph does not keep alive."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")


R = TypeVar("R")


def weakly(method: Callable[P, R]) -> Callable[P, R]:
    """The bound `method` for `tf.numpy_function`, which keeps what it is given in a list of the default graph for ever.

    Its object must be kept by who reads: the function of one that is gone raises RuntimeError, and leaves that list.
    """
    import tensorflow as tf

    reference = weakref.WeakMethod(method)

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        found = reference()
        if found is None:
            raise RuntimeError("the source of these batches is gone")
        return found(*arguments, **named)

    graph = tf.compat.v1.get_default_graph()  # now: that of the thread in which the object goes may be another
    while (outer := getattr(graph, "outer_graph", graph)) is not graph:
        graph = outer
    left = weakref.finalize(method.__self__, _forget, graph, call)  # type: ignore[attr-defined]  # bound: WeakMethod
    left.atexit = False  # iterators may still read then
    return call


def _forget(graph: Any, function: Callable[..., Any]) -> None:
    """Take `function` out of the list of `graph` in which TensorFlow keeps all that `tf.numpy_function` was given.

    Else a process of many runs grows by each of their datasets. There is no public way; where TensorFlow keeps them
    elsewhere (`ops/script_ops.py`, `_internal_py_func`), nothing is found and nothing is done.
    """
    with suppress(AttributeError, ValueError):
        # One call, as another thread may add to the list at this moment.
        graph._py_funcs_used_in_graph.remove(function.ag_dnc_wrapper__)  # type: ignore[attr-defined]
