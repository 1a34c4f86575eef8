"""Images per second of the builder against what bounds it, and against what TensorFlow Datasets does.

Bare decoding opens, decodes and resizes each image with Pillow and keeps nothing: a builder that decodes so cannot be
faster (ours decodes plain gray PNG otherwise). DICOM is decoded with pydicom and resized in 16 bits as it comes, and a
second time as its upper 8 bits, the quickest way to gray levels, though wrong for most files.
TensorFlow Datasets writes the same records with a `GeneratorBasedBuilder` that decodes as bare decoding does. All in
one run, in turns, on the same files, which are read once beforehand; lung masks are left out by all. Worker processes
are started before the clock, and so is TensorFlow; `start_up` says what that takes.
"""

import functools
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.collection.download import FOLDER
from tfrecords_builder.collection.file_kinds import may_be_dicom
from tfrecords_builder.collection.find import class_counts
from tfrecords_builder.common.pool import Pool
from tfrecords_builder.images.resizing import RESAMPLING

_IMAGES_PER_TASK = 32
BARE, UPPER_BITS, OURS = "bare decoding", "bare, upper 8 bits", "cxr-dist build"


@dataclass(frozen=True)
class Timing:
    """One way of going through the images, timed several times."""

    name: str
    workers: int
    start_up_seconds: float
    seconds: tuple[float, ...]
    images: int
    peak_memory_bytes: int | None = None
    """Resident, of all processes together, until the end of this way; what they share is counted for each."""

    @property
    def images_per_second(self) -> float:
        """Of the median; start-up apart."""
        return self.images / median(self.seconds)


def measure(source: Path, work: Path, image_size: int, workers: Sequence[int], rounds: int, tfds: bool) -> list[Timing]:
    """Time every way `rounds` times, in turns.

    Args:
        source: Labelled images; see `collect.find_images`.
        work: An empty folder; datasets are written into it and removed.
        image_size: Pixels.
        workers: Numbers of processes.
        rounds: The median is over these.
        tfds: Whether to time TensorFlow Datasets too; it has no way to read DICOM.
    """
    images = find_images(source)
    paths = [source / image.path for image in images]
    dicom = any(may_be_dicom(path.name) for path in paths)
    for path in paths:
        path.read_bytes()
    tasks = [(paths[start : start + _IMAGES_PER_TASK], image_size) for start in range(0, len(paths), _IMAGES_PER_TASK)]
    seconds: dict[tuple[str, int], list[float]] = {}
    start_up: dict[tuple[str, int], float] = {}
    memory: dict[tuple[str, int], int] = {}
    for number in range(rounds):
        for count in workers:
            with _started(count) as (pool, took):
                for name in (BARE, *([UPPER_BITS] if dicom else []), OURS):
                    start_up[name, count] = took
                    started = time.perf_counter()
                    if name != OURS:
                        list(pool.map(bare_decode if name == BARE else upper_bits, tasks))
                    else:
                        build_dataset(
                            source,
                            work / "ours",
                            BuildOptions(image_size=image_size, masks="ignore", on_error="skip"),
                            pool=pool,
                        )
                    seconds.setdefault((name, count), []).append(time.perf_counter() - started)
                    memory[name, count] = max(memory.get((name, count), 0), _peak_memory(pool, count))
                shutil.rmtree(work / "ours")
        if tfds:
            folder = work / f"tfds-{number}"
            took, spent = _build_with_tfds(source, folder, image_size, tuple(class_counts(images)))
            start_up.setdefault(("TensorFlow Datasets", 1), took)
            seconds.setdefault(("TensorFlow Datasets", 1), []).append(spent)
            shutil.rmtree(folder)
    return [
        Timing(name, count, start_up[name, count], tuple(spent), len(paths), memory.get((name, count)))
        for (name, count), spent in seconds.items()
    ]


def bare_decode(task: tuple[Sequence[Path], int]) -> int:
    """Decode and resize, and nothing else; the number of images, so that nothing large is sent back."""
    paths, size = task
    for path in paths:
        image = Image.fromarray(_pixels(path)) if may_be_dicom(path.name) else Image.open(path).convert("L")
        image.resize((size, size), RESAMPLING).tobytes()
    return len(paths)


def upper_bits(task: tuple[Sequence[Path], int]) -> int:
    """As `bare_decode`, of the upper 8 bits of 16-bit DICOM files."""
    paths, size = task
    for path in paths:
        Image.fromarray((_pixels(path) >> 8).astype(np.uint8)).resize((size, size), RESAMPLING).tobytes()
    return len(paths)


def _pixels(path: Path) -> npt.NDArray[np.uint16]:
    import pydicom

    values: npt.NDArray[np.uint16] = pydicom.dcmread(path).pixel_array
    return values


def table(timings: Sequence[Timing]) -> list[str]:
    """Lines for people."""
    rate = {(timing.name, timing.workers): timing.images_per_second for timing in timings}
    lines = [f"{'':20} workers  images/s  of bare decoding  start-up s  images/s with start-up  peak memory MB"]
    for timing in timings:
        bare = rate[BARE, timing.workers]
        with_start_up = timing.images / (timing.start_up_seconds + median(timing.seconds))
        lines.append(
            f"{timing.name:20} {timing.workers:7} {timing.images_per_second:9,.0f} "
            f"{timing.images_per_second / bare:17.2f} {timing.start_up_seconds:11.1f} {with_start_up:23,.0f}"
            + (f"{timing.peak_memory_bytes / 1e6:16,.0f}" if timing.peak_memory_bytes else "")
        )
    return lines


@functools.cache  # TensorFlow Datasets takes a class of one name once
def _plainly_decoded() -> Any:
    """A builder as users of TensorFlow Datasets would write it: each image decoded by Pillow."""
    from tfrecords_builder.tfds_builder import Covid19Radiography

    class PlainlyDecoded(Covid19Radiography):
        @staticmethod
        def _image(path: Path, size: int) -> npt.NDArray[np.uint8]:
            return np.asarray(Image.open(path).convert("L").resize((size, size), RESAMPLING))

    return PlainlyDecoded


def _build_with_tfds(source: Path, work: Path, image_size: int, class_names: tuple[str, ...]) -> tuple[float, float]:
    """Seconds that importing TensorFlow takes, and `download_and_prepare` of the images of `source`."""
    started = time.perf_counter()
    import tensorflow_datasets as tfds

    from tfrecords_builder.tfds_builder import SizeConfig

    start_up = time.perf_counter() - started
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    manual = work / "manual"
    manual.mkdir(parents=True)
    (manual / FOLDER).symlink_to(source.resolve())
    config = SizeConfig(name="bench", image_size=image_size, class_names=class_names)
    builder = _plainly_decoded()(data_dir=str(work / "data"), config=config)
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):  # it tells people what it does, and stdout may be read by a script
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual)))
    return start_up, time.perf_counter() - started


@contextmanager
def _started(workers: int) -> Iterator[tuple[Pool, float]]:
    started = time.perf_counter()
    with Pool(workers) as pool:
        list(pool.map(_imported, range(4 * workers)))
        yield pool, time.perf_counter() - started


def _peak_memory(pool: Pool, workers: int) -> int:
    """Of the worker processes and this one, in bytes."""
    peaks = dict(pool.map(_process_and_peak, range(4 * workers)))
    return sum((peaks | dict([_process_and_peak(0)])).values())


def _process_and_peak(_number: int) -> tuple[int, int]:
    time.sleep(0.02)  # every process gets a task
    return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _imported(_number: int) -> bool:
    """What a worker process needs is imported; a moment's wait lets every process take a task."""
    import tfrecords_builder.writing.writer  # noqa: F401

    time.sleep(0.05)
    return "tfrecords_builder.writing.writer" in sys.modules
