"""The command `bench`: one measurement a subcommand, which prints a table or JSON; `page` makes a page of the JSON."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cxr_dist.cli.options import (
    JSON_HELP,
    RUN_HELP,
    SET_HELP,
    Command,
    add_config_options,
    commands_of,
    count,
    positive,
)
from tfrecords_builder.common.errors import UserError

DATABASE_IMAGES = 21_165
SERVED_PHANTOMS = 64
ROUNDS_HELP = "number of rounds for the medians"
PHANTOM_DATASET_HELP = "dataset to train on (default: one of phantoms, as large as the steps need)"


def add_parsers(command: Command) -> None:
    text = "measure the speed of this machine, each figure beside a baseline"
    benchmark = commands_of(command("bench", bench_build, text), "BENCHMARK")

    parser = benchmark(
        "build", bench_build, "measure images/s of build, of bare decoding, and of TensorFlow Datasets with Pillow"
    )
    _add_images(parser)
    parser.add_argument(
        "--dicom",
        type=positive,
        metavar="N",
        help="number of 16-bit DICOM files of 2,000 x 2,000 pixels (8 MB each) to write in place of phantoms",
    )
    _add_number(parser, "--rounds", 5, ROUNDS_HELP)

    parser = benchmark(
        "input", bench_input, "measure images/s of the input pipeline, and of Keras's image_dataset_from_directory"
    )
    _add_images(parser)
    _add_config(parser)
    _add_number(parser, "--rounds", 5, ROUNDS_HELP)
    parser.add_argument(
        "--per-core",
        action="store_true",
        help="measure images/s of a core too, by encoding and by where images come from, and the cores for eight GPUs",
    )

    parser = benchmark("step", bench_step, "measure images/s of train, and of a bare compiled step")
    _add_input(parser, "dataset", "DATASET", PHANTOM_DATASET_HELP)
    _add_config(parser)
    _add_number(parser, "--rounds", 5, "number of epochs for the medians")
    _add_number(parser, "--steps", 6, "number of steps per epoch on phantoms")

    parser = benchmark("device", bench_device, "measure every figure of this machine's GPU, within a time limit")
    _add_input(parser, "dataset", "DATASET", PHANTOM_DATASET_HELP)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    _add_number(parser, "--minutes", 10, "time limit, after which the benchmark ends with what it has")
    _add_number(parser, "--images", 4096, "number of training images to draw as phantoms")
    _add_number(parser, "--rounds", 3, "number of epochs for the medians")
    _add_numbers(parser, "--batch-sizes", [256, 128, 64, 512], "batch sizes to measure; all steps take the first")
    parser.add_argument("--xrays", type=Path, metavar="SOURCE", help="labelled X-rays to run whole recipes on")
    parser.add_argument("--weights", type=Path, metavar="H5", help="weights of the base for the recipes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps to measure, by name (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("device.jsonl"),
        help="file to which each step adds a line (default: %(default)s)",
    )

    parser = benchmark(
        "features", bench_features, "measure both stages with and without cached features, and in plain Keras"
    )
    _add_images(parser)
    _add_config(parser)
    _add_number(parser, "--steps", 6, "number of steps per epoch in plain Keras and in stage 2")

    parser = benchmark(
        "accuracy",
        bench_accuracy,
        "measure the time to the best validation accuracy of plain Keras; takes over an hour",
    )
    _add_images(parser)
    _add_config(parser)
    parser.add_argument(
        "--seeds", type=count, nargs="+", default=[0], metavar="S", help="random seeds of the runs (default: 0)"
    )

    parser = benchmark("growth", bench_growth, "measure time and memory by the number of images")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    _add_config(parser)
    _add_numbers(parser, "--sizes", [1_000, 5_000, 20_000], "numbers of images to measure")

    parser = benchmark("tune", bench_tune, "measure a search of the head, and one trial that shares no features")
    _add_input(parser, "dataset", "DATASET", "dataset to train on (default: one of phantoms)")
    _add_number(parser, "--images", DATABASE_IMAGES, "number of training images to draw as phantoms")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    _add_number(parser, "--trials", 16, "number of trials of the search")
    parser.add_argument(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="where trials run: in processes of this machine, or with Ray Tune (default: %(default)s)",
    )

    parser = benchmark("scaling", bench_scaling, "measure images/s of several workers, and predict those of a cluster")
    _add_input(parser, "dataset", "DATASET", PHANTOM_DATASET_HELP)
    _add_config(parser)
    _add_number(parser, "--steps", 6, "number of steps per epoch at the largest batch, on phantoms")
    _add_numbers(parser, "--workers", [1, 2], "numbers of workers to measure")
    _add_numbers(parser, "--batch-sizes", [32, 64], "global batch sizes to measure")
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="YAML",
        help="file that describes the cluster to predict an epoch for, as cluster/example.yaml does",
    )
    _add_number(parser, "--images", DATABASE_IMAGES, "number of images in the predicted epoch")

    parser = benchmark("cluster", bench_cluster, "predict a run on clusters of GPUs, and its price; measures nothing")
    parser.add_argument("plan", type=Path, metavar="YAML", help="run and machines, as in cluster/h100.yaml")
    parser.add_argument(
        "--prices", type=Path, required=True, metavar="YAML", help="prices of machines, as in cluster/prices.yaml"
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)

    parser = benchmark("serve", bench_serve, "measure images/s of the HTTP service, and of the bare model")
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    _add_number(parser, "--max-batch", 16, "number of images in a batch")
    _add_number(parser, "--rounds", 5, ROUNDS_HELP)
    _add_number(parser, "--steps", 6, "number of full batches per round")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)

    parser = benchmark("page", bench_page, "write a Markdown page from the JSON of benchmarks of one machine")
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON", help="what a benchmark with --json printed")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="the page, as DATE-MACHINE.md")


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
    parser.add_argument("--json", action="store_true", help="print JSON with the figures of every round for scripts")


def _add_images(parser: argparse.ArgumentParser) -> None:
    _add_input(parser, "source", "SOURCE", "folder of labelled images, as for build (default: phantoms)")
    _add_number(parser, "--images", DATABASE_IMAGES, "number of phantoms to draw")


def _add_config(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser, "preset or path of a YAML file (default: %(default)s)", Path("cpu"))


def bench_build(options: argparse.Namespace) -> None:
    """On labelled images, on phantoms of the database's size, or on DICOM files of a detector's."""
    from cxr_dist.bench import build, common

    if options.dicom and options.source:
        raise UserError("--dicom: takes the place of SOURCE; give one of them")
    with _work_folder() as work:
        if options.dicom:
            from cxr_dist.bench.dicom_files import write_dicom_files

            source = write_dicom_files(work / "dicom", options.dicom)
        else:
            source = options.source or common.draw_phantoms(
                work / "phantoms", options.images, common.DATABASE_IMAGE_SIZE
            )
        (work / "built").mkdir()
        tfds = not options.dicom
        timings = build.measure(source, work / "built", common.IMAGE_SIZE, (1, 2), options.rounds, tfds)
    rows = [vars(timing) | {"images_per_second": timing.images_per_second} for timing in timings]
    _show(options, rows, build.table(timings))


def bench_input(options: argparse.Namespace) -> None:
    """On labelled images of the network's size, or on such phantoms."""
    from cxr_dist.bench import common, per_core, reading
    from tfrecords_builder.format.manifest import read_manifest

    config = common.Recipe.load(options.config, options.overrides).config
    with _work_folder() as work:
        built = common.build(options.source, options.images, work)
        size, first = common.IMAGE_SIZE, read_manifest(built.dataset).rows[0]
        if (first.width, first.height) != (size, size):
            raise UserError(
                f"{built.source}: {first.path} has {first.width} x {first.height} pixels; give images of {size} pixels"
                ", so that neither reader resizes them"
            )
        memory_bytes = int(config.input.memory_gb * 1e9)
        rates = reading.measure(built.source, built.dataset, config.global_batch_size, options.rounds, memory_bytes)
        cores = []
        if options.per_core:
            (work / "per-core").mkdir()
            batch_size = config.global_batch_size
            cores = per_core.measure(built.source, work / "per-core", size, batch_size, (1, 2), options.rounds)
    rows = [vars(row) | {"cores_needed": row.cores_needed} for row in cores]
    lines = reading.table(rates) + (per_core.table(cores, size) if cores else [])
    _show(options, {"rates": [vars(rate) for rate in rates], "per_core": rows}, lines)


def bench_step(options: argparse.Namespace) -> None:
    from cxr_dist.bench import common, step
    from cxr_dist.runs.loggers import ConsoleReporter

    overrides = [*options.overrides, *step.overrides(options.rounds)]
    config = common.Recipe.load(options.config, overrides).config
    with _work_folder() as work:
        images = options.steps * config.global_batch_size
        dataset = options.dataset or common.draw_dataset(work / "drawn", images)
        rounds = step.measure(config, dataset, work / "run", ConsoleReporter())
    _show(
        options,
        {
            "rounds": [{"stage": stage, **vars(row)} for stage, rows in rounds.items() for row in rows],
            "summary": [{"stage": stage, **vars(common.Medians.of(rows))} for stage, rows in rounds.items()],
        },
        step.table(rounds),
    )


def bench_device(options: argparse.Namespace) -> None:
    import time

    from cxr_dist.bench import common, device
    from tfrecords_builder.format.manifest import read_manifest

    device.check(options.only, options.overrides, options.xrays, options.weights, options.out)
    if options.dataset:
        read_manifest(options.dataset)  # which every step would else refuse by itself
    deadline = time.monotonic() + 60.0 * options.minutes
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    with _work_folder() as work:
        dataset = options.dataset or common.draw_dataset(work / "drawn", options.images)
        plan = device.Plan(
            dataset,
            work / "steps",
            options.batch_sizes,
            options.rounds,
            options.overrides,
            options.xrays and options.xrays.resolve(),
            options.weights and options.weights.resolve(),
        )
        rows = device.measure(plan, options.only, deadline, options.out, show)
    if options.json:
        _show(options, rows, lines)


def bench_features(options: argparse.Namespace) -> None:
    from cxr_dist.bench import common, features

    recipe = common.Recipe.load(options.config, [*options.overrides, "features.augmented_copies=1"])
    with _work_folder() as work:
        built = common.build(options.source, options.images, work)
        drawn = common.draw_dataset(work / "drawn", options.steps * recipe.config.global_batch_size)
        (work / "runs").mkdir()
        ways = features.measure(recipe, built, drawn, options.steps, work / "runs")
    _show(options, [vars(way) for way in ways], features.table(ways))


def bench_accuracy(options: argparse.Namespace) -> None:
    from cxr_dist.bench import accuracy, common

    recipe = common.Recipe.load(options.config, options.overrides)
    with _work_folder() as work:
        built = common.build(options.source, options.images, work)
        (work / "runs").mkdir()
        courses = accuracy.measure(recipe, built, options.seeds, work / "runs")
    rows = [
        {"name": course.name, "seed": course.seed, "best": course.best}
        | {"epochs": [vars(epoch) for epoch in course.epochs]}
        for course in courses
    ]
    _show(options, rows, accuracy.table(courses))


def bench_growth(options: argparse.Namespace) -> None:
    """On noise: what the images show makes no difference."""
    from cxr_dist.bench import common, growth

    recipe = common.Recipe.load(options.config, options.overrides)
    with _work_folder() as work:
        sizes = growth.measure(sorted(options.sizes), recipe.arguments, work)
    _show(options, [vars(size) for size in sizes], growth.table(sizes))


def bench_tune(options: argparse.Namespace) -> None:
    from cxr_dist.bench import common, tune

    with _work_folder() as work:
        dataset = options.dataset or common.draw_dataset(work / "drawn", options.images)
        comparison = tune.measure(dataset.resolve(), work, options.trials, options.launcher, options.overrides)
    _show(options, vars(comparison) | {"times": comparison.times}, tune.table(comparison))


def bench_scaling(options: argparse.Namespace) -> None:
    from cxr_dist.bench import common, cost_model, scaling

    if len(options.workers) * len(options.batch_sizes) < 2:
        raise UserError("--workers, --batch-sizes: a cost model needs several points; give several of either")
    cluster = cost_model.read_cluster(options.cluster) if options.cluster else None
    recipe = common.Recipe.load(options.config, options.overrides)
    with _work_folder() as work:
        dataset = options.dataset or common.draw_dataset(work / "drawn", options.steps * max(options.batch_sizes))
        (work / "runs").mkdir()
        measured = scaling.measure(dataset, recipe.arguments, options.workers, options.batch_sizes, work / "runs")
    fitted = scaling.fit_stages(measured)
    predicted = scaling.predict_stages(fitted, cluster, options.images, common.IMAGE_SIZE**2) if cluster else []
    _show(
        options,
        {
            "measured": [vars(row) for row in measured],
            "fitted": [vars(row) | {"model": vars(row.model)} for row in fitted],
            "predicted": [{"stage": stage, **vars(row)} for stage, row in predicted],
        },
        scaling.table(measured, fitted)
        + (scaling.prediction_table(cluster, options.images, predicted) if cluster else []),
    )


def bench_cluster(options: argparse.Namespace) -> None:
    from cxr_dist.bench import run_cost

    plan = run_cost.read_plan(options.plan)
    prices = run_cost.read_prices(options.prices, plan.gpus_per_machine)
    steps, runs = run_cost.predict(plan)
    figures = {
        "steps": [vars(step) | {"images_per_second": step.images_per_second, "lost": step.lost} for step in steps],
        "runs": [
            vars(run) | {"step": vars(run.step), "cost": {price.name: run.cost(price) for price in prices}}
            for run in runs
        ],
    }
    _show(options, figures, run_cost.table(plan, steps, runs, prices))


def bench_serve(options: argparse.Namespace) -> None:
    """A finished run on phantoms of the database's size."""
    from cxr_dist.bench import common, serve
    from cxr_dist.tuning.experiment import best_run

    with _work_folder() as work:
        common.draw_phantoms(work / "phantoms", SERVED_PHANTOMS, common.DATABASE_IMAGE_SIZE)
        paths = sorted(work.glob("phantoms/*/images/*.png"))
        run = best_run(options.run)
        rounds, answers = serve.measure(run, paths, options.max_batch, options.steps, options.rounds)
    rows = [
        vars(row) | {"ratio": row.ratio, "seconds_per_answer": seconds}
        for row, seconds in zip(rounds, answers, strict=True)
    ]
    _show(options, {"rounds": rows, "summary": vars(common.Medians.of(rounds))}, serve.table(rounds, answers))


def bench_page(options: argparse.Namespace) -> None:
    from cxr_dist.bench import page

    page.write_page(options.results, options.out)


@contextmanager
def _work_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        yield Path(folder)


def _show(options: argparse.Namespace, data: object, lines: Sequence[str]) -> None:
    if not options.json:
        print("\n".join(lines))
        return
    from cxr_dist.bench.page import Measurement

    print(json.dumps(Measurement.of(options.given, data, lines).tree()))
