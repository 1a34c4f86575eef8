"""Images per second and core of each way that input can take to the training step, and the cores that a machine needs.

Processes of their own divide the training split, as workers of one machine do, and begin each pass together. Each
batch is copied as uint8 to memory that is there already, as to a device. A core's rate is images by seconds of
processor time, user and system, of all threads: a process that waits for the disk or for another process takes none.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np

from cxr_dist.bench.reading import drop_from_page_cache, take
from cxr_dist.data import pipeline
from cxr_dist.data.arrays import Slice, Source
from cxr_dist.data.batch_sampler import TrainBatchSampler
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import prepare_devices
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.record import ENCODINGS

GPUS, GPU_RATE = 8, 7_000
"""What a machine has to feed: images/s of one GPU, as eight H100s reach in MLPerf's ResNet50."""
PASSES = ("records, cold", "records, page cache", "into memory, cold", "from memory", "from shared memory")
"""In this order. Into memory: each process reads the whole split, once in a run. Shared: `input.shared_folder`."""
_COLD = ("records, cold", "into memory, cold")
_BATCHES = 100
"""At least so many in a pass: up to four lie ready before it begins, and count for it."""


@dataclass(frozen=True)
class Rate:
    """One way of reading, with some processes."""

    encoding: str
    way: str
    processes: int
    images_per_second: float
    """Of all processes together; the median of the rounds."""
    core_seconds_per_image: float
    """Processor time; the median of the rounds."""

    @property
    def images_per_core_second(self) -> float:
        return 1 / self.core_seconds_per_image

    @property
    def cores_needed(self) -> float:
        """For `GPUS` GPUs at `GPU_RATE`."""
        return GPUS * GPU_RATE * self.core_seconds_per_image


def measure(
    source: Path, work: Path, image_size: int, batch_size: int, processes: Sequence[int], rounds: int
) -> list[Rate]:
    """Build `source` in each encoding, and read it each way.

    Args:
        source: Labelled images, as for `build`.
        work: An empty folder for the datasets.
        image_size: Of the datasets.
        batch_size: Images, of one process.
        processes: Numbers of reading processes.
        rounds: The medians are over these.

    Raises:
        RuntimeError: Two ways delivered different pixels, or a process failed.
    """
    rates, sums = [], set()
    with _started(max(processes)) as readers:
        for encoding in ENCODINGS:
            dataset = work / encoding
            build_dataset(source, dataset, BuildOptions(image_size=image_size, encoding=encoding, masks="ignore"))
            images = len(read_manifest(dataset).split("train").labels)
            if images < max(processes) * batch_size:
                raise UserError(
                    f"global_batch_size {batch_size}: the training split has {images} images, and {max(processes)} "
                    "processes need a batch each; give a smaller batch or more images"
                )
            for count in processes:
                found = [row for _ in range(rounds) for row in _round(readers[:count], dataset, batch_size)]
                for way in PASSES:
                    rows = [row for row in found if row["way"] == way]
                    speed, cost = (median(row[name] for row in rows) for name in ("rate", "cost"))
                    rates.append(Rate(encoding, way, count, speed, cost))
                sums |= {(encoding == "jpeg", count, row["pixels"]) for row in found}
    if len(sums) > 2 * len(set(processes)):  # lossless and JPEG
        raise RuntimeError(f"different pixels: {sums}")
    return rates


def table(rates: Sequence[Rate], image_size: int) -> list[str]:
    """Lines for people."""
    needed = GPUS * GPU_RATE
    lines = [f"encoding  {'way':20}  processes     img/s  img/s and core  cores for {needed:,} img/s"]
    for rate in rates:
        cores = "once a run" if rate.way == "into memory, cold" else f"{rate.cores_needed:.1f}"
        lines.append(
            f"{rate.encoding:8}  {rate.way:20}  {rate.processes:9} {rate.images_per_second:9,.0f}"
            f" {rate.images_per_core_second:15,.0f} {cores:>22}"
        )
    lines.append(
        f"{GPUS} GPUs at {GPU_RATE:,} images/s each need {needed:,} images/s: {needed * image_size**2 / 1e9:.2f} GB/s"
        f" of raw {image_size} x {image_size} gray"
    )
    return lines


@contextmanager
def _started(processes: int) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that read: they begin once, as importing TensorFlow takes longer than most passes."""
    command = [sys.executable, "-m", __name__]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for _ in range(processes)
    ]
    try:
        yield readers
    finally:
        for reader in readers:
            _stream(reader.stdin).close()  # which ends one that waits
            reader.wait()


def _round(readers: Sequence["subprocess.Popen[str]"], dataset: Path, batch_size: int) -> list[dict[str, Any]]:
    """Each pass once: its images/s, processor seconds per image, and sum of pixels."""
    shards = [dataset / shard.name for shard in read_manifest(dataset).shards if shard.split == "train"]
    for worker, reader in enumerate(readers):
        _say(reader, json.dumps([str(dataset), batch_size, len(readers), worker]))
    found = []
    for way in PASSES:
        for reader in readers:
            _line_of(reader)
        if way in _COLD:
            for shard in shards:
                drop_from_page_cache(shard)
        for reader in readers:
            _say(reader, "")
        done = [json.loads(_line_of(reader)) for reader in readers]
        images = sum(row["images"] for row in done)
        found.append(
            {
                "way": way,
                "rate": images / max(row["seconds"] for row in done),
                "cost": sum(row["core_seconds"] for row in done) / images,
                "pixels": sum(row["pixels"] for row in done),
            }
        )
    return found


def _say(reader: "subprocess.Popen[str]", line: str) -> None:
    _stream(reader.stdin).write(f"{line}\n")
    _stream(reader.stdin).flush()


def _line_of(reader: "subprocess.Popen[str]") -> str:
    line = _stream(reader.stdout).readline()
    if not line:
        raise RuntimeError(f"a reading process ended with status {reader.wait()}; see its message above")
    return line


def _stream(stream: Any) -> TextIO:
    return stream


def _read(dataset: Path, batch_size: int, processes: int, worker: int) -> None:
    """A round of one of the processes: for each pass a line when it is ready, and one with what it took."""
    manifest = read_manifest(dataset)
    shards = ShardSource(dataset, manifest, "train")
    whole = shards.count
    count = whole // (batch_size * processes) * batch_size * processes
    share = count // processes
    plan = TrainBatchSampler(count, batch_size * processes, processes, seed=0)

    def batches(source: Source) -> Iterator[Any]:
        made = pipeline.worker_batches(Slice(source, 0, count), plan, first_replica=worker, local_replicas=1)
        return (batch["inputs"] for batch in made)

    size = manifest.image_size
    pixels = np.ones((share, size, size, 1), np.uint8)
    repeats = -(-_BATCHES // (share // batch_size))
    next(batches(shards))  # what is imported and compiled once
    iterator: Iterator[Any] = iter(())
    memory: Source = shards
    for way in PASSES:
        if way == "from shared memory":
            memory = shards.in_memory(whole * size * size, dataset.with_name("shared"))
        if way in ("from memory", "from shared memory"):
            iterator = batches(memory)
            take(iterator, batch_size, pixels)
        print(flush=True)
        sys.stdin.readline()
        wall, core = time.perf_counter(), time.process_time()
        if way == "into memory, cold":
            memory, images = shards.in_memory(whole * size * size), whole
        else:
            passes = 1 if way in _COLD else repeats
            iterator = batches(shards) if way in _COLD else iterator
            for _ in range(passes):
                take(iterator, batch_size, pixels)
            images = share * passes
        figures = {"seconds": time.perf_counter() - wall, "core_seconds": time.process_time() - core, "images": images}
        print(json.dumps(figures | {"pixels": int(pixels.sum(dtype=np.int64))}), flush=True)


if __name__ == "__main__":
    prepare_devices(1)
    for line in sys.stdin:
        name, *numbers = json.loads(line)
        _read(Path(name), *numbers)
