"""What `cxr-dist bench` does: options in, one measurement, a table for people or JSON for scripts out."""

import argparse
import json
import math
import tempfile
from pathlib import Path

from cxr_dist.bench import build, reading, step
from cxr_dist.config import load_config, resolve_preset
from cxr_dist.phantoms import CLASS_FOLDERS, write_phantoms
from cxr_dist.reporting import ConsoleReporter, progress_bar
from tfrecords_builder.build import build_dataset
from tfrecords_builder.errors import UserError
from tfrecords_builder.splits import TRAIN_PERCENT

BENCH_IMAGE_SIZE = 224
DATABASE_IMAGE_SIZE = 299


def bench_build(options: argparse.Namespace) -> None:
    """On labelled images, or on phantoms of the database's size."""
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.dataset or _phantoms(work / "phantoms", options.images, DATABASE_IMAGE_SIZE)
        (work / "built").mkdir()
        timings = build.measure(source, work / "built", BENCH_IMAGE_SIZE, (1, 2), options.rounds, tfds=True)
    if options.json:
        print(json.dumps([vars(timing) | {"images_per_second": timing.images_per_second} for timing in timings]))
        return
    print(f"{timings[0].images:,} images to {BENCH_IMAGE_SIZE} pixels, median of {options.rounds}")
    print("\n".join(build.table(timings)))


def bench_input(options: argparse.Namespace) -> None:
    """On labelled images at the size that they have, or on phantoms of the network's size."""
    batch_size = load_config(resolve_preset(options.config), options.overrides).global_batch_size
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.dataset or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
        first = build_dataset(source, work / "dataset", image_size=BENCH_IMAGE_SIZE, masks="ignore").manifest.rows[0]
        if (first.width, first.height) != (BENCH_IMAGE_SIZE, BENCH_IMAGE_SIZE):
            raise UserError(
                f"{source}: {first.path} has {first.width} x {first.height} pixels; give images of "
                f"{BENCH_IMAGE_SIZE}, which neither way of reading has to resize"
            )
        rates = reading.measure(source, work / "dataset", batch_size, options.rounds)
    if options.json:
        print(json.dumps([vars(rate) for rate in rates]))
        return
    print("\n".join(reading.table(rates)))


def _phantoms(folder: Path, images: int, size: int) -> Path:
    """At least so many phantoms, in `folder`."""
    with progress_bar("phantoms") as progress:
        per_class = math.ceil(images / len(CLASS_FOLDERS))
        write_phantoms(folder, per_class=per_class, size=size, progress=progress)
    return folder


def bench_step(options: argparse.Namespace) -> None:
    """Phantoms of the network's own size, just enough of them for the steps of an epoch, unless a dataset is given."""
    config = load_config(resolve_preset(options.config), [*options.overrides, *step.overrides(options.rounds)])
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work, dataset = Path(folder), options.dataset
        if dataset is None:
            dataset = work / "dataset"
            images = options.steps * config.global_batch_size
            per_class = math.ceil(images / len(CLASS_FOLDERS) * 100 / TRAIN_PERCENT)
            write_phantoms(work / "phantoms", per_class=per_class, size=BENCH_IMAGE_SIZE)
            build_dataset(work / "phantoms", dataset, image_size=BENCH_IMAGE_SIZE)
        rounds = step.measure(config, dataset, work / "run", ConsoleReporter())
    summaries = step.summarize(rounds)
    if options.json:
        print(json.dumps({"rounds": [vars(row) for row in rounds], "summary": [vars(row) for row in summaries]}))
        return
    print("stage  train img/s  bare step img/s  ratio (median of rounds)")
    for row in summaries:
        print(f"{row.stage:5} {row.train:12.2f} {row.bare:16.2f}  {row.ratio:.3f} ({row.rounds})")
