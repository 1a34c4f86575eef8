"""The tf.data pipeline that brings one worker what its plan says, from a source."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.arrays import Source, weak_numpy_function
from cxr_dist.data.batch_sampler import PADDING, EvaluationBatchSampler, TrainBatchSampler
from cxr_dist.distributed.devices import Topology

_CHUNK = 64
"""Elements of which Python tells TensorFlow at a time what they are: a call for each took longer than its images."""


class _Elements:
    """What elements of this worker need of the plan: positions, labels, masks and slots, each [_CHUNK, B]."""

    def __init__(
        self,
        plan: TrainBatchSampler | EvaluationBatchSampler,
        labels: npt.NDArray[np.int32],
        first_replica: int,
        local_replicas: int,
        start_step: int,
    ) -> None:
        self._plan, self._labels = plan, labels
        self._first_replica, self._local_replicas, self._start_step = first_replica, local_replicas, start_step

    def chunk(self, counter: npt.NDArray[np.int64]) -> tuple[Any, Any, Any, Any]:
        elements = [divmod(int(counter) * _CHUNK + number, self._local_replicas) for number in range(_CHUNK)]
        replicas = np.array([self._first_replica + local for _, local in elements])
        positions = np.stack(
            [
                self._plan.positions(self._start_step + step, replica)
                for (step, _), replica in zip(elements, replicas.tolist(), strict=True)
            ]
        )
        mask = (positions != PADDING).astype(np.float32)
        valid = np.maximum(positions, 0)
        batch_size = self._plan.batch_size
        slots = (replicas[:, None] * batch_size + np.arange(batch_size)).astype(np.int32)
        return valid, self._labels[valid], mask, slots


def worker_batches(
    source: Source,
    plan: TrainBatchSampler | EvaluationBatchSampler,
    *,
    first_replica: int,
    local_replicas: int,
    start_step: int = 0,
    extra: npt.NDArray[np.float32] | None = None,
) -> Any:
    """The batches of one worker: a `tf.data.Dataset` without end, one element per replica and step.

    Elements: `inputs` as the source gives them, `label` int32 [B], `mask` float32 [B] (0 for padding),
    `slot` int32 [B] (the place in the global batch), and with `extra` float32 [N, ...] its rows of these
    images, `extra` float32 [B, ...]. Infinite and of static shape, so a distributed iterator needs no
    agreement between workers about who has data left.
    """
    import tensorflow as tf

    batch_size = plan.batch_size
    elements = _Elements(plan, source.labels, first_replica, local_replicas, start_step)

    @tf.autograph.experimental.do_not_convert  # nothing in it needs that, nor in what sources do
    def chunk(counter: Any) -> Any:
        tensors = weak_numpy_function(elements.chunk, [counter], [tf.int64, tf.int32, tf.float32, tf.int32])
        for tensor in tensors:
            tensor.set_shape([_CHUNK, batch_size])
        return tf.data.Dataset.from_tensor_slices(tuple(tensors))

    @tf.autograph.experimental.do_not_convert
    def load(positions: Any, label: Any, mask: Any, slot: Any) -> dict[str, Any]:
        batch = {"inputs": source.batches(positions), "label": label, "mask": mask, "slot": slot}
        return batch if extra is None else batch | {"extra": tf.gather(extra, positions)}

    options = tf.data.Options()
    options.autotune.enabled = False  # there is nothing to tune, and its thread holds up the end of an iterator
    options.experimental_optimization.apply_default_optimizations = False  # nor to rewrite, which it searches for
    # Not `Dataset.counter`, which leaves a function in TensorFlow's global graph each time: memory that no one frees.
    counter = tf.data.Dataset.range(tf.int64.max // _CHUNK)
    # Repeated, although nobody counts so far: of a dataset that may end, as `flat_map` says of its own, a distributed
    # iterator asks all workers before every batch.
    batches = counter.flat_map(chunk).repeat().map(load, num_parallel_calls=2, deterministic=True)
    batches = batches.prefetch(2 * local_replicas).with_options(options)
    batches.kept = (source, elements)  # as long as the dataset, which its iterators hold
    return batches


def distributed_batches(
    strategy: Any,
    topology: Topology,
    source: Source,
    plan: TrainBatchSampler | EvaluationBatchSampler,
    start_step: int = 0,
    extra: npt.NDArray[np.float32] | None = None,
) -> Any:
    """An iterator over the batches of this worker's replicas; see `pipeline.worker_batches`."""
    local = len(topology.devices)

    def pipeline(_context: Any) -> Any:
        return worker_batches(
            source,
            plan,
            first_replica=topology.worker * local,
            local_replicas=local,
            start_step=start_step,
            extra=extra,
        )

    if topology.kind == "CPU" and local == 1:
        # A distributed iterator would fetch to the device, which is where the batch is, with an autotuning thread
        # that cannot be turned off, wakes up ever less often, and holds up the iterator's end: by up to a minute.
        return iter(pipeline(None))
    return iter(strategy.distribute_datasets_from_function(pipeline))
