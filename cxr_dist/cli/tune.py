"""The command `tune`: everything checked first, the search, its tables and page, and the best trial's evaluation."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from cxr_dist.config.loading import resolve_preset
from cxr_dist.launch.tune import run_search
from cxr_dist.tuning.experiment import EVALUATION, Experiment
from cxr_dist.tuning.search_space import load_search
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.interrupts import interrupts_held


def tune(options: argparse.Namespace) -> None:
    """Search, and evaluate the best trial in a process of its own."""
    if options.launcher == "local" and options.address:
        raise UserError("--launcher local: is this machine; leave --address out, or use --launcher ray")
    path = resolve_preset(options.config)
    if path is None:
        raise UserError("--config: give a search space, such as --config search_cpu")
    plan = load_search(path, options.overrides)
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
        evaluate_apart(options.out)


def evaluate_apart(experiment: Path) -> None:
    """Evaluate the best trial on the test split in a process of its own, which shares nothing with the search.

    Raises:
        UserError: it failed; the words are above, and so is the command.
    """
    out = experiment / EVALUATION
    command = [sys.executable, "-m", "cxr_dist", "evaluate", str(experiment), "--out", str(out)]
    with interrupts_held():  # this process answers Ctrl-C, and ends the other one
        process = subprocess.Popen(command)  # noqa: S603 - our own command
    try:
        status = process.wait()
    finally:
        process.terminate()
        process.wait()
    if status:
        raise UserError(f"the evaluation ended with status {status}; run it again: {' '.join(command[2:])}")
