"""Labelled inputs that are read by position: the shards of a dataset, arrays in memory, rows on disk.

Images are read through the byte offsets in the manifest: a worker touches only the records of its own replicas.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.arrays import MemorySource, Source, weak_numpy_function
from cxr_dist.data.batch_sampler import Positions
from cxr_dist.data.shared_array import shared_array
from cxr_dist.runs.seen_images import Digests, digests_of
from tfrecords_builder.collection.metadata import normalized_patient
from tfrecords_builder.common.pool import default_workers
from tfrecords_builder.format import record, tfrecord
from tfrecords_builder.format.manifest import Manifest, SplitIndex

_READERS = 8
"""At most, of a split that is read into memory; no more than processors, as each decodes what it reads."""
_RUN_BYTES = 1 << 19
"""What a sequential pass reads at once: it stays in the processor's cache until it is checked and copied."""


class ShardSource:
    """The images of one split of a dataset, uint8 [B, S, S, 1].

    Every record's CRC is checked as it is read.
    """

    def __init__(self, dataset: Path, manifest: Manifest, split: str, without: Collection[str] = ()) -> None:
        """Args:
        without: Source paths of records that are left out.
        """
        self._index = manifest.split(split, without)
        self._manifest = manifest
        self._reader = _RecordReader(dataset, self._index, lambda: manifest.split(split))

    @property
    def failure(self) -> Exception | None:
        """What a reading thread met, of which TensorFlow passes on only the text."""
        return self._reader.failure

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
    def patient_names(self) -> list[str | None]:
        """[N]: the patient of each image, as `normalized_patient` writes it, or a code; None where it is unknown."""
        names: list[str | None] = self._manifest.of_paths(self.paths, ["patient"])["patient"].to_pylist()
        return [None if name is None else normalized_patient(name) for name in names]

    @property
    def digests(self) -> Digests:
        """Of each image, the digest of its source file: uint64 [N]."""
        return digests_of(self._manifest.of_paths(self.paths, ["sha256"])["sha256"].to_pylist())

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        size, encoding = self._manifest.image_size, self._manifest.encoding
        if encoding == "raw":
            # The pixels lie in the record as they are: one copy, where TensorFlow's parser makes three.
            images = weak_numpy_function(self._read_raw, [positions], tf.uint8)
            images.set_shape([positions.shape[0], size, size, 1])
            return images
        serialized = weak_numpy_function(self._read, [positions], tf.string)
        serialized.set_shape(positions.shape)
        return record.parse_batch(serialized, size, encoding)["image"]

    def pixels(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The images at `positions`: uint8 [B, S, S]."""
        return np.stack([_decoded(self._manifest, payload)[..., 0] for payload in self._reader.payloads(positions)])

    def masks(self, positions: Positions) -> npt.NDArray[np.bool_] | None:
        """Their lung masks, bool [B, S, S], all False where an image has none; None in a dataset without masks."""
        if not self._manifest.settings.masks:
            return None
        size = self._manifest.image_size
        encoded = (record.decode_example(payload).mask for payload in self._reader.payloads(positions))
        return np.stack(
            [np.zeros((size, size), np.bool_) if m is None else record.decode_mask(m, size) for m in encoded]
        )

    def origins(self, positions: Positions) -> tuple[list[str | None], list[str]]:
        """Where they came from, as the collection says, and their groups of duplicates."""
        table = self._manifest.of_paths([self.paths[position] for position in positions], ["source", "group"])
        return table["source"].to_pylist(), table["group"].to_pylist()

    def in_memory(self, limit_bytes: int, shared: Path | None = None) -> "Source":
        """All images, read now as they lie on the disk; this source if they are too many, or none.

        Args:
            limit_bytes: Of the split's pixels.
            shared: A folder of this machine in which its processes share them; see `shared_array`.
        """
        size = self._manifest.image_size
        if not 0 < self.count * size * size <= limit_bytes:
            return self
        shape = (self.count, size, size, 1)
        read = partial(_read_all, self._manifest, self._index, self._reader)
        if shared is None:
            images = MemorySource.empty(shape, np.dtype(np.uint8))
            read(images)
        else:
            images = shared_array(shared / f"{_content(self._manifest, self._index)}.uint8", shape, read)
        return MemorySource(images, self.labels)

    def _read_raw(self, positions: Positions) -> npt.NDArray[np.uint8]:
        size = self._manifest.image_size
        images = np.empty((len(positions), size, size, 1), np.uint8)
        for slot, payload in enumerate(self._reader.payloads(positions)):
            images[slot] = record.raw_pixels(payload, size)
        return images

    def _read(self, positions: Positions) -> npt.NDArray[np.object_]:
        records = np.empty(len(positions), dtype=object)
        for slot, payload in enumerate(self._reader.payloads(positions)):
            records[slot] = payload
        return records


def _read_all(manifest: Manifest, index: SplitIndex, reader: "_RecordReader", images: npt.NDArray[np.uint8]) -> None:
    """Fill `images`, uint8 [N, S, S, 1]."""
    ended = threading.Event()

    def read(shard: Positions) -> None:
        for position, payload in zip(shard, reader.sequential(shard), strict=True):
            if ended.is_set():
                return
            images[position] = _decoded(manifest, payload)

    order = np.lexsort((index.offset, index.shard))
    shards = np.split(order, np.flatnonzero(np.diff(index.shard[order])) + 1)
    # Each thread reads a shard from its beginning to its end, so that the system reads ahead of it.
    with ThreadPoolExecutor(min(_READERS, default_workers())) as threads:
        try:
            for _ in threads.map(read, shards):
                pass
        finally:  # damage, or Ctrl-C: the other threads need not come to the end of theirs
            ended.set()


def _content(manifest: Manifest, index: SplitIndex) -> str:
    """A name for the pixels of all images, in their order."""
    digest = hashlib.sha256(manifest.fingerprint.encode())
    for part in (np.array(index.shard_names), index.shard, index.offset):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:32]


def _decoded(manifest: Manifest, payload: bytes) -> npt.NDArray[np.uint8]:
    if manifest.encoding == "raw":
        return record.raw_pixels(payload, manifest.image_size)
    example = record.decode_example(payload)
    return record.decode_image(example.image, manifest.image_size, manifest.encoding)[..., None]


class _RecordReader:
    """Reads the records of a split by position; checks the CRC of each."""

    def __init__(self, dataset: Path, index: SplitIndex, whole: Callable[[], SplitIndex]) -> None:
        """Args:
        whole: The index with the records that are left out.
        """
        self._index, self._whole = index, whole
        self._paths = [dataset / name for name in index.shard_names]
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self.failure: Exception | None = None
        # When nothing can read any more: iterators, whose threads do, hold on to this reader.
        weakref.finalize(self, _close, self._files).atexit = False

    def payloads(self, positions: Positions) -> Iterator[bytes]:
        with self._failures_kept():
            for position in positions:
                shard = int(self._index.shard[position])
                yield tfrecord.read_at(self._file(shard), *self._place(position), self._paths[shard])

    def sequential(self, positions: Positions) -> Iterator[bytes]:
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
        index = self._whole()
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
