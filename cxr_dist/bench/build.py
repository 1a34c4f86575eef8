"""Images per second of the builder against what bounds it, and against what TensorFlow Datasets does.

Bare decoding opens, decodes and resizes each image with Pillow and keeps nothing: a builder that decodes so cannot be
faster (ours decodes plain gray PNG otherwise). TensorFlow Datasets writes the same records with a
`GeneratorBasedBuilder` that decodes as bare decoding does. All in one run, in turns, on the same files, which are read
once beforehand; lung masks are left out by all. Worker processes are started before the clock, and so is TensorFlow;
`start_up` says what that takes.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.find import class_counts, find_images
from tfrecords_builder.common.pool import Pool
from tfrecords_builder.images.resizing import RESAMPLING

_IMAGES_PER_TASK = 32


@dataclass(frozen=True)
class Timing:
    """One way of going through the images, timed several times."""

    name: str
    workers: int
    start_up_seconds: float
    seconds: tuple[float, ...]
    images: int

    @property
    def images_per_second(self) -> float:
        """Of the median; start-up apart."""
        return self.images / median(self.seconds)


def measure(source: Path, work: Path, image_size: int, workers: Sequence[int], rounds: int, tfds: bool) -> list[Timing]:
    """Time every way `rounds` times, in turns.

    Args:
        source: Labelled images; see `find.find_images`.
        work: An empty folder; datasets are written into it and removed.
        image_size: Pixels.
        workers: Numbers of processes.
        rounds: The median is over these.
        tfds: Whether to time TensorFlow Datasets too.
    """
    found = find_images(source)
    paths = [source / image.path for image in found]
    for path in paths:
        path.read_bytes()
    tasks = [(paths[start : start + _IMAGES_PER_TASK], image_size) for start in range(0, len(paths), _IMAGES_PER_TASK)]
    seconds: dict[tuple[str, int], list[float]] = {}
    start_up: dict[tuple[str, int], float] = {}
    for number in range(rounds):
        for count in workers:
            with _started(count) as (pool, took):
                for name in ("bare decoding", "cxr-dist build"):
                    start_up[name, count] = took
                    begun = time.perf_counter()
                    if name == "bare decoding":
                        list(pool.map(bare_decode, tasks))
                    else:
                        build_dataset(
                            source,
                            work / "ours",
                            BuildOptions(image_size=image_size, masks="ignore", on_error="skip"),
                            pool=pool,
                        )
                    seconds.setdefault((name, count), []).append(time.perf_counter() - begun)
                shutil.rmtree(work / "ours")
        if tfds:
            begun = time.perf_counter()
            from cxr_dist.bench import tfds_build

            took = time.perf_counter() - begun
            start_up.setdefault(("TensorFlow Datasets", 1), took)
            spent = tfds_build.build(source, work / f"tfds-{number}", image_size, tuple(class_counts(found)))
            seconds.setdefault(("TensorFlow Datasets", 1), []).append(spent)
            shutil.rmtree(work / f"tfds-{number}")
    return [
        Timing(name, count, start_up[name, count], tuple(spent), len(paths)) for (name, count), spent in seconds.items()
    ]


def bare_decode(task: tuple[Sequence[Path], int]) -> int:
    """Decode and resize, and nothing else; the number of images, so that nothing large is sent back."""
    paths, size = task
    for path in paths:
        Image.open(path).convert("L").resize((size, size), RESAMPLING).tobytes()
    return len(paths)


def table(timings: Sequence[Timing]) -> list[str]:
    """Lines for people."""
    rate = {(timing.name, timing.workers): timing.images_per_second for timing in timings}
    lines = [f"{'':20} workers  images/s  of bare decoding  start-up s  images/s with start-up"]
    for timing in timings:
        bare = rate["bare decoding", timing.workers]
        with_start_up = timing.images / (timing.start_up_seconds + median(timing.seconds))
        lines.append(
            f"{timing.name:20} {timing.workers:7} {timing.images_per_second:9,.0f} "
            f"{timing.images_per_second / bare:17.2f} {timing.start_up_seconds:11.1f} {with_start_up:23,.0f}"
        )
    return lines


@contextmanager
def _started(workers: int) -> Iterator[tuple[Pool, float]]:
    begun = time.perf_counter()
    with Pool(workers) as pool:
        list(pool.map(_imported, range(4 * workers)))
        yield pool, time.perf_counter() - begun


def _imported(_number: int) -> bool:
    """What a worker process needs is imported; a moment's wait lets every process take a task."""
    import tfrecords_builder.writing.writer  # noqa: F401

    time.sleep(0.05)
    return "tfrecords_builder.writing.writer" in sys.modules
