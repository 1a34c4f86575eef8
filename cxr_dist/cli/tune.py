"""The command `tune`: the search, and the best trial's evaluation."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cxr_dist.cli.options import Command, add_config_options, add_dataset, add_launch_options
from cxr_dist.config.loading import resolve_preset
from cxr_dist.launch.tune import run_search
from cxr_dist.tuning.experiment import EVALUATION, Experiment
from cxr_dist.tuning.search_space import load_search
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.interrupts import interrupts_held

SEARCH_HELP = "search space: preset (search, search_cpu) or path of a YAML file (default: search_cpu)"
DEFAULT_SEARCH = Path("search_cpu")


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
    if options.launcher == "local" and options.address:
        raise UserError("--address: needs --launcher ray; add it, or leave --address out")
    path = resolve_preset(options.config)
    if path is None:
        raise UserError("--config: give a search space, such as --config search_cpu")
    plan = load_search(path, [*options.overrides, *trial_overrides(options)])
    experiment = Experiment(options.out)
    started = time.monotonic()
    best = run_search(
        plan, experiment, options.dataset, launcher=options.launcher, address=options.address, verbose=options.verbose
    )
    row = best.best_row or {}
    print(
        f"{options.out}: best is trial {best.trial.number}, validation accuracy {row['val_accuracy']:.4f} "
        f"({', '.join(f'{key}={value}' for key, value in best.trial.values.items())}), "
        f"{time.monotonic() - started:.0f} s"
    )
    if options.evaluation:
        command = ["evaluate", str(options.out), "--out", str(options.out / EVALUATION)]
        if status := run_apart(command):
            raise UserError(
                f"the evaluation failed with exit status {status}; run it again: cxr-dist {' '.join(command)}"
            )


def trial_overrides(options: argparse.Namespace) -> list[str]:
    """The config keys that --workers and --devices-per-worker stand for in a search."""
    overrides = []
    if options.workers is not None:
        least, most = options.workers
        if least != most:
            raise UserError(f"--workers {least}:{most}: a trial needs a fixed number of workers; give one number")
        overrides.append(f"search.workers_per_trial={most}")
    if options.devices_per_worker is not None:
        overrides.append(f"search.gpus_per_trial={options.devices_per_worker}")
    return overrides


def run_apart(arguments: Sequence[str]) -> int:
    """Run a command of this program in a process of its own, which shares nothing with this one; its exit status."""
    with interrupts_held():  # this process answers Ctrl-C, and ends the other one
        process = subprocess.Popen([sys.executable, "-m", "cxr_dist", *arguments])  # noqa: S603 - our own command
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
