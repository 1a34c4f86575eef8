"""A search from its plan to an experiment with its best trial."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

from cxr_dist.launch.train import local_dataset
from cxr_dist.runs import run_folder
from cxr_dist.tuning.experiment import ENDED, SEARCH, Experiment, Outcome
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan
from cxr_dist.tuning.trial_jobs import Jobs, Watch
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.pool import default_workers


def run_search(plan: SearchPlan, experiment: Experiment, options: argparse.Namespace) -> Outcome:
    """All trials that are left, through the launcher; the best of all.

    Raises:
        UserError: what `tune` is given is wrong, or no trial is complete.
    """
    from cxr_dist.data.batch_sampler import TrainBatchSampler
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
        TrainBatchSampler(len(manifest.split("train")), base.global_batch_size, workers, base.seed)
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
    from cxr_dist.tuning.local_search import fill_cache, local_concurrency as concurrency, search_locally, shares

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
