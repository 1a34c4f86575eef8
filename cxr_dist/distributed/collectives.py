"""What all workers do together; in each function they wait for each other."""

from collections.abc import Sequence
from typing import Any

from cxr_dist.distributed.devices import Topology


def all_workers_true(strategy: Any, answer: bool) -> bool:
    """Whether every worker's `answer` is true."""
    import tensorflow as tf

    if strategy.num_replicas_in_sync == 1:
        return answer
    return int(_summed(strategy, lambda _context: tf.constant(1.0 if answer else 0.0))) == strategy.num_replicas_in_sync


def barrier(strategy: Any) -> None:
    """Wait until every worker has come here."""
    all_workers_true(strategy, True)


def broadcast_from_chief(strategy: Any, topology: Topology, values: Sequence[int]) -> list[int]:
    """The chief's values, on every worker. Below 2^53."""
    import tensorflow as tf

    def chiefs(context: Any) -> Any:
        is_first = tf.cast(context.replica_id_in_sync_group == 0, tf.float64)
        return tf.constant(list(values), tf.float64) * is_first

    if topology.workers == 1:
        return list(values)
    return [int(value) for value in _summed(strategy, chiefs)]


def _summed(strategy: Any, compute: Any) -> Any:
    """The sum of what `compute` makes of each replica's context."""
    import tensorflow as tf

    def reduced() -> Any:
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, compute(context))

    return strategy.experimental_local_results(tf.function(lambda: strategy.run(reduced))())[0]
