"""The commands train, config and demo."""

import argparse
import re
import sys
import time
from pathlib import Path

from cxr_dist import api
from cxr_dist.cli.evaluate import print_metrics
from cxr_dist.cli.options import Command, add_config_options, add_dataset, add_launch_options
from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.common.files import check_output_folder

DEMO_NAMES = re.compile(r"phantoms|\.phantoms\.unfinished-\w+|dataset|run|evaluation|feature-cache")
DEMO_PER_CLASS, DEMO_SIZE, DEMO_IMAGE_SIZE, DEMO_EXAMINED = 400, 128, 56, 64


def add_parsers(command: Command) -> None:
    demo_parser = command("demo", demo, "phantom X-rays -> dataset -> both stages -> evaluation, in a few minutes")
    demo_parser.add_argument("--out", type=Path, default=Path("demo"), help="a new folder (default: %(default)s)")
    demo_parser.add_argument(
        "--launcher",
        choices=["ray", "local"],
        default="local",
        help="train with Ray, or in this process without Ray (default: %(default)s)",
    )

    train_parser = command("train", train, "train both stages; started again with the same --out it resumes")
    add_dataset(train_parser)
    train_parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    add_config_options(train_parser, "a file, or the name of a preset (published, cpu, smoke)")
    add_launch_options(train_parser, "the run")

    config_parser = command("config", show_config, "print the resolved configuration as YAML")
    add_config_options(config_parser, "a file, or the name of a preset (published, cpu, smoke)")


def train(options: argparse.Namespace) -> None:
    run = api.train(
        options.dataset,
        options.out,
        config=options.config,
        overrides=options.overrides,
        launcher=options.launcher,
        workers=options.workers,
        devices_per_worker=options.devices_per_worker,
        address=options.address,
        verbose=options.verbose,
    )
    print(
        f"{run.path}: validation accuracy {run.validation_accuracy:.4f} "
        f"(stage {run.stage}, epoch {run.epoch}), {run.seconds:.0f} s"
    )


def show_config(options: argparse.Namespace) -> None:
    print(api.load_config(options.config, options.overrides).to_yaml(), end="")


def demo(options: argparse.Namespace) -> None:
    """The whole pipeline on phantoms, at a size that a laptop does in minutes; goes on where it was stopped."""
    from cxr_dist.evaluation.evaluate import calibrate_run, evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.phantoms import write_phantoms
    from tfrecords_builder.build import BuildOptions, build_dataset

    out: Path = options.out
    check_output_folder(out, "a demo", "--out", lambda name: bool(DEMO_NAMES.fullmatch(name)))
    started = time.perf_counter()
    if not (out / "phantoms").exists():
        with progress_bar("1/5 phantom X-rays") as progress:
            write_phantoms(out / "phantoms", per_class=DEMO_PER_CLASS, size=DEMO_SIZE, progress=progress)
    with progress_bar("2/5 build") as progress:
        build_dataset(out / "phantoms", out / "dataset", BuildOptions(image_size=DEMO_IMAGE_SIZE), progress=progress)
    print("3/5 train", file=sys.stderr)
    api.train(out / "dataset", out / "run", config="demo", launcher=options.launcher, verbose=options.verbose)
    with progress_bar("4/5 calibrate") as progress:
        calibrate_run(out / "run", progress=progress)
    with progress_bar("5/5 evaluate") as progress:
        metrics = evaluate_run(
            EvaluationSpec(out / "run", out / "evaluation", examine=DEMO_EXAMINED, drawn=True), progress=progress
        )
    print_metrics(metrics)
    print(f"report: {out / 'evaluation' / 'report.html'} ({time.perf_counter() - started:.0f} s in all)")
