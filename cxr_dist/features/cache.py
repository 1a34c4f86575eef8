"""The activation cache: what the frozen layers compute of each image, computed once and kept on disk.

Frozen layers give the same output for the same pixels. A stage that trains the head alone then needs one forward pass
in all, and its epochs are almost free. A stage that trains upper layers too saves the forward pass through the lower
ones, where reading their output costs less (`cache_pays`). With augmentation a fixed number of copies of each image is
computed, each by fresh draws, and every epoch takes the next copy.

Entries are found by all that decides their numbers (`_describe`), so epochs, restarts, runs and trials share them. Each
worker computes its share of the images and reads what it needs. Not in the key: the device and the compiler, which
change numbers within float tolerance.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import AugmentationConfig, Config, FeaturesConfig, StageConfig
from cxr_dist.data import augmentation as augment, pipeline, random_streams
from cxr_dist.data.arrays import ArraySource, Slice, Source
from cxr_dist.data.batch_sampler import EvaluationBatchSampler
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed import collectives
from cxr_dist.distributed.devices import DeviceKind, Topology
from cxr_dist.features.store import Description, FeatureStore, PartWriter, Rows
from cxr_dist.model import forward, split_point
from cxr_dist.model.resnet import IMAGENET_MEAN_BGR, POOL_NAME
from cxr_dist.model.split_point import SplitPoint
from tfrecords_builder.common.errors import UserError

BATCH_SIZES: dict[DeviceKind, int] = {"CPU": 32, "GPU": 256}
"""Images per replica and step."""
WAIT_S = 10.0
"""For another run that computes the same; then all workers hear of it, and wait on."""
_PROBE_BYTES = 1 << 26

VERSION = 2
"""Of what is computed: raised with every change of the network below a split point, or of the augmentation."""

Progress = Callable[[int, int, float], None]
"""Told the images done and their number, of this worker, and the images per second of all workers."""


@dataclass(frozen=True)
class SplitImages:
    """The images of one split, by position, and what names their content."""

    dataset: str
    """The dataset's fingerprint."""
    split: str
    source: ShardSource


@dataclass(frozen=True)
class AugmentedCopy:
    """One of the augmented copies of every image of a split."""

    augmentation: AugmentationConfig
    number: int


def use_of_cache(features: FeaturesConfig, stage: StageConfig, name: str) -> Literal["on", "off", "auto"]:
    """Whether the stage reads the activations at the split point `name` instead of images; auto: if it pays."""
    if features.cache == "off":
        return "off"
    if name == POOL_NAME:
        # As many forward passes as epochs would save nothing, and lose fresh draws.
        useless = stage.augment and features.augmented_copies >= stage.epochs
        return "off" if useless and features.cache == "auto" else "on"
    if features.cache_activations == "auto" and stage.augment:
        return "off"
    return features.cache_activations


def cache_pays(*, epochs: int, bytes_per_image: int, seconds_below: float, read_rate: float, write_rate: float) -> bool:
    """Whether caching the activations at a split point saves time, of one worker.

    Args:
        epochs: Of the stage that reads them.
        bytes_per_image: In the cache.
        seconds_below: An image's forward pass up to the split point.
        read_rate, write_rate: Of the disk, bytes per second.
    """
    cached = seconds_below + bytes_per_image / write_rate + epochs * bytes_per_image / read_rate
    return cached < epochs * seconds_below


class FrozenFeatures:
    """Computes and finds the activations of one run's frozen layers."""

    def __init__(
        self,
        config: Config,
        strategy: Any,
        topology: Topology,
        store: FeatureStore,
        *,
        precision: str,
        xla: bool,
        progress: Progress,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        progress: Of what is computed.
        waiting: Called now and then while another run computes the same, and this one waits for it.
        """
        self._config, self.strategy, self.topology, self._store = config, strategy, topology, store
        self._precision, self._xla, self._progress = precision, xla, progress
        self._waiting = waiting
        self._batch_size = BATCH_SIZES[topology.kind]
        self._steps: dict[tuple[tuple[str, ...], AugmentationConfig | None], Callable[[Any], Any]] = {}
        self._iterators: list[Any] = []
        """Kept until the run ends: destroying one may take a minute (see `pipeline.distributed_batches`)."""

    def sources(
        self, model: Any, names: Sequence[str], images: SplitImages, augmentation: AugmentationConfig | None
    ) -> ArraySource:
        """The activations at a split point in place of images, of every augmented copy.

        Args:
            model: Frozen below all split points that are named.
            names: The split point; then those of later stages, computed in the same pass where they are missing.
            images: What to compute them of.
            augmentation: Of the copies; None for the images as they are.
        """
        copies: list[AugmentedCopy | None] = [None]
        if augmentation is not None:
            copies = [AugmentedCopy(augmentation, number) for number in range(self._config.features.augmented_copies)]
        described = self._describe(model, names, images, copies)
        cached = [self._find_or_compute(model, entries, images, copy) for copy, entries in described.items()]
        rows = Rows([part for of_copy in cached for part in of_copy[names[0]].parts])
        return ArraySource(rows, np.tile(images.source.labels, len(copies)))

    def pays(self, model: Any, split: SplitPoint, images: SplitImages, total: int, epochs: int) -> bool:
        """Whether caching at a split point saves time, from a measurement of one batch and of the disk.

        Args:
            model: Frozen below the split point.
            split: The split point.
            images: To measure with.
            total: How many images would be cached, of all splits.
            epochs: Of the stage that reads them.
        """
        entry = self._describe(model, [split.name], images, [None])[None][split.name]
        if collectives.all_workers_true(self.strategy, self._store.has(entry)):
            return True
        if not collectives.all_workers_true(self.strategy, self._store.fits(total * split.bytes_per_image)):
            return False
        run, iterator = self._passes(model, [split.name], images.source, None, None)
        _fetched(run(iterator))
        started = time.perf_counter()
        _fetched(run(iterator))
        seconds = time.perf_counter() - started
        read_rate, write_rate = disk_rates(self._store.folder)
        answer = cache_pays(
            epochs=epochs,
            bytes_per_image=split.bytes_per_image,
            seconds_below=seconds / (self._batch_size * len(self.topology.devices)),
            read_rate=read_rate,
            write_rate=write_rate,
        )
        return collectives.all_workers_true(self.strategy, answer)

    def _find_or_compute(
        self, model: Any, entries: dict[str, Description], images: SplitImages, copy: AugmentedCopy | None
    ) -> dict[str, Rows]:
        with ExitStack() as locks:
            other = _OtherRun()
            while not collectives.all_workers_true(self.strategy, self._lock(list(entries.values()), locks, other)):
                self._waiting()
            rows = {name: self._store.find(entry) for name, entry in entries.items()}
            missing = {
                name: entry
                for name, entry in entries.items()
                if not collectives.all_workers_true(self.strategy, rows[name] is not None)
            }
            if missing:
                self._compute(model, missing, images, copy)
                rows |= {name: self._store.find(entry) for name, entry in missing.items()}
        whole = {name: of_name for name, of_name in rows.items() if of_name is not None}
        self._must_share(len(whole) == len(rows))
        return whole

    def _must_share(self, seen: bool) -> None:
        """End the run on all workers unless each has `seen` what the others wrote."""
        if not collectives.all_workers_true(self.strategy, seen):
            raise UserError(
                f"features.folder {self._store.folder}: other workers do not see what one worker writes there; give a "
                "folder that all workers share, or set features.cache=off"
            )

    def _lock(self, entries: Sequence[Description], locks: ExitStack, other: "_OtherRun") -> bool:
        """Whether the chief could keep other runs from computing `entries`; it waits some seconds for those that do.

        Raises:
            UserError: the one that holds them has written nothing for as long as a worker may be silent.
        """
        if not self.topology.is_chief:
            return True
        try:
            locks.enter_context(self._store.computing(entries, WAIT_S))
        except TimeoutError:
            limit = self._config.worker_timeout_s
            if other.silent_s(sum(self._store.written(entry) for entry in entries)) > limit:
                raise UserError(
                    f"features.folder {self._store.folder}: another run holds the same features, but wrote "
                    f"nothing for {limit:.0f} s; end it, give another folder, or set features.cache=off"
                ) from None
            return False
        return True

    def _compute(
        self, model: Any, entries: dict[str, Description], images: SplitImages, copy: AugmentedCopy | None
    ) -> None:
        """Compute the missing `entries` with all other workers, a share of the images each."""
        worker, workers, names = self.topology.worker, self.topology.workers, list(entries)
        tensors = split_point.frozen_outputs(model, names).outputs
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in zip(names, tensors, strict=True)}
        dtypes = {name: split_point.stored_dtype(name) for name in names}
        count = images.source.count
        if self.topology.is_chief:
            for name, entry in entries.items():
                self._store.begin(entry, count * int(np.prod(shapes[name])) * np.dtype(dtypes[name]).itemsize)
        collectives.barrier(self.strategy)
        self._must_share(all(self._store.has_begun(entry) for entry in entries.values()))
        first, last = count * worker // workers, count * (worker + 1) // workers
        with ExitStack() as files:
            writers = {
                name: files.enter_context(self._store.part(entry, worker, shapes[name], dtypes[name]))
                for name, entry in entries.items()
            }
            if last > first:  # or there are more workers than images
                augmentation, draws = None, None
                if copy is not None:
                    augmentation = copy.augmentation
                    draws = copy_draws(count, self._config.seed, copy.number)[first:last]
                self._write(model, writers, Slice(images.source, first, last), augmentation, draws)
        collectives.barrier(self.strategy)
        if self.topology.is_chief:
            for name, entry in entries.items():
                self._store.commit(entry, workers, shapes[name], dtypes[name])
        collectives.barrier(self.strategy)

    def _write(
        self,
        model: Any,
        writers: dict[str, PartWriter],
        source: Source,
        augmentation: AugmentationConfig | None,
        draws: npt.NDArray[np.float32] | None,
    ) -> None:
        """The activations at each split point of every input of `source`, in order."""
        run, iterator = self._passes(model, list(writers), source, augmentation, draws)
        done, started, computed = 0, time.perf_counter(), run(iterator)
        while done < source.count:
            # The device computes the next step while this one is written.
            ahead = done + self._batch_size * len(computed) < source.count
            previous, computed = computed, run(iterator) if ahead else []
            for outputs in _fetched(previous):  # of each replica, in the order of the images; the last are padded
                kept = min(source.count - done, len(outputs[0]))
                for (name, writer), output in zip(writers.items(), outputs, strict=True):
                    _append(writer, output[:kept], name)
                done += kept
            self._progress(done, source.count, done * self.topology.workers / (time.perf_counter() - started))

    def _passes(
        self,
        model: Any,
        names: Sequence[str],
        source: Source,
        augmentation: AugmentationConfig | None,
        draws: npt.NDArray[np.float32] | None,
    ) -> tuple[Callable[[Any], Any], Any]:
        """A compiled step of this worker alone, and what it reads: a batch for each of its devices."""
        devices = self.topology.devices
        # Compiled once for all splits: of the same layers, as they are frozen.
        run = self._steps.get((tuple(names), augmentation))
        if run is None:
            run = self._steps[tuple(names), augmentation] = forward.make_feature_step(
                self.strategy,
                split_point.frozen_outputs(model, names),
                [split_point.stored_dtype(name) for name in names],
                augmentation,
                self._xla,
            )
        alone = Topology(1, 0, self.topology.kind, devices)
        plan = EvaluationBatchSampler(source.count, self._batch_size, len(devices))
        iterator = pipeline.distributed_batches(self.strategy, alone, source, plan, extra=draws)
        self._iterators.append(iterator)
        return run, iterator

    def _describe(
        self, model: Any, names: Sequence[str], images: SplitImages, copies: Sequence[AugmentedCopy | None]
    ) -> dict[AugmentedCopy | None, dict[str, Description]]:
        """Of each copy and split point, all that decides the numbers."""
        weights = {name: _digest(split_point.variables_below(model, name)) for name in names}
        common = {
            "version": VERSION,
            "dataset": images.dataset,
            "split": images.split,
            "preprocessing": {"subtracted_bgr": list(IMAGENET_MEAN_BGR), "image_size": self._config.model.image_size},
            "computed_in": self._precision,
        }
        described: dict[AugmentedCopy | None, dict[str, Description]] = {}
        for copy in copies:
            view = None
            if copy is not None:
                changed = {"seed": self._config.seed, "number": copy.number}
                view = copy.augmentation.model_dump(mode="json") | changed
            described[copy] = {
                name: common
                | {"layer": name, "weights": weights[name], "dtype": split_point.stored_dtype(name), "view": view}
                for name in names
            }
        return described


class _OtherRun:
    """Another run, watched while this one waits for what it computes."""

    def __init__(self) -> None:
        self._written, self._since = -1, 0.0

    def silent_s(self, written: int) -> float:
        """Seconds since it was seen to have written another number of bytes than `written`."""
        if written != self._written:
            self._written, self._since = written, time.monotonic()
        return time.monotonic() - self._since


def _fetched(outputs: list[list[Any]]) -> list[list[npt.NDArray[Any]]]:
    return [[output.numpy() for output in of_replica] for of_replica in outputs]


def _append(writer: PartWriter, rows: npt.NDArray[Any], name: str) -> None:
    try:
        writer.append(rows)
    except OverflowError as error:
        key = "cache" if name == POOL_NAME else "cache_activations"
        raise UserError(f"the tensors at {name} cannot be cached ({error}); set features.{key}=off") from None


def copy_draws(count: int, seed: int, number: int) -> npt.NDArray[np.float32]:
    """The augmentation's draws of each image in a copy: float32 [count, augment.DRAWS], -1 to 1."""
    return random_streams.uniform((count, augment.DRAWS), "augmented view", seed, number)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second that a file in `folder` is read with, not from memory, and written with."""
    data = os.urandom(_PROBE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()
        read = time.perf_counter()
    return _PROBE_BYTES / (read - written), _PROBE_BYTES / (written - begun)


def _digest(variables: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for variable in sorted(variables, key=lambda variable: str(variable.path)):
        digest.update(str(variable.path).encode())
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()
