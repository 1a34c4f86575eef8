"""Every name that Keras and TensorFlow do not document and that this program needs: nothing outside uses one.

Each function says why there is no public way, and raises an error that names library, version and missing name when the
name has gone. `pyproject.toml` bounds the versions from above for these names.
"""

from collections.abc import Callable
from typing import Any

from cxr_dist.runs.versions import unsupported


def functional_nodes(network: Any) -> list[Any]:
    """The nodes of a functional Keras model, each after those that it depends on.

    Each has `operation`, `input_tensors` and `output_tensors`. Keras's public ways run a model or clone it; none says
    which tensors a layer of a model was called with.
    """
    by_depth = _existing(network, "_nodes_by_depth", "keras")
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    for node in nodes[:1]:
        for name in ("operation", "input_tensors", "output_tensors"):
            _existing(node, name, "keras")
    return nodes


def reserve_collective_keys(count: int) -> None:
    """Let strategies that are made from now on number their collectives after `count` more keys.

    Each strategy numbers from the same start, and the runtime knows collectives by number: two strategies in one
    process would take each other's for their own. TensorFlow's tests do the same; there is no public way.
    """
    import tensorflow as tf

    for kind in (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy):
        first = _existing(kind, "_collective_key_base", "tensorflow")
        kind._collective_key_base = first + count


def outermost_graph() -> Any:
    """The graph that TensorFlow keeps the functions of `tf.numpy_function` in, of the graph that is being built."""
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    while hasattr(graph, "outer_graph"):
        graph = graph.outer_graph
    return graph


def forgetting_numpy_function(graph: Any, function: Callable[..., Any]) -> Callable[[], None]:
    """What takes `function`, just given to `tf.numpy_function`, out of the list in which `graph` keeps it for ever.

    Else a process of many runs grows by each of their datasets. There is no public way.
    """
    functions = _existing(graph, "_py_funcs_used_in_graph", "tensorflow")
    wrapper = _existing(function, "ag_dnc_wrapper__", "tensorflow")
    if wrapper not in functions:
        raise unsupported("tensorflow", "_py_funcs_used_in_graph has not what tf.numpy_function was given")

    def forget() -> None:
        functions.remove(wrapper)  # one call, as another thread may add to the list at this moment

    return forget


def _existing(owner: Any, name: str, distribution: str) -> Any:
    """The attribute `name` of `owner`, which belongs to `distribution`.

    Raises:
        UserError: it has gone.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise unsupported(distribution, f"{kind} has no {name}") from None
