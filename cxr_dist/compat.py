"""Every undocumented name of Keras, TensorFlow, Ray and argparse that this program needs: no other module uses one.

Each function says why there is no public way, and raises an error that names library, version and missing name when the
name has gone. `pyproject.toml` bounds the versions from above for these names.
"""

import argparse
import importlib
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


def parser_actions(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], list[argparse.ArgumentParser]]:
    """Arguments and options of a parser, without --help, and the parsers of its commands. argparse only prints them."""
    actions = _existing(parser, "_actions", "python")
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    commands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return [action for action in actions if not isinstance(action, hidden)], [
        parser for action in commands for parser in action.choices.values()
    ]


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


def ray_lost_worker_errors() -> tuple[type[Exception], ...]:
    """What Ray Train raises of workers that do not answer. It exports neither."""
    module = "ray.train.v2._internal.exceptions"
    return _imported(module, "WorkerHealthCheckFailedError"), _imported(module, "WorkerHealthCheckTimeoutError")


def ray_startup_timeout_error() -> type[Exception]:
    """What Ray Train raises when workers did not get their places in time. It does not export it."""
    error: type[Exception] = _imported("ray.train.v2._internal.exceptions", "WorkerGroupStartupTimeoutError")
    return error


def ray_address_on_this_machine() -> str:
    """The address that Ray takes `auto` for. Publicly, Ray tells it only by joining the cluster.

    Raises:
        ConnectionError: No cluster runs on this machine.
    """
    return str(_imported("ray._private.services", "get_ray_address_from_environment")("auto", None))


def ray_reads_its_token_again() -> None:
    """Let Ray see $RAY_AUTH_MODE and $RAY_AUTH_TOKEN as they are now. Publicly, it reads them when it is imported.

    Not without need: threads of a cluster that was just left may still look at what is made anew here.
    """
    authentication = "ray._private.authentication.authentication_utils"
    if not _imported(authentication, "is_token_auth_enabled")():
        _imported("ray._raylet", "Config").initialize("")
        _imported("ray._raylet", "AuthenticationTokenLoader").instance().reset_cache()


def _imported(module: str, name: str) -> Any:
    """`name` of a module of Ray; raises UserError when Ray no longer has it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise unsupported("ray", f"it has no {module}.{name}") from None


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
