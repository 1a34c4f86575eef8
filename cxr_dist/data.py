"""Images for one worker: which ones at which step, and the tf.data pipeline that brings them.

The order is a pure function of (seed, epoch) and the place in it a function of the step, so the global
batch at a step is the same set of images for any number of workers and replicas, and a run that goes on
from a step needs nothing else. Images are read by position, through the byte offsets in the manifest:
a worker touches only the records of its own replicas.
"""

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tfrecords_builder import recordio, schema
from tfrecords_builder.errors import UserError
from tfrecords_builder.manifest import Manifest

P = ParamSpec("P")
R = TypeVar("R")
Positions = npt.NDArray[np.int64]
PADDING = -1
"""The position of a slot without an image, in the last batch of an evaluation."""


def epoch_order(count: int, seed: int, epoch: int) -> Positions:
    """A permutation of the `count` images for the epoch (counted from 0 over the whole run)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count).astype(np.int64)


@dataclass(frozen=True)
class TrainingPlan:
    """Which images are in which batch. Every epoch leaves out less than a batch, others each time."""

    count: int
    global_batch_size: int
    replicas: int
    seed: int
    views: int = 1
    """Of each image, one behind another in the source; an epoch takes one of them, the next epoch the next."""
    parts: int = 1
    """In which each replica takes its batch."""

    def __post_init__(self) -> None:
        divisor = self.replicas * self.parts
        if self.global_batch_size % divisor:
            times = f" times {self.parts} accumulation_steps" if self.parts > 1 else ""
            raise UserError(
                f"global_batch_size {self.global_batch_size}: must be a multiple of the {self.replicas} replicas{times}"
                f"; try {-(-self.global_batch_size // divisor) * divisor}"
            )
        if self.count < self.global_batch_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size}: the training split has {self.count} images; "
                "give a smaller batch or more images"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.global_batch_size

    @property
    def batch_size(self) -> int:
        """Images per replica and step."""
        return self.global_batch_size // self.replicas

    def positions(self, step: int, replica: int) -> Positions:
        """Of `replica` at `step` (counted over the whole run): int64 [batch_size]."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _cached_order(self.count, self.seed, epoch)
        start = step * self.global_batch_size + replica * self.batch_size
        return order[start : start + self.batch_size] + epoch % self.views * self.count


@dataclass(frozen=True)
class EvaluationPlan:
    """Every image once, in order, on any number of replicas; the last batches are padded.

    After the last step it begins again, so that one iterator serves any number of passes.
    """

    count: int
    batch_size: int
    """Images per replica and step."""
    replicas: int

    @property
    def steps(self) -> int:
        return -(-self.count // (self.batch_size * self.replicas))

    def positions(self, step: int, replica: int) -> Positions:
        """Of `replica` at `step` (counted over all passes): int64 [batch_size], PADDING where there is no image."""
        start = (step % self.steps * self.replicas + replica) * self.batch_size
        positions = np.arange(start, start + self.batch_size, dtype=np.int64)
        return np.where(positions < self.count, positions, PADDING)


_READERS = 4
_IMAGES_PER_READ = 64

_orders = threading.local()


def _cached_order(count: int, seed: int, epoch: int) -> Positions:
    """The last order of this thread: it is asked for at every step and changes once an epoch."""
    key = (count, seed, epoch)
    if getattr(_orders, "key", None) != key:
        _orders.key, _orders.value = key, epoch_order(count, seed, epoch)
    value: Positions = _orders.value
    return value


class Source(Protocol):
    """Labelled inputs that are read by position."""

    @property
    def count(self) -> int: ...

    @property
    def labels(self) -> npt.NDArray[np.int32]: ...

    def batches(self, positions: Any) -> Any:
        """TensorFlow ops from positions int64 [B] (all valid) to inputs [B, ...] of static shape."""


class ShardSource:
    """The images of one split of a dataset, uint8 [B, S, S, 1].

    Every record's CRC is checked as it is read. What goes wrong in a reading thread is kept in
    `failure`, since TensorFlow passes on only its text.
    """

    def __init__(self, dataset: Path, manifest: Manifest, split: str, without: Collection[str] = ()) -> None:
        """Args:
        without: Source paths of records that are left out.
        """
        self._index = manifest.split(split, without)
        self._paths = [dataset / name for name in self._index.shard_names]
        self._manifest, self._split = manifest, split
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self.failure: Exception | None = None
        # When nothing can read any more: iterators, whose threads do, hold on to this source.
        weakref.finalize(self, _close, self._files).atexit = False

    @property
    def count(self) -> int:
        return len(self._index.labels)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._index.labels

    @property
    def paths(self) -> list[str]:
        return self._index.paths

    @property
    def groups(self) -> list[str]:
        """Of each image, the name of its group: images that show the same, or one patient."""
        return self._index.groups.to_pylist()

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        size, encoding = self._manifest.image_size, self._manifest.encoding
        if encoding == "raw":
            # The pixels lie in the record as they are: one copy, where TensorFlow's parser makes three.
            images = tf.numpy_function(weakly(self._read_raw), [positions], tf.uint8)
            images.set_shape([positions.shape[0], size, size, 1])
            return images
        serialized = tf.numpy_function(weakly(self._read), [positions], tf.string)
        serialized.set_shape(positions.shape)
        return schema.parse_batch(serialized, size, encoding)["image"]

    def pixels(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The images at `positions`: uint8 [B, S, S]."""
        return np.stack([self._pixels(payload)[..., 0] for payload in self._payloads(positions)])

    def masks(self, positions: Positions) -> npt.NDArray[np.bool_] | None:
        """Their lung masks, bool [B, S, S], all False where an image has none; None in a dataset without masks."""
        if not self._manifest.settings.masks:
            return None
        size = self._manifest.image_size
        encoded = (schema.decode_example(payload).mask for payload in self._payloads(positions))
        return np.stack(
            [np.zeros((size, size), np.bool_) if m is None else schema.decode_mask(m, size) for m in encoded]
        )

    def origins(self, positions: Positions) -> tuple[list[str | None], list[str]]:
        """Where they came from, as the collection says, and their groups of duplicates."""
        row_of = {row.path: row for row in self._manifest.rows}
        rows = [row_of[self.paths[position]] for position in positions]
        return [row.source for row in rows], [row.group for row in rows]

    def in_memory(self, limit_bytes: int) -> "Source":
        """All images, read now and in the order in which they lie on the disk; this source if they take too much."""
        size = self._manifest.image_size
        if self.count * size * size > limit_bytes:
            return self
        images = np.empty((self.count, size, size, 1), np.uint8)

        def read(positions: Positions) -> None:
            for position, payload in zip(positions, self._run(positions), strict=True):
                images[position] = self._pixels(payload)

        order = np.lexsort((self._index.offset, self._index.shard))
        by_shard = np.split(order, np.flatnonzero(np.diff(self._index.shard[order])) + 1)
        runs = [run for shard in by_shard for run in np.array_split(shard, -(-len(shard) // _IMAGES_PER_READ))]
        # Threads, so that the disk has several reads to do while checksums are computed.
        with ThreadPoolExecutor(_READERS) as threads:
            for _ in threads.map(read, runs):
                pass
        return ArraySource(images, self.labels)

    def _pixels(self, payload: bytes) -> npt.NDArray[np.uint8]:
        size, encoding = self._manifest.image_size, self._manifest.encoding
        if encoding == "raw":
            return schema.raw_pixels(payload, size)
        return schema.decode_image(schema.decode_example(payload).image, size, encoding)[..., None]

    def _read_raw(self, positions: Positions) -> npt.NDArray[np.uint8]:
        size = self._manifest.image_size
        images = np.empty((len(positions), size, size, 1), np.uint8)
        for slot, payload in enumerate(self._payloads(positions)):
            images[slot] = schema.raw_pixels(payload, size)
        return images

    def _read(self, positions: Positions) -> npt.NDArray[np.object_]:
        records = np.empty(len(positions), dtype=object)
        for slot, payload in enumerate(self._payloads(positions)):
            records[slot] = payload
        return records

    def _payloads(self, positions: Positions) -> Iterator[bytes]:
        with self._failures_kept():
            for position in positions:
                shard = int(self._index.shard[position])
                yield recordio.read_at(self._file(shard), *self._place(position), self._paths[shard])

    def _run(self, positions: Positions) -> Iterator[bytes]:
        """Of records that lie behind one another in one shard."""
        with self._failures_kept():
            shard = int(self._index.shard[positions[0]])
            places = [self._place(position) for position in positions]
            yield from recordio.read_run(self._file(shard), places, self._paths[shard])

    def _place(self, position: int) -> tuple[int, int]:
        return int(self._index.offset[position]), int(self._index.length[position])

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        except recordio.CorruptRecordError as error:
            self.failure = self._numbered(error)
            raise self.failure from error
        except Exception as error:
            self.failure = error
            raise

    def _numbered(self, error: recordio.CorruptRecordError) -> recordio.CorruptRecordError:
        """The error with the record's number in its shard, which only the index knows."""
        index = self._manifest.split(self._split)  # with what is left out
        in_shard = index.shard == self._paths.index(Path(error.shard))
        number = int(np.sum(in_shard & (index.offset < error.offset)))
        return recordio.CorruptRecordError(error.shard, number, error.offset, error.reason)

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                descriptor = self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):
                    # The first epoch reads all of it, here and there: let the disk begin at the front.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            return self._files[shard]


def _close(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)


class Indexed(Protocol):
    """What NumPy arrays do, and rows on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Positions) -> npt.NDArray[Any]: ...


class ArraySource:
    """Inputs in memory or on disk: `inputs` [N, ...], taken by an array of positions, and `labels` int32 [N]."""

    failure: Exception | None = None

    def __init__(self, inputs: Indexed, labels: npt.NDArray[np.int32]) -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels")
        self._inputs, self._labels = inputs, labels

    @property
    def count(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        rows = tf.numpy_function(weakly(self._take), [positions], self._inputs.dtype)
        rows.set_shape([positions.shape[0], *self._inputs.shape[1:]])
        return rows

    def _take(self, positions: Positions) -> npt.NDArray[Any]:
        return self._inputs[positions]


class Slice:
    """Some of a source's inputs, from `first` up to `last`."""

    def __init__(self, source: Source, first: int, last: int) -> None:
        self._source, self._first, self._last = source, first, last

    @property
    def count(self) -> int:
        return self._last - self._first

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._source.labels[self._first : self._last]

    def batches(self, positions: Any) -> Any:
        """As the source, from positions in the slice."""
        return self._source.batches(positions + self._first)


class _Elements:
    """What a step needs of the plan on one replica: positions, labels, mask and slots, each [B], by a counter."""

    def __init__(
        self,
        plan: TrainingPlan | EvaluationPlan,
        labels: npt.NDArray[np.int32],
        first_replica: int,
        local_replicas: int,
        start_step: int,
    ) -> None:
        self._plan, self._labels = plan, labels
        self._first_replica, self._local_replicas, self._start_step = first_replica, local_replicas, start_step

    def at(self, counter: npt.NDArray[np.int64]) -> tuple[Any, Any, Any, Any]:
        step, local = divmod(int(counter), self._local_replicas)
        replica, batch_size = self._first_replica + local, self._plan.batch_size
        positions = self._plan.positions(self._start_step + step, replica)
        mask = (positions != PADDING).astype(np.float32)
        valid = np.maximum(positions, 0)
        slots = np.arange(replica * batch_size, (replica + 1) * batch_size, dtype=np.int32)
        return valid, self._labels[valid], mask, slots


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


def worker_batches(
    source: Source,
    plan: TrainingPlan | EvaluationPlan,
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
    def load(counter: Any) -> dict[str, Any]:
        types = [tf.int64, tf.int32, tf.float32, tf.int32]
        positions, label, mask, slot = tf.numpy_function(weakly(elements.at), [counter], types)
        for tensor in (positions, label, mask, slot):
            tensor.set_shape([batch_size])
        batch = {"inputs": source.batches(positions), "label": label, "mask": mask, "slot": slot}
        return batch if extra is None else batch | {"extra": tf.gather(extra, positions)}

    options = tf.data.Options()
    options.autotune.enabled = False  # there is nothing to tune, and its thread holds up the end of an iterator
    # Not `Dataset.counter`, which leaves a function in TensorFlow's global graph each time: memory that no one frees.
    # Repeated, although nobody counts so far, as a distributed iterator asks a dataset that may end before every batch.
    counter = tf.data.Dataset.range(tf.int64.max).repeat()
    batches = counter.map(load, num_parallel_calls=2, deterministic=True)
    batches = batches.prefetch(2 * local_replicas).with_options(options)
    batches.kept = (source, elements)  # as long as the dataset, which its iterators hold
    return batches
