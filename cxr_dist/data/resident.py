"""A split that every device of this process holds: its batches carry positions, and the step looks the inputs up.

A step on a GPU then waits for no transfer. The alternative, which larger splits take, is to read on the host and send
each batch ahead of its step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.arrays import ArraySource, Source


@dataclass(frozen=True)
class ResidentSource:
    """Labelled inputs on every local device; `batches` gives positions int32 [B], which `looked_up` turns to inputs."""

    labels: npt.NDArray[np.int32]
    table: Any
    """The inputs [N, ...]: a tensor on each device."""
    failure: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.labels)

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        return tf.cast(positions, tf.int32)


def on_devices(source: Source, strategy: Any, limit_bytes: int) -> Source:
    """`source` on every device, if it is an array of at most so many bytes, and not empty; else as it is."""
    import tensorflow as tf

    if not isinstance(source, ArraySource) or not 0 < source.nbytes <= limit_bytes:
        return source
    inputs, devices = source.array(), strategy.extended.worker_devices

    def copy(context: Any) -> Any:
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return tf.constant(inputs)

    return ResidentSource(source.labels, strategy.experimental_distribute_values_from_function(copy))


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
