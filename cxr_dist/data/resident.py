"""A split that every device of this process holds: its batches carry positions, and the step looks the inputs up.

A step on a GPU then waits for no transfer. The alternative, which larger splits take, is to read on the host and send
each batch ahead of its step.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.arrays import ArraySource, Source


class ResidentSource:
    """Labelled inputs on every local device; `batches` gives positions int32 [B], which `looked_up` turns to inputs."""

    failure: Exception | None = None

    def __init__(self, strategy: Any, inputs: npt.NDArray[Any], labels: npt.NDArray[np.int32]) -> None:
        """Args:
        inputs: [N, ...]; copied to each device of `strategy` in this process.
        """
        import tensorflow as tf

        devices = strategy.extended.worker_devices

        def copy(context: Any) -> Any:
            with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
                return tf.constant(inputs)

        self._labels = labels
        self.table = strategy.experimental_distribute_values_from_function(copy)
        """The inputs: a tensor on each device."""

    @property
    def count(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        return tf.cast(positions, tf.int32)


def on_devices(source: Source, strategy: Any, limit_bytes: int) -> Source:
    """`source` on every device, if it is an array of at most so many bytes, and not empty; else as it is."""
    if not isinstance(source, ArraySource) or not 0 < source.nbytes <= limit_bytes:
        return source
    return ResidentSource(strategy, source.array(), source.labels)


def table_of(source: Source) -> Any:
    """What a step passes to `looked_up`, of each local device; None where batches hold the inputs themselves."""
    return source.table if isinstance(source, ResidentSource) else None


def looked_up(inputs: Any, table: Any) -> Any:
    """The inputs [B, ...] of a batch, which holds them, or their positions in a `table`."""
    import tensorflow as tf

    if table is None:
        return inputs
    # Without XLA, a GPU cannot gather bytes.
    gather = tf.function(lambda rows, positions: tf.gather(rows, positions), jit_compile=True, autograph=False)
    return gather(table, inputs)
