"""The command `tune`: everything checked first, the search, its tables and page, and the best trial's evaluation."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from cxr_dist.cli.dataset import local_dataset
from cxr_dist.config.schema import resolve_preset
from cxr_dist.runs import run_folder
from cxr_dist.tuning.experiment import ENDED, EVALUATION, SEARCH, Experiment, Outcome
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan, load_search
from cxr_dist.tuning.trial_jobs import Jobs, Watch
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.interrupts import interrupts_held
from tfrecords_builder.common.pool import default_workers


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
    best = run_search(plan, experiment, options)
    row = best.best_row or {}
    print(
        f"{options.out}: best is trial {best.trial.number}, validation accuracy {row['val_accuracy']:.4f} "
        f"({', '.join(f'{key}={value}' for key, value in best.trial.values.items())}), "
        f"{time.monotonic() - started:.0f} s"
    )
    if options.evaluation:
        evaluate_apart(options.out)


def run_search(plan: SearchPlan, experiment: Experiment, options: argparse.Namespace) -> Outcome:
    """All trials that are left, through the launcher; the best of all.

    Raises:
        UserError: what `tune` is given is wrong, or no trial is complete.
    """
    from cxr_dist.data.batch_sampler import TrainingPlan
    from cxr_dist.model.resnet import check_weights
    from cxr_dist.tuning.page import write_page
    from tfrecords_builder.format.manifest import check_shards, read_manifest

    with ExitStack() as held:
        folder = held.enter_context(local_dataset(options.dataset))
        manifest = read_manifest(folder)
        check_shards(folder, manifest)
        jobs = Jobs(experiment, plan, manifest, folder, options.dataset)
        base = jobs.resolved(plan.base)
        check_weights(base.model.weights)
        workers = plan.search.workers_per_trial
        TrainingPlan(len(manifest.split("train")), base.global_batch_size, workers, base.seed)
        check_disk(plan, experiment, jobs)

        def begin() -> tuple[Sampler, Watch]:
            held.enter_context(experiment.begun(plan, options.dataset, manifest))
            return resumed(plan, experiment, jobs)

        try:
            if options.launcher == "local":
                _search_locally(plan, experiment, jobs, begin)
            else:
                from cxr_dist.launch.ray_tune import search_with_ray

                search_with_ray(plan, experiment, jobs, begin, address=options.address, verbose=options.verbose)
        finally:
            # An interrupted search leaves the tables of what it has.
            best = experiment.write_tables() if (experiment.folder / SEARCH).exists() else None
        write_page(experiment)
        if best is None:
            failed = [trial for trial in experiment.trials() if trial.state == "failed"]
            reason = f"; the first to fail: {failed[0].reason}" if failed else ""
            raise UserError(f"{experiment.folder}: no trial is complete{reason}")
        return best


def check_disk(plan: SearchPlan, experiment: Experiment, jobs: Jobs) -> None:
    """Refuse a search that the disk of its folder cannot hold.

    Raises:
        UserError: names the bytes that are needed and free.
    """
    from cxr_dist.runs.disk_space import check_space, needed_by_search

    search, manifest = plan.search, jobs.manifest
    if sum(trial.state in ENDED for trial in experiment.trials()) >= search.planned_trials():
        return
    needed = needed_by_search(
        plan.largest_config(),
        len(manifest.split("train")) + len(manifest.split("validation")),
        trials=search.planned_trials(),
        concurrent=min(search.concurrent or 2, search.planned_trials()),
        keep=search.keep,
    )
    check_space(experiment.folder, run_folder.feature_cache(jobs.resolved(plan.base), experiment.folder), needed)


def resumed(plan: SearchPlan, experiment: Experiment, jobs: Jobs) -> tuple[Sampler, Watch]:
    """A sampler that knows what earlier processes did, and the trials that they left."""
    ended, jobs.left = experiment.settle()
    earlier = [outcome.finished() for outcome in ended]
    started = len(ended) + len(jobs.left)
    if started:
        print(f"{experiment.folder}: {len(ended)} trials have ended, {len(jobs.left)} go on", file=sys.stderr)
    watch = Watch(max(plan.search.planned_trials(), started), ended)
    return Sampler(plan, earlier, started), watch


def _search_locally(
    plan: SearchPlan, experiment: Experiment, jobs: Jobs, begin: Callable[[], tuple[Sampler, Watch]]
) -> None:
    """Processes of this machine: as many as were asked for, or two, which share its cores."""
    from cxr_dist.tuning.local_search import fill_cache, search_locally, shares
    from cxr_dist.tuning.local_search import local_concurrency as concurrency

    search, cores = plan.search, default_workers()
    if search.workers_per_trial > 1:
        raise UserError(
            f"search.workers_per_trial {search.workers_per_trial}: needs --launcher ray; locally a trial is one process"
        )
    concurrent = concurrency(search, cores)
    sampler, watch = begin()
    if search.planned_trials() > sampler.asked or jobs.left:
        fill_cache(jobs, experiment, cores)
        search_locally(
            experiment,
            sampler,
            jobs,
            watch,
            concurrent=concurrent,
            cores=shares(cores, concurrent),
            warm=plan.trains_head_alone(),
        )


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
