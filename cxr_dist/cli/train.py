"""The commands train, config and demo."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_dist import api
from cxr_dist.cli.evaluate import print_metrics
from cxr_dist.cli.options import Command, add_config_options, add_dataset, add_launch_options, launch_keywords
from tfrecords_builder.common.files import check_output_folder

if TYPE_CHECKING:
    from cxr_dist.config.describe import KeyRow

CONFIG_HELP = "preset (adamw, cpu, demo, published, smoke) or path of a YAML file (default: each key's)"
DEMO_NAMES = re.compile(r"phantoms|\.phantoms\.unfinished-\w+|dataset|run|evaluation|feature-cache")
DEMO_PER_CLASS, DEMO_SIZE, DEMO_IMAGE_SIZE, DEMO_EXAMINED = 400, 128, 48, 32


def add_parsers(command: Command) -> None:
    demo_parser = command("demo", demo, "draw phantom X-rays, build a dataset, train and evaluate, in a few minutes")
    demo_parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="new folder, or that of an earlier demo (default: %(default)s)",
    )
    demo_parser.add_argument(
        "--launcher",
        choices=["ray", "local"],
        default="local",
        help="train with Ray, or in this process without Ray (default: %(default)s)",
    )

    train_parser = command(
        "train", train, "train a classifier; resumes an interrupted run when it is started again with the same --out"
    )
    add_dataset(train_parser)
    train_parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    add_config_options(train_parser, CONFIG_HELP)
    add_launch_options(train_parser, "the run")

    config_parser = command("config", show_config, "print the resolved configuration as YAML, or describe its keys")
    add_config_options(config_parser, CONFIG_HELP)
    config_parser.add_argument(
        "--describe",
        nargs="?",
        const="",
        metavar="KEY",
        help="print type, default and description of one key, of a section's keys, or of all keys",
    )


def train(options: argparse.Namespace) -> None:
    run = api.train(
        options.dataset,
        options.out,
        config=options.config,
        overrides=options.overrides,
        **launch_keywords(options),
    )
    print(
        f"{run.path}: validation accuracy {run.validation_accuracy:.4f} "
        f"(stage {run.stage}, epoch {run.epoch}), {run.seconds:.0f} s"
    )


def show_config(options: argparse.Namespace) -> None:
    if options.describe is not None:
        from cxr_dist.config.describe import key_lines, select

        print("\n".join(key_lines(select(config_rows(), options.describe))))
        return
    print(api.load_config(options.config, options.overrides).to_yaml(), end="")


def config_rows() -> "list[KeyRow]":
    """Every key of a configuration, and of a search."""
    from cxr_dist.config.describe import describe_keys
    from cxr_dist.tuning.search_space import SearchConfig

    return [*describe_keys(), *describe_keys(SearchConfig, "search.")]


def demo(options: argparse.Namespace) -> None:
    """The whole pipeline on phantoms, sized for minutes on a laptop; resumes an interrupted demo."""
    from cxr_dist.evaluation.evaluate import calibrate_run, evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.phantoms import write_phantoms
    from cxr_dist.runs.loggers import progress_bar
    from tfrecords_builder.build import BuildOptions, build_dataset

    out: Path = options.out
    check_output_folder(out, "a demo", "--out", lambda name: bool(DEMO_NAMES.fullmatch(name)))
    started = time.perf_counter()
    resumed = out.exists() and any(out.iterdir())
    if not (out / "phantoms").exists():
        with progress_bar("1/5 phantom X-rays") as progress:
            write_phantoms(out / "phantoms", per_class=DEMO_PER_CLASS, size=DEMO_SIZE, progress=progress)
    with progress_bar("2/5 build") as progress:
        build_dataset(out / "phantoms", out / "dataset", BuildOptions(image_size=DEMO_IMAGE_SIZE), progress=progress)
    print("3/5 train", file=sys.stderr)
    run = api.train(out / "dataset", out / "run", config="demo", launcher=options.launcher, verbose=options.verbose)
    with progress_bar("4/5 calibrate") as progress:
        calibrate_run(out / "run", progress=progress)
    with progress_bar("5/5 evaluate", "forward passes") as progress:
        metrics = evaluate_run(
            EvaluationSpec(out / "run", out / "evaluation", examine=DEMO_EXAMINED, drawn=True), progress=progress
        )
    print_metrics(metrics)
    took = time.perf_counter() - started
    times = f"total time {took:.0f} s"
    if resumed:  # only training keeps its time
        times = f"this start {took:.0f} s, training over all starts {run.seconds:.0f} s"
    print(f"report: {out / 'evaluation' / 'report.html'} ({times})")
