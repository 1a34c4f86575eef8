"""A search from its plan to an experiment with its best trial."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from cxr_dist.config.loading import Overrides
from cxr_dist.launch.train import check_batch, open_dataset
from cxr_dist.runs import run_folder
from cxr_dist.tuning.experiment import ENDED, Experiment, TrialResult
from cxr_dist.tuning.search import Search, Trials
from cxr_dist.tuning.search_space import SearchPlan
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place


def run_search(
    plan: SearchPlan,
    experiment: Experiment,
    dataset: Place,
    *,
    launcher: str,
    address: str | None = None,
    verbose: bool = False,
) -> TrialResult:
    """Place the trials, open the experiment's folder, run all trials that are left; the best of all.

    Args:
        plan: The search.
        experiment: Where it is kept.
        dataset: A folder or an address.
        launcher: `ray`, or `local`: processes of this machine.
        address: Of the Ray cluster; None: one of this machine.
        verbose: Whether Ray's own messages are shown.

    Raises:
        UserError: What `tune` is given is wrong, or no trial is complete.
    """
    if launcher == "local" and address:
        raise UserError("--address: needs --launcher ray; add it, or leave --address out")
    from cxr_dist.launch.ray_tune import trials_on_cluster
    from cxr_dist.model.resnet import check_weights
    from cxr_dist.tuning.local_search import local_trials
    from cxr_dist.tuning.page import write_page

    with open_dataset(dataset) as data:
        search = Search(plan, experiment, data)
        base = search.resolved(plan.base)
        check_weights(base.model.weights)
        check_batch(base, len(data.manifest.split("train")), plan.search.workers_per_trial)
        check_disk(search)
        placed: AbstractContextManager[Trials]
        placed = nullcontext(local_trials(plan)) if launcher == "local" else trials_on_cluster(plan, address, verbose)
        with placed as trials, experiment.opened(plan, dataset, data.manifest):
            try:
                search.resume()
                if search.left:
                    trials.run(search)
            finally:
                best = experiment.write_tables()  # of an interrupted search too
        write_page(experiment)
    if best is None:
        failed = [trial for trial in experiment.trials() if trial.state == "failed"]
        reason = f"; the first failure: {failed[0].reason}" if failed else ""
        raise UserError(f"{experiment.folder}: no trial is complete{reason}")
    return best


def trial_overrides(
    overrides: Overrides | None, workers: tuple[int, int] | None, devices_per_worker: int | None
) -> Overrides:
    """The overrides, then the keys of a search that the numbers of workers and of their devices stand for.

    Raises:
        UserError: the number of workers is a range.
    """
    values = {}
    if workers is not None:
        least, most = workers
        if least != most:
            raise UserError(f"--workers {least}:{most}: a trial needs a fixed number of workers; give one number")
        values["search.workers_per_trial"] = most
    if devices_per_worker is not None:
        values["search.gpus_per_trial"] = devices_per_worker
    if isinstance(overrides, Mapping):
        return {**overrides, **values}
    return [*(overrides or ()), *(f"{key}={value}" for key, value in values.items())]


def check_disk(search: Search) -> None:
    """Refuse a search that the disk of its folder cannot hold.

    Raises:
        UserError: names the bytes that are needed and free.
    """
    from cxr_dist.launch.disk_space import check_space, needed_by_search

    plan, experiment, manifest = search.plan, search.experiment, search.dataset.manifest
    planned = plan.search.planned_trials()
    if sum(trial.state in ENDED for trial in experiment.trials()) >= planned:
        return
    needed = needed_by_search(
        plan.largest_config(),
        len(manifest.split("train")) + len(manifest.split("validation")),
        trials=planned,
        concurrent=min(plan.search.concurrent or 2, planned),
        keep=plan.search.keep,
    )
    check_space(experiment.folder, run_folder.feature_cache(search.resolved(plan.base), experiment.folder), needed)
