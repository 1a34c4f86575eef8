"""The command `tune`: the search, and the best trial's evaluation."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cxr_dist import api
from cxr_dist.cli.options import Command, add_config_options, add_dataset, add_launch_options, launch_keywords
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.interrupts import interrupts_held

SEARCH_HELP = "search space: preset (search, search_cpu) or path of a YAML file (default: search_cpu)"
DEFAULT_SEARCH = Path(api.SEARCH)


def add_parsers(command: Command) -> None:
    parser = command(
        "tune",
        tune,
        "search hyperparameters; resumes an interrupted search when it is started again with the same --out",
    )
    add_dataset(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="EXPERIMENT", help="folder of the search")
    add_config_options(parser, SEARCH_HELP, DEFAULT_SEARCH)
    add_launch_options(parser, "each trial")
    parser.add_argument(
        "--no-evaluation",
        dest="evaluation",
        action="store_false",
        help="skip the evaluation of the best trial at the end",
    )


def tune(options: argparse.Namespace) -> None:
    """Search, and evaluate the best trial in a process of its own."""
    from cxr_dist.tuning.experiment import EVALUATION, PAGE

    started = time.monotonic()
    search = api.tune(
        options.dataset,
        options.out,
        config=options.config,
        overrides=options.overrides,
        **launch_keywords(options),
    )
    print(
        f"{search.path}: best is trial {search.trial}, validation accuracy {search.validation_accuracy:.4f} "
        f"({', '.join(f'{key}={value}' for key, value in search.values.items())}), "
        f"{time.monotonic() - started:.0f} s; all trials: {search.path / PAGE}"
    )
    if options.evaluation:
        command = ["evaluate", str(options.out), "--out", str(options.out / EVALUATION)]
        if status := run_apart(command):
            raise UserError(
                f"the evaluation failed with exit status {status}; run it again: cxr-dist {' '.join(command)}"
            )


def run_apart(arguments: Sequence[str]) -> int:
    """Run a command of this program in a process of its own, which shares nothing with this one; its exit status."""
    with interrupts_held():  # this process answers Ctrl-C, and ends the other one
        process = subprocess.Popen([sys.executable, "-m", "cxr_dist", *arguments])  # noqa: S603 - our own command
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
