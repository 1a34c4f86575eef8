"""Images per second that reach the training step, beside `keras.utils.image_dataset_from_directory`.

Both deliver the same images of the training split once, gray, in whole batches, shuffled; the sum of all pixels shows
that the content is the same. Cold: the files are dropped from the page cache, and the time is from the start to the
last batch. Warm: the next pass, for which Keras reads the files again, now from the page cache, and ours has them in
memory. As to a device, each batch is copied as uint8 to memory that is there already, and let go: keeping the batches
would measure how fast the system finds new memory. So does the first round, in which ours gets what it keeps images in;
later rounds have that of the round before.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import pipeline
from cxr_dist.data.arrays import Slice
from cxr_dist.data.batch_sampler import TrainBatchSampler
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import prepare_devices
from cxr_dist.distributed.strategy import make_strategy
from tfrecords_builder.format.manifest import read_manifest


@dataclass(frozen=True)
class Rate:
    """Images per second of one way of reading, one figure a round."""

    name: str
    cold: tuple[float, ...]
    warm: tuple[float, ...]
    pixel_sum: int
    """Of every image once."""


def measure(source: Path, dataset: Path, batch_size: int, rounds: int, memory_bytes: int) -> list[Rate]:
    """Read the training split `rounds` times each way, in turns.

    Args:
        source: The images that `dataset` was built of, without resizing.
        dataset: Built of them.
        batch_size: Images; what is left of the split by whole batches is read, and counted, by neither.
        rounds: The medians are over these.
        memory_bytes: Ours reads a split that takes no more into memory.

    Raises:
        RuntimeError: The two delivered different pixels.
    """
    import keras  # noqa: F401 - before the clock of the first that needs it

    manifest = read_manifest(dataset)
    split = ShardSource(dataset, manifest, "train")
    count = split.count // batch_size * batch_size
    shards = [dataset / shard.name for shard in manifest.shards if shard.split == "train"]
    with tempfile.TemporaryDirectory(prefix="cxr-dist-input-") as folder:
        images = [source / path for path in split.paths[:count]]
        for label, image in zip(split.labels, images, strict=False):
            link = Path(folder, manifest.class_names[label], image.name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(image.resolve())
        ways: dict[str, tuple[Callable[[], Callable[[], Iterator[Any]]], list[Path]]] = {
            "image_dataset_from_directory": (lambda: _keras(Path(folder), batch_size, manifest.image_size), images),
            "cxr-dist": (lambda: _ours(dataset, count, batch_size, memory_bytes), shards),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        sums: dict[int, str] = {}
        pixels = [np.ones((count, manifest.image_size, manifest.image_size, 1), np.uint8) for _ in ("cold", "warm")]
        for _ in range(rounds):
            for name, (start, files) in ways.items():
                for file in files:
                    drop_from_page_cache(file)
                passes = None
                gc.collect()  # what the last one had in memory
                for target in pixels:
                    target.fill(1)
                times = [time.perf_counter()]
                passes = start()
                for target in pixels:
                    take(passes(), batch_size, target)
                    times.append(time.perf_counter())
                found[name].append((count / (times[1] - times[0]), count / (times[2] - times[1])))
                sums |= {int(target.sum(dtype=np.int64)): name for target in pixels}
    if len(sums) > 1:
        raise RuntimeError(f"different pixels: {sums}")
    return [
        Rate(name, tuple(cold for cold, _ in rows), tuple(warm for _, warm in rows), *sums)
        for name, rows in found.items()
    ]


def table(rates: list[Rate]) -> list[str]:
    """Lines for people."""
    base = rates[0]
    lines = [f"{'':30} cold img/s  first  warm img/s  ratio cold  first  warm"]
    for rate in rates:
        cold, warm = median(rate.cold), median(rate.warm)
        ratios = cold / median(base.cold), rate.cold[0] / base.cold[0], warm / median(base.warm)
        rates_shown = f"{cold:10,.0f} {rate.cold[0]:6,.0f} {warm:11,.0f}"
        lines.append(f"{rate.name:30} {rates_shown} {ratios[0]:11.1f} {ratios[1]:6.1f} {ratios[2]:5.1f}")
    return lines


def _keras(folder: Path, batch_size: int, image_size: int) -> Callable[[], Iterator[Any]]:
    import keras

    batches = keras.utils.image_dataset_from_directory(
        folder,
        color_mode="grayscale",
        batch_size=batch_size,
        image_size=(image_size, image_size),
        seed=0,
        verbose=False,
    ).prefetch(2)
    return lambda: (images for images, _ in batches)


def _ours(dataset: Path, count: int, batch_size: int, memory_bytes: int) -> Callable[[], Iterator[Any]]:
    """As the loop: all images into memory, then batches from there without end."""
    topology = prepare_devices(1)
    source = ShardSource(dataset, read_manifest(dataset), "train").in_memory(memory_bytes)
    plan = TrainBatchSampler(count, batch_size, 1, seed=0)
    batches = pipeline.distributed_batches(make_strategy(topology), topology, Slice(source, 0, count), plan)
    return lambda: (batch["inputs"] for batch in batches)


def take(batches: Iterator[Any], batch_size: int, into: npt.NDArray[np.uint8]) -> None:
    """Copy batches until `into`, uint8 [N, S, S, 1], is full; N is a multiple of `batch_size`."""
    for first in range(0, len(into), batch_size):
        np.copyto(into[first : first + batch_size], next(batches), casting="unsafe")


def drop_from_page_cache(file: Path) -> None:
    """So that the next to read it reads from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
