"""What all workers do together, and what the chief tells the others."""

from collections.abc import Sequence
from typing import Any

from cxr_dist.distributed.devices import Topology


def all_agree(strategy: Any, answer: bool) -> bool:
    """Whether every worker answers yes; workers wait here for each other."""
    import tensorflow as tf

    def count() -> Any:
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0 if answer else 0.0))

    if strategy.num_replicas_in_sync == 1:
        return answer
    counted = strategy.experimental_local_results(tf.function(lambda: strategy.run(count))())[0]
    return int(counted) == strategy.num_replicas_in_sync


def chiefs(strategy: Any, topology: Topology, values: Sequence[int]) -> list[int]:
    """The chief's values, on every worker; workers wait here for each other. Below 2^53."""
    import tensorflow as tf

    def share() -> Any:
        context = tf.distribute.get_replica_context()
        is_first = tf.cast(context.replica_id_in_sync_group == 0, tf.float64)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(list(values), tf.float64) * is_first)

    if topology.workers == 1:
        return list(values)
    shared = strategy.experimental_local_results(tf.function(lambda: strategy.run(share))())[0]
    return [int(value) for value in shared]
