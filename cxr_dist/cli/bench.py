"""What `cxr-dist bench` does: options in, one measurement, a table for people or JSON for scripts out."""

import argparse
import json
import math
import tempfile
from pathlib import Path

from cxr_dist.bench import accuracy, build, cost_model, features, growth, reading, scaling, serve, step, tune
from cxr_dist.config.loading import load_config, resolve_preset
from cxr_dist.config.schema import Config
from cxr_dist.phantoms import CLASS_FOLDERS, write_phantoms
from cxr_dist.runs.loggers import ConsoleReporter, progress_bar
from cxr_dist.tuning.experiment import best_run
from tfrecords_builder.build import build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.splitting.splits import TRAIN_PERCENT

BENCH_IMAGE_SIZE = 224
DATABASE_IMAGE_SIZE = 299
SERVED_PHANTOMS = 64
RAW_BYTES = BENCH_IMAGE_SIZE**2
"""Of an image in a dataset."""


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
    config = load_config(resolve_preset(options.config), options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.dataset or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
        first = build_dataset(source, work / "dataset", image_size=BENCH_IMAGE_SIZE, masks="ignore").manifest.rows[0]
        if (first.width, first.height) != (BENCH_IMAGE_SIZE, BENCH_IMAGE_SIZE):
            raise UserError(
                f"{source}: {first.path} has {first.width} x {first.height} pixels; give images of "
                f"{BENCH_IMAGE_SIZE}, which neither way of reading has to resize"
            )
        memory_bytes = int(config.input.memory_gb * 1e9)
        rates = reading.measure(source, work / "dataset", config.global_batch_size, options.rounds, memory_bytes)
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


def _batches(folder: Path, images: int) -> Path:
    """A dataset of drawn X-rays of the network's size, with so many images for training, or a few more."""
    per_class = math.ceil(images / len(CLASS_FOLDERS) * 100 / TRAIN_PERCENT)
    write_phantoms(folder / "phantoms", per_class=per_class, size=BENCH_IMAGE_SIZE)
    build_dataset(folder / "phantoms", folder / "dataset", image_size=BENCH_IMAGE_SIZE)
    return folder / "dataset"


def _configured(options: argparse.Namespace, overrides: list[str]) -> tuple[Config, list[str]]:
    """The configuration, and the options of `cxr-dist train` that give it."""
    preset = resolve_preset(options.config)
    arguments = ["--config", str(preset), *(text for override in overrides for text in ("--set", override))]
    return load_config(preset, overrides), arguments


def bench_features(options: argparse.Namespace) -> None:
    """On labelled images, or on phantoms of the network's size."""
    config, arguments = _configured(options, [*options.overrides, "features.augmented_copies=1"])
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.dataset or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
        built = build_dataset(source, work / "dataset", image_size=BENCH_IMAGE_SIZE, masks="ignore")
        drawn = _batches(work / "drawn", options.steps * config.global_batch_size)
        (work / "runs").mkdir()
        ways = features.measure(
            features.Work(config, arguments, source, work / "dataset", built.seconds, drawn, options.steps),
            work / "runs",
        )
    if options.json:
        print(json.dumps([vars(way) for way in ways]))
        return
    print("\n".join(features.table(ways)))


def bench_accuracy(options: argparse.Namespace) -> None:
    """On labelled images, or on phantoms of the network's size."""
    config, arguments = _configured(options, options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.dataset or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
        built = build_dataset(source, work / "dataset", image_size=BENCH_IMAGE_SIZE, masks="ignore")
        (work / "runs").mkdir()
        courses = accuracy.measure(
            config, arguments, source, work / "dataset", built.seconds, options.seeds, work / "runs"
        )
    if options.json:
        print(
            json.dumps(
                [
                    {"name": course.name, "seed": course.seed, "best": course.best}
                    | {"epochs": [vars(epoch) for epoch in course.epochs]}
                    for course in courses
                ]
            )
        )
        return
    print("\n".join(accuracy.table(courses)))


def bench_growth(options: argparse.Namespace) -> None:
    """On noise: what the images show makes no difference."""
    _, arguments = _configured(options, options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        measured = growth.measure(sorted(options.sizes), arguments, Path(folder))
    if options.json:
        print(json.dumps([vars(size) for size in measured]))
        return
    print("\n".join(growth.table(measured)))


def bench_tune(options: argparse.Namespace) -> None:
    """On a dataset, or on one of phantoms of the network's size."""
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        dataset = options.dataset or _batches(work / "drawn", options.images)
        measured = tune.measure(dataset.resolve(), work, options.trials, options.launcher, options.overrides)
    if options.json:
        print(json.dumps(vars(measured) | {"times": measured.times}))
        return
    print("\n".join(tune.table(measured)))


def bench_scaling(options: argparse.Namespace) -> None:
    """On phantoms of the network's size."""
    if len(options.workers) * len(options.batch_sizes) < 2:
        raise UserError("--workers, --batch-sizes: one point makes no model; give several of either")
    cluster = cost_model.read_cluster(options.cluster) if options.cluster else None
    _, arguments = _configured(options, options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        dataset = options.dataset or _batches(work / "drawn", options.steps * max(options.batch_sizes))
        (work / "runs").mkdir()
        measured = scaling.measure(dataset, arguments, options.workers, options.batch_sizes, work / "runs")
    fitted = scaling.fit_stages(measured)
    if options.json:
        predicted = scaling.foretell(fitted, cluster, options.images, RAW_BYTES) if cluster else []
        predictions = [{"stage": stage, **vars(row)} for stage, row in predicted]
        models = [vars(found) | {"model": vars(found.model)} for found in fitted]
        print(json.dumps({"measured": [vars(row) for row in measured], "fitted": models, "predicted": predictions}))
        return
    print("\n".join(scaling.table(measured, fitted, cluster, options.images, RAW_BYTES)))


def bench_step(options: argparse.Namespace) -> None:
    """Phantoms of the network's own size, just enough of them for the steps of an epoch, unless a dataset is given."""
    config = load_config(resolve_preset(options.config), [*options.overrides, *step.overrides(options.rounds)])
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work, dataset = Path(folder), options.dataset
        if dataset is None:
            dataset = _batches(work / "drawn", options.steps * config.global_batch_size)
        rounds = step.measure(config, dataset, work / "run", ConsoleReporter())
    summaries = step.summarize(rounds)
    if options.json:
        print(json.dumps({"rounds": [vars(row) for row in rounds], "summary": [vars(row) for row in summaries]}))
        return
    print("stage  train img/s  bare step img/s  ratio (median of rounds)")
    for row in summaries:
        print(f"{row.stage:5} {row.train:12.2f} {row.bare:16.2f}  {row.ratio:.3f} ({row.rounds})")


def bench_serve(options: argparse.Namespace) -> None:
    """A finished run on drawn X-rays of the database's size."""
    if options.dataset is None:
        raise UserError("INPUT: give the folder of a finished run; its model is what is served")
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = _phantoms(Path(folder) / "phantoms", SERVED_PHANTOMS, DATABASE_IMAGE_SIZE)
        paths = sorted(work.glob("*/images/*.png"))
        rounds = serve.measure(best_run(options.dataset), paths, options.max_batch, options.steps, options.rounds)
    summary = serve.summarize(rounds, options.max_batch * options.steps, options.max_batch)
    if options.json:
        listed = [vars(row) | {"ratio": row.ratio} for row in rounds]
        print(json.dumps({"rounds": listed, "summary": vars(summary)}))
        return
    print("service img/s  bare model img/s  ratio (median of rounds)  median answer")
    print(
        f"{summary.service:13.2f} {summary.bare:17.2f}  {summary.ratio:.3f} ({summary.rounds})"
        f"{summary.seconds_per_answer:29.3f} s"
    )


def bench(options: argparse.Namespace) -> None:
    """The benchmark that was named."""
    measure = {
        "accuracy": bench_accuracy,
        "build": bench_build,
        "growth": bench_growth,
        "input": bench_input,
        "step": bench_step,
        "features": bench_features,
        "scaling": bench_scaling,
        "serve": bench_serve,
        "tune": bench_tune,
    }
    measure[options.what](options)
