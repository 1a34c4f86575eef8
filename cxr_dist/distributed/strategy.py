"""The only place that makes a tf.distribute strategy, a dtype policy, or decides on XLA.

Call `prepare_devices` before anything else touches TensorFlow in a process: logical devices and memory
growth can only be set before the runtime starts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from cxr_dist import compat
from cxr_dist.config.schema import AllReduceConfig
from cxr_dist.distributed.devices import DeviceKind, Topology

_COLLECTIVE_KEYS_PER_STRATEGY = 1000
_ALL_REDUCE = AllReduceConfig()


def make_strategy(topology: Topology, all_reduce: AllReduceConfig | None = None) -> Any:
    """One device, mirrored over local devices, or multi-worker (which reads TF_CONFIG).

    The same one for the same arguments: see `compat.reserve_collective_keys`.

    Args:
        topology: What there is.
        all_reduce: Between workers; of one worker, nothing is asked.
    """
    return _strategy(topology, all_reduce if all_reduce and topology.workers > 1 else _ALL_REDUCE)


@functools.cache
def _strategy(topology: Topology, all_reduce: AllReduceConfig) -> Any:
    import tensorflow as tf

    if topology.replicas > 1:
        compat.reserve_collective_keys(_COLLECTIVE_KEYS_PER_STRATEGY)
    if topology.workers > 1:
        options = communication_options(all_reduce, topology.kind)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    elif len(topology.devices) > 1:
        strategy = tf.distribute.MirroredStrategy(list(topology.devices))
    else:
        strategy = tf.distribute.OneDeviceStrategy(topology.devices[0])
    if strategy.num_replicas_in_sync != topology.replicas:
        raise RuntimeError(
            f"the strategy has {strategy.num_replicas_in_sync} replicas where {topology.workers} workers with "
            f"{len(topology.devices)} devices were planned"
        )
    return strategy


def communication_options(all_reduce: AllReduceConfig, kind: DeviceKind) -> Any:
    """In TensorFlow's terms."""
    import tensorflow as tf

    algorithm = {"auto": "nccl" if kind == "GPU" else "ring"}.get(all_reduce.algorithm, all_reduce.algorithm)
    return tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation(algorithm.upper()),
        bytes_per_pack=int(all_reduce.bucket_mb * 1e6),
    )


def update_replicas(
    strategy: Any,
    change: Callable[[list[Any], list[Any]], None],
    variables: Sequence[Any],
    values: Sequence[Any],
    *,
    compiled: bool,
) -> None:
    """Call `change(copies, values)` once for each replica of this process; called outside the replicas.

    One call for all variables, as each costs TensorFlow a context, and as only the whole can be compiled as one.

    Args:
        strategy: Under which `variables` were made.
        change: Assigns to the copies.
        variables: tf.Variables, of which `change` gets the replica's own copies.
        values: Tensors, of which `change` gets the replica's own.
        compiled: Whether XLA compiles `change`.
    """
    import tensorflow as tf

    if not variables:
        return

    def call(_first: Any, copies: list[Any], own: list[Any]) -> None:
        if compiled:
            tf.function(lambda: change(copies, own), jit_compile=True, autograph=False)()
        else:
            change(copies, own)

    strategy.extended.update(variables[0], call, args=(list(variables), list(values)), group=False)
