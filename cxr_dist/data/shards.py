"""Labelled inputs that are read by position: the shards of a dataset, arrays in memory, rows on disk.

Images are read through the byte offsets in the manifest: a worker touches only the records of its own replicas.
"""

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cxr_dist.data.batch_sampler import Positions
from cxr_dist.runs.seen_images import Digests, digests_of
from tfrecords_builder.collection.metadata import normalized_patient
from tfrecords_builder.common.pool import default_workers
from tfrecords_builder.format import record, tfrecord
from tfrecords_builder.format.manifest import Manifest

P = ParamSpec("P")
R = TypeVar("R")

_READERS = 8
"""At most, of a split that is read into memory; no more than processors, as each decodes what it reads."""
_RUN_BYTES = 1 << 19
"""What a sequential pass reads at once: it stays in the processor's cache until it is checked and copied."""


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
        """Of each image, the name of its group: copies, or images of one patient."""
        return self._index.groups.to_pylist()

    @property
    def patients(self) -> int:
        """How many patients the collection names for these images."""
        column = self._manifest.of_paths(self.paths, ["patient"])["patient"]
        return len({normalized_patient(name) for name in column.drop_null().unique().to_pylist()} - {None})

    @property
    def digests(self) -> Digests:
        """Of each image, the digest of its source file: uint64 [N]."""
        return digests_of(self._manifest.of_paths(self.paths, ["sha256"])["sha256"].to_pylist())

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
        return record.parse_batch(serialized, size, encoding)["image"]

    def pixels(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The images at `positions`: uint8 [B, S, S]."""
        return np.stack([self._pixels(payload)[..., 0] for payload in self._payloads(positions)])

    def masks(self, positions: Positions) -> npt.NDArray[np.bool_] | None:
        """Their lung masks, bool [B, S, S], all False where an image has none; None in a dataset without masks."""
        if not self._manifest.settings.masks:
            return None
        size = self._manifest.image_size
        encoded = (record.decode_example(payload).mask for payload in self._payloads(positions))
        return np.stack(
            [np.zeros((size, size), np.bool_) if m is None else record.decode_mask(m, size) for m in encoded]
        )

    def origins(self, positions: Positions) -> tuple[list[str | None], list[str]]:
        """Where they came from, as the collection says, and their groups of duplicates."""
        table = self._manifest.of_paths([self.paths[position] for position in positions], ["source", "group"])
        return table["source"].to_pylist(), table["group"].to_pylist()

    def in_memory(self, limit_bytes: int) -> "Source":
        """All images, read now as they lie on the disk; this source if they are too many, or none."""
        size = self._manifest.image_size
        if not 0 < self.count * size * size <= limit_bytes:
            return self
        images = MemorySource.empty((self.count, size, size, 1), np.dtype(np.uint8))

        ended = threading.Event()

        def read(shard: Positions) -> None:
            for position, payload in zip(shard, self._sequential(shard), strict=True):
                if ended.is_set():
                    return
                images[position] = self._pixels(payload)

        order = np.lexsort((self._index.offset, self._index.shard))
        shards = np.split(order, np.flatnonzero(np.diff(self._index.shard[order])) + 1)
        # Each thread reads a shard from its beginning to its end, so that the system reads ahead of it.
        with ThreadPoolExecutor(min(_READERS, default_workers())) as threads:
            try:
                for _ in threads.map(read, shards):
                    pass
            finally:  # damage, or Ctrl-C: the other threads need not come to the end of theirs
                ended.set()
        return MemorySource(images, self.labels)

    def _pixels(self, payload: bytes) -> npt.NDArray[np.uint8]:
        size, encoding = self._manifest.image_size, self._manifest.encoding
        if encoding == "raw":
            return record.raw_pixels(payload, size)
        return record.decode_image(record.decode_example(payload).image, size, encoding)[..., None]

    def _read_raw(self, positions: Positions) -> npt.NDArray[np.uint8]:
        size = self._manifest.image_size
        images = np.empty((len(positions), size, size, 1), np.uint8)
        for slot, payload in enumerate(self._payloads(positions)):
            images[slot] = record.raw_pixels(payload, size)
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
                yield tfrecord.read_at(self._file(shard), *self._place(position), self._paths[shard])

    def _sequential(self, positions: Positions) -> Iterator[bytes]:
        """Of records of one shard, by rising offset."""
        with self._failures_kept():
            shard = int(self._index.shard[positions[0]])
            offsets, lengths = self._index.offset[positions], self._index.length[positions]
            run_of = (offsets - offsets[0]) // _RUN_BYTES
            starts = np.flatnonzero(np.diff(run_of, prepend=-1, append=run_of[-1] + 1))
            file = self._file(shard, ahead=False)
            for first, last in pairwise(starts):
                places = zip(offsets[first:last].tolist(), lengths[first:last].tolist(), strict=True)
                yield from tfrecord.read_run(file, list(places), self._paths[shard])

    def _place(self, position: int) -> tuple[int, int]:
        return int(self._index.offset[position]), int(self._index.length[position])

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        except tfrecord.CorruptRecordError as error:
            self.failure = self._numbered(error)
            raise self.failure from error
        except Exception as error:
            self.failure = error
            raise

    def _numbered(self, error: tfrecord.CorruptRecordError) -> tfrecord.CorruptRecordError:
        """The error with the record's number in its shard, which only the index knows."""
        index = self._manifest.split(self._split)  # with what is left out
        in_shard = index.shard == self._paths.index(Path(error.shard))
        number = int(np.sum(in_shard & (index.offset < error.offset)))
        return tfrecord.CorruptRecordError(error.shard, number, error.offset, error.reason)

    def _file(self, shard: int, ahead: bool = True) -> int:
        with self._lock:
            if shard not in self._files:
                descriptor = self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
                if ahead and hasattr(os, "posix_fadvise"):
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


class MemorySource(ArraySource):
    """Inputs in memory, [N, ...], of which TensorFlow takes rows itself, without a call into Python for each batch."""

    _ALIGNMENT = 64
    """Bytes; TensorFlow ends the process where it finds other memory (`EIGEN_MAX_ALIGN_BYTES`)."""

    def __init__(self, inputs: npt.NDArray[Any], labels: npt.NDArray[np.int32]) -> None:
        """Args:
        inputs: Made by `empty`; not copied.
        """
        import tensorflow as tf

        super().__init__(inputs, labels)
        if inputs.ctypes.data % self._ALIGNMENT:
            raise ValueError(f"inputs at {inputs.ctypes.data:#x}: not aligned to {self._ALIGNMENT} bytes")
        self._tensor = tf.experimental.dlpack.from_dlpack(inputs.__dlpack__())

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array for what is to come."""
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.empty(size + cls._ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % cls._ALIGNMENT
        return memory[first : first + size].view(dtype).reshape(shape)

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        return tf.gather(self._tensor, positions)


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
