"""What the frozen part of the network computes, computed once, kept on disk, and used in place of images.

What is frozen gives the same output for the same pixels. A stage that trains the head alone then needs one forward pass
in all, and its epochs are almost free; one that trains upper layers too saves the forward pass through the lower ones,
where reading their output costs less (`cut_pays`). With augmentation a fixed number of views of each image is computed,
each by fresh draws, and epoch after epoch takes the next view.

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
from cxr_dist.data.batch_sampler import EvaluationPlan
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed import collectives
from cxr_dist.distributed.devices import Topology
from cxr_dist.features.store import Description, FeatureStore, PartWriter, Rows
from cxr_dist.model import forward, split_point
from cxr_dist.model.resnet import IMAGENET_MEAN_BGR, POOL_NAME
from tfrecords_builder.common.errors import UserError

BATCH_SIZE = 32
"""Images per replica and step."""
WAIT_S = 10.0
"""For another run that computes the same; then all workers hear of it, and wait on."""
_PROBE_BYTES = 1 << 26

VERSION = 2
"""Of what is computed: raised with every change of the network below a cut, of the augmentation or of its draws."""

Progress = Callable[[int, int, float], None]
"""Told the images done and their number, of this worker, and the images per second of all workers."""


@dataclass(frozen=True)
class SplitImages:
    """The images of one split, by position, and what names their content."""

    dataset: str
    """The dataset's fingerprint."""
    split: str
    source: ShardSource


def use_of_cut(features: FeaturesConfig, stage: StageConfig, name: str) -> Literal["on", "off", "auto"]:
    """Whether the stage reads the tensors at the cut `name` instead of images; auto: if it pays."""
    if features.cache == "off":
        return "off"
    if name == POOL_NAME:
        # As many forward passes as epochs would save nothing, and lose fresh draws.
        useless = stage.augment and features.views >= stage.epochs
        return "off" if useless and features.cache == "auto" else "on"
    if features.cut == "auto" and stage.augment:
        return "off"
    return features.cut


def cut_pays(
    *, images: int, epochs: int, bytes_per_image: int, seconds_below: float, read_rate: float, write_rate: float
) -> bool:
    """Whether keeping the tensors at a cut saves time, of one worker.

    Args:
        images: Of training and validation together, read once an epoch.
        epochs: Of the stages that read them.
        bytes_per_image: In the cache.
        seconds_below: An image's forward pass up to the cut.
        read_rate, write_rate: Of the disk, bytes per second.
    """
    without = epochs * seconds_below
    with_cut = seconds_below + bytes_per_image / write_rate + epochs * bytes_per_image / read_rate
    return images * with_cut < images * without


class FrozenFeatures:
    """Computes and finds the tensors at cuts of one run's model."""

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
        waiting: Told now and then that another run computes the same, and this one waits for it.
        """
        self._config, self._strategy, self._topology, self._store = config, strategy, topology, store
        self._precision, self._xla, self._progress = precision, xla, progress
        self._waiting = waiting
        self._iterators: list[Any] = []
        """Kept until the run ends: destroying one may take a minute (see `pipeline.distributed_batches`)."""

    def sources(
        self, model: Any, name: str, also: Sequence[str], images: SplitImages, augmentation: AugmentationConfig | None
    ) -> ArraySource:
        """The tensors at the cut `name` in place of images, of every view.

        Args:
            model: Frozen below all cuts that are named.
            name: Of the cut.
            also: Cuts of later stages, computed in the same pass where they are missing.
            images: What to compute them of.
            augmentation: Of the views; None for the images as they are.
        """
        views = range(self._config.features.views) if augmentation else (None,)
        found = [self._find_or_compute(model, [name, *also], images, augmentation, view) for view in views]
        rows = Rows([part for each in found for part in each[name].parts])
        return ArraySource(rows, np.tile(images.source.labels, len(found)))

    def pays(self, model: Any, where: split_point.Cut, images: SplitImages, total: int, epochs: int) -> bool:
        """Whether the tensors at a cut are worth their bytes, from a measurement of one batch and of the disk."""
        needed = total * where.bytes_per_image
        present = self._store.has(self._describe(model, where.name, images, None, None))
        if collectives.all_agree(self._strategy, present):
            return True
        if not collectives.all_agree(self._strategy, self._store.fits(needed)):
            return False
        dtypes = [split_point.stored_dtype(where.name)]
        run, iterator, batch = self._passes(model, [where.name], dtypes, images.source, None, None)
        run(iterator)
        started = time.perf_counter()
        run(iterator)
        seconds = (time.perf_counter() - started) / batch
        read_rate, write_rate = disk_rates(self._store.folder)
        answer = cut_pays(
            images=total,
            epochs=epochs,
            bytes_per_image=where.bytes_per_image,
            seconds_below=seconds,
            read_rate=read_rate,
            write_rate=write_rate,
        )
        return collectives.all_agree(self._strategy, answer)

    def _find_or_compute(
        self,
        model: Any,
        names: Sequence[str],
        images: SplitImages,
        augmentation: AugmentationConfig | None,
        view: int | None,
    ) -> dict[str, Rows]:
        entries = {name: self._describe(model, name, images, augmentation, view) for name in names}
        with ExitStack() as held:
            other = _OtherRun()
            while not collectives.all_agree(self._strategy, self._hold(list(entries.values()), held, other)):
                self._waiting()
            found = {name: self._store.find(entry) for name, entry in entries.items()}
            missing = [name for name in names if not collectives.all_agree(self._strategy, found[name] is not None)]
            if missing:
                self._compute(model, {name: entries[name] for name in missing}, images, augmentation, view)
                found |= {name: self._store.find(entries[name]) for name in missing}
        whole = {name: rows for name, rows in found.items() if rows is not None}
        self._must_agree(len(whole) == len(found))
        return whole

    def _must_agree(self, seen: bool) -> None:
        """End the run on all workers unless each has `seen` what the others wrote."""
        if not collectives.all_agree(self._strategy, seen):
            raise UserError(
                f"features.folder {self._store.folder}: what one worker writes there, others do not see; name a folder "
                "that all workers share, or set features.cache=off"
            )

    def _hold(self, entries: Sequence[Description], held: ExitStack, other: "_OtherRun") -> bool:
        """Whether the chief could keep other runs from computing `entries`; some seconds are given to those that do."""
        if self._topology.is_chief:
            try:
                held.enter_context(self._store.computing(entries, WAIT_S))
            except TimeoutError:
                self._check(other, entries)
                return False
        return True

    def _check(self, other: "_OtherRun", entries: Sequence[Description]) -> None:
        """End this run when the one that holds `entries` has written nothing for as long as a worker may be silent."""
        limit = self._config.worker_timeout_s
        if other.silent_s(sum(self._store.written(entry) for entry in entries)) > limit:
            raise UserError(
                f"features.folder {self._store.folder}: another run holds the same features, and has written nothing "
                f"for {limit:.0f} s; end it, name another folder, or set features.cache=off"
            )

    def _compute(
        self,
        model: Any,
        entries: dict[str, Description],
        images: SplitImages,
        augmentation: AugmentationConfig | None,
        view: int | None,
    ) -> None:
        topology, names = self._topology, list(entries)
        tensors = split_point.frozen_outputs(model, names).outputs
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in zip(names, tensors, strict=True)}
        dtypes = {name: split_point.stored_dtype(name) for name in names}
        if topology.is_chief:
            for name, entry in entries.items():
                row = int(np.prod(shapes[name])) * np.dtype(dtypes[name]).itemsize
                self._store.begin(entry, images.source.count * row)
        collectives.all_agree(self._strategy, True)
        self._must_agree(all(self._store.has_begun(entry) for entry in entries.values()))
        count, workers = images.source.count, topology.workers
        first, last = count * topology.worker // workers, count * (topology.worker + 1) // workers
        mine = Slice(images.source, first, last)
        draws = None if view is None else view_draws(count, self._config.seed, view)[first:last]
        with ExitStack() as files:
            writers = [
                files.enter_context(self._store.part(entries[name], topology.worker, shapes[name], dtypes[name]))
                for name in names
            ]
            if mine.count:  # or there are more workers than images
                self._write(writers, model, names, mine, augmentation, draws)
        collectives.all_agree(self._strategy, True)
        if topology.is_chief:
            for name, entry in entries.items():
                self._store.commit(entry, topology.workers, shapes[name], dtypes[name])
        collectives.all_agree(self._strategy, True)

    def _write(
        self,
        writers: Sequence[PartWriter],
        model: Any,
        names: Sequence[str],
        source: Source,
        augmentation: AugmentationConfig | None,
        draws: npt.NDArray[np.float32] | None,
    ) -> None:
        """The tensors at each cut of every input of `source`, in order."""
        dtypes = [split_point.stored_dtype(name) for name in names]
        run, iterator, _ = self._passes(model, names, dtypes, source, augmentation, draws)
        done, begun = 0, time.perf_counter()
        while done < source.count:
            for outputs in run(iterator):  # of each replica, in the order of the images; the last are padded
                kept = min(source.count - done, len(outputs[0]))
                for name, writer, output in zip(names, writers, outputs, strict=True):
                    _append(writer, output[:kept], name)
                done += kept
            self._progress(done, source.count, done * self._topology.workers / (time.perf_counter() - begun))

    def _passes(
        self,
        model: Any,
        names: Sequence[str],
        dtypes: Sequence[str],
        source: Source,
        augmentation: AugmentationConfig | None,
        draws: npt.NDArray[np.float32] | None,
    ) -> tuple[Callable[[Any], Any], Any, int]:
        """A compiled step of this worker alone, what it reads, and the images that it takes."""
        local = len(self._topology.devices)
        alone = Topology(1, 0, self._topology.kind, self._topology.devices)
        plan = EvaluationPlan(source.count, BATCH_SIZE, local)
        run = forward.make_feature_step(
            self._strategy, split_point.frozen_outputs(model, names), dtypes, augmentation, self._xla
        )
        iterator = pipeline.distributed_batches(self._strategy, alone, source, plan, extra=draws)
        self._iterators.append(iterator)
        return run, iterator, BATCH_SIZE * local

    def _describe(
        self, model: Any, name: str, images: SplitImages, augmentation: AugmentationConfig | None, view: int | None
    ) -> Description:
        below = split_point.frozen_outputs(model, [name])
        return {
            "version": VERSION,
            "dataset": images.dataset,
            "split": images.split,
            "layer": name,
            "weights": _digest(below),
            "preprocessing": {"subtracted_bgr": list(IMAGENET_MEAN_BGR), "image_size": self._config.model.image_size},
            "computed_in": self._precision,
            "dtype": split_point.stored_dtype(name),
            "view": None
            if augmentation is None
            else {**augmentation.model_dump(mode="json"), "seed": self._config.seed, "number": view},
        }


class _OtherRun:
    """Watched while this run waits, once, for what it computes."""

    def __init__(self) -> None:
        self._written, self._since = -1, 0.0

    def silent_s(self, written: int) -> float:
        """Seconds since it was seen to have written another number of bytes than `written`."""
        if written != self._written:
            self._written, self._since = written, time.monotonic()
        return time.monotonic() - self._since


def _append(writer: PartWriter, rows: npt.NDArray[Any], name: str) -> None:
    try:
        writer.append(rows)
    except OverflowError as error:
        key = "cache" if name == POOL_NAME else "cut"
        raise UserError(f"the tensors at {name} cannot be kept ({error}); set features.{key}=off") from None


def view_draws(count: int, seed: int, view: int) -> npt.NDArray[np.float32]:
    """The augmentation's draws of each image in a view: float32 [count, augment.DRAWS], -1 to 1."""
    return random_streams.uniform((count, augment.DRAWS), "augmented view", seed, view)


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


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for variable in sorted(model.variables, key=lambda variable: str(variable.path)):
        digest.update(str(variable.path).encode())
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()
