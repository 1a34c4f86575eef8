"""The command `bench`: one measurement a subcommand, a table for people or JSON for scripts out."""

import argparse
import json
import math
import tempfile
from pathlib import Path

from cxr_dist.cli.options import RUN_HELP, Command, add_config_options, commands_of, count, positive
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
DATABASE_IMAGES = 21_165
SERVED_PHANTOMS = 64
RAW_BYTES = BENCH_IMAGE_SIZE**2
"""Of an image in a dataset."""


def add_parsers(command: Command) -> None:
    text = "measure this machine, each figure beside its baseline"
    benchmark = commands_of(command("bench", bench_build, text), "BENCHMARK")

    parser = benchmark(
        "build", bench_build, "images/s of build, of bare decoding and of TensorFlow Datasets with Pillow"
    )
    _add_images(parser)
    _add_number(parser, "--rounds", 5, "rounds that the medians are over")

    parser = benchmark(
        "input", bench_input, "images/s that reach the step, beside Keras's image_dataset_from_directory"
    )
    _add_images(parser)
    _add_config(parser)
    _add_number(parser, "--rounds", 5, "rounds that the medians are over")

    parser = benchmark("step", bench_step, "images/s of train against a bare compiled step")
    _add_input(parser, "dataset", "DATASET", "a dataset (default: of phantoms, as large as the steps need)")
    _add_config(parser)
    _add_number(parser, "--rounds", 5, "epochs that the medians are over")
    _add_number(parser, "--steps", 6, "steps of an epoch, on phantoms")

    parser = benchmark("features", bench_features, "both stages beside plain Keras, with cached features and without")
    _add_images(parser)
    _add_config(parser)
    _add_number(parser, "--steps", 6, "steps of an epoch in plain Keras and in stage 2")

    parser = benchmark(
        "accuracy", bench_accuracy, "how soon plain Keras's best validation accuracy is there; an hour and more"
    )
    _add_images(parser)
    _add_config(parser)
    parser.add_argument(
        "--seeds", type=count, nargs="+", default=[0], metavar="S", help="random seeds, one run each (default: 0)"
    )

    parser = benchmark("growth", bench_growth, "time and memory by the number of images")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    _add_config(parser)
    _add_numbers(parser, "--sizes", [1_000, 5_000, 20_000], "numbers of images")

    parser = benchmark("tune", bench_tune, "a search of the head beside one trial that shares nothing")
    _add_input(parser, "dataset", "DATASET", "a dataset (default: of phantoms)")
    _add_number(parser, "--images", DATABASE_IMAGES, "phantoms for training")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a config key of all trials"
    )
    _add_number(parser, "--trials", 16, "trials of the search")
    parser.add_argument(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="search in processes of this machine, or with Ray Tune (default: %(default)s)",
    )

    parser = benchmark("scaling", bench_scaling, "images/s of several workers, and what a cluster would do")
    _add_input(parser, "dataset", "DATASET", "a dataset (default: of phantoms, as large as the steps need)")
    _add_config(parser)
    _add_number(parser, "--steps", 6, "steps of an epoch at the largest batch, on phantoms")
    _add_numbers(parser, "--workers", [1, 2], "numbers of workers")
    _add_numbers(parser, "--batch-sizes", [32, 64], "numbers of images in a step, over all workers")
    parser.add_argument(
        "--cluster", type=Path, metavar="YAML", help="a cluster to predict an epoch for, as cluster/example.yaml"
    )
    _add_number(parser, "--images", DATABASE_IMAGES, "images in the epoch that is predicted")

    parser = benchmark("serve", bench_serve, "images/s of the HTTP service beside the bare model")
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    _add_number(parser, "--max-batch", 16, "images in a step of the model")
    _add_number(parser, "--rounds", 5, "rounds that the medians are over")
    _add_number(parser, "--steps", 6, "full batches in a round")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _add_number(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def _add_numbers(parser: argparse.ArgumentParser, option: str, default: list[int], text: str) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(
        option, type=positive, nargs="+", default=default, metavar="N", help=f"{text} (default: {shown})"
    )


def _add_input(parser: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    """What is measured on; and --json."""
    parser.add_argument(name, type=Path, nargs="?", metavar=metavar, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON with the figures of every round, for scripts")


def _add_images(parser: argparse.ArgumentParser) -> None:
    _add_input(parser, "source", "SOURCE", "a folder of labelled images, as build takes it (default: phantoms)")
    _add_number(parser, "--images", DATABASE_IMAGES, "phantoms to draw")


def _add_config(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser, "a file, or the name of a preset (default: %(default)s)", Path("cpu"))


def bench_build(options: argparse.Namespace) -> None:
    """On labelled images, or on phantoms of the database's size."""
    from cxr_dist.bench import build

    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.source or _phantoms(work / "phantoms", options.images, DATABASE_IMAGE_SIZE)
        (work / "built").mkdir()
        timings = build.measure(source, work / "built", BENCH_IMAGE_SIZE, (1, 2), options.rounds, tfds=True)
    if options.json:
        print(json.dumps([vars(timing) | {"images_per_second": timing.images_per_second} for timing in timings]))
        return
    print(f"{timings[0].images:,} images to {BENCH_IMAGE_SIZE} pixels, median of {options.rounds}")
    print("\n".join(build.table(timings)))


def bench_input(options: argparse.Namespace) -> None:
    """On labelled images at the size that they have, or on phantoms of the network's size."""
    from cxr_dist.bench import reading

    config = load_config(resolve_preset(options.config), options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.source or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
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
    from cxr_dist.bench import features

    config, arguments = _configured(options, [*options.overrides, "features.views=1"])
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.source or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
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
    from cxr_dist.bench import accuracy

    config, arguments = _configured(options, options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = Path(folder)
        source = options.source or _phantoms(work / "phantoms", options.images, BENCH_IMAGE_SIZE)
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
    from cxr_dist.bench import growth

    _, arguments = _configured(options, options.overrides)
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        measured = growth.measure(sorted(options.sizes), arguments, Path(folder))
    if options.json:
        print(json.dumps([vars(size) for size in measured]))
        return
    print("\n".join(growth.table(measured)))


def bench_tune(options: argparse.Namespace) -> None:
    """On a dataset, or on one of phantoms of the network's size."""
    from cxr_dist.bench import tune

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
    from cxr_dist.bench import cost_model, scaling

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
    from cxr_dist.bench import step

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
    from cxr_dist.bench import serve

    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work = _phantoms(Path(folder) / "phantoms", SERVED_PHANTOMS, DATABASE_IMAGE_SIZE)
        paths = sorted(work.glob("*/images/*.png"))
        rounds = serve.measure(best_run(options.run), paths, options.max_batch, options.steps, options.rounds)
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
