"""A search through Ray Tune: our sampler says what to try, Optuna's pruner stops, and the cluster decides where.

Tune keeps no state that a search needs: trials are in the experiment's folder (`tuning.experiment`), from which the
sampler learns again. So a search goes on after anything, on another cluster too, and `Tuner.restore` is not used: it
goes back to Tune's last snapshot, seconds old, and loses the trials begun since.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import muted_stderr, prepare_devices, scratch_folder
from cxr_dist.launch.placement import Node, TrialPlan, WorkerPlan, cluster_nodes, plan_trials, this_machine
from cxr_dist.launch.ray_connection import OWN_CLUSTER, connected, resolved_address
from cxr_dist.launch.ray_metrics import RayMetrics, show_trial_counts
from cxr_dist.launch.ray_train import RayWorkers
from cxr_dist.runs.events import Reporter, Reporters
from cxr_dist.runs.loggers import ConsoleReporter
from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.tuning.experiment import TUNE
from cxr_dist.tuning.search import Search
from cxr_dist.tuning.search_space import SearchPlan
from cxr_dist.tuning.trial import (
    Report,
    TrialJob,
    compute_shared_features,
    ends_stage,
    is_last_epoch,
    run_prepared,
    run_trial,
)
from tfrecords_builder.common.errors import UserError

OBJECTIVE = "objective"
"""Of a trial's reports: the best so far of what the selection maximises."""
SECONDS_BETWEEN_REPORTS = 2.0
"""Each report waits for Tune: as long as an epoch of a head on cached features takes."""
PLACEMENT_LIMIT_S = 60.0
"""For a busy cluster to have room, as long as Ray Train waits for its workers."""
SECONDS_TO_PLACE = 5.0
"""For Ray to answer whether something that may be free can be had."""
TrialFunction = Callable[[dict[str, Any], dict[str, Any] | None], None]
"""Runs a trial, given its job as {"job": JSON} and its workers' plan."""


@contextmanager
def trials_on_cluster(plan: SearchPlan, address: str | None, verbose: bool) -> Iterator["RayTrials"]:
    """Connect to a Ray cluster whose machines share the folders, and plan the places of a search's trials.

    Raises:
        UserError: more is asked than the cluster has.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial's run has its own files
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C would end the search as if it were complete
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer one prints tables whatever `verbose` says
    if resolved_address(address) == OWN_CLUSTER:
        plan_trials([this_machine()], plan.search)  # what cannot fit is refused before Ray starts, which takes a while
    with connected(address, verbose):
        nodes = cluster_nodes()
        yield RayTrials(nodes, plan_trials(nodes, plan.search), verbose)


@dataclass(frozen=True)
class RayTrials:
    """Runs the trials of a search on the cluster that this process is connected to."""

    nodes: list[Node]
    placement: TrialPlan
    verbose: bool

    def run(self, search: Search, trial: TrialFunction | None = None) -> None:
        """Compute what all trials read, then run all that are left.

        Args:
            trial: What Tune runs for each.
        """
        with muted_stderr():
            from ray import tune

        placement = self.placement
        if placement.workers is None:
            _fill_cache(search.shared_job(), max(node.cpus for node in self.nodes), placement.gpus, self.verbose)
        show_trial_counts(search)
        workers = asdict(placement.workers) if placement.workers else None
        searcher, stopper = searcher_and_stopper(search)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(trial or run_tune_trial, workers=workers), placement.resources()),
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                search_alg=searcher,  # and no scheduler: trials start in their order, and the pruner stops them
                num_samples=search.left,
                max_concurrent_trials=placement.concurrent,
                trial_dirname_creator=lambda trial: str(trial.trial_id),  # by default it spells out all the trial sets
                # A trial of the head alone takes less time than starting TensorFlow; one that trains upper layers takes
                # its memory along when it ends.
                reuse_actors=search.plan.trains_head_alone() and workers is None,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=str(search.experiment.folder),
                failure_config=tune.FailureConfig(max_failures=0),
                stop=stopper,
                verbose=1 if self.verbose else 0,
                callbacks=[_slow_start_warning(placement)],
            ),
        ).fit()


def searcher_and_stopper(search: Search) -> tuple[Any, Any]:
    """A search as Tune asks for its trials, and as it asks after each report whether to stop the trial."""
    from ray.tune import Stopper
    from ray.tune.search import Searcher

    class SearchSearcher(Searcher):
        def __init__(self, search: Search) -> None:
            super().__init__(metric=OBJECTIVE, mode="max")
            self._search = search
            self._numbers: dict[str, int] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its searchers; ours is in the experiment's folder

        def suggest(self, trial_id: str) -> Any:
            job = self._search.begin_next()
            if job is None:
                return Searcher.FINISHED
            self._numbers[trial_id] = job.number
            return {"job": json.dumps(asdict(job))}  # as text: Tune takes a tree apart at every key

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False, **_: Any) -> None:
            # Why it failed its own process wrote, if it could.
            self._search.end(self._numbers.pop(trial_id), "its process ended, perhaps out of memory" if error else None)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the experiment's folder has it all."""

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError("a search resumes from its folder")

    class PrunerStopper(Stopper):
        def __init__(self, search: Search) -> None:
            self._search = search

        def __getstate__(self) -> dict[str, Any]:
            return {}  # as above

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return self._search.should_stop(result["trial"], result["curve"])

        def stop_all(self) -> bool:
            return False

    return SearchSearcher(search), PrunerStopper(search)


def _fill_cache(job: TrialJob, cpus: float, gpus: float, verbose: bool) -> None:
    """Compute what all trials read, on one machine with all that is free there, before they begin."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with reserved(cpus, 1.0 if gpus else 0.0) as (cores, group):
        fill = ray.remote(
            num_cpus=cores,
            num_gpus=1 if gpus else 0,
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )(_compute_features)
        try:
            ray.get(fill.remote(job, cores, verbose))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise


def _compute_features(job: TrialJob, cores: int, verbose: bool) -> None:
    topology = prepare_devices(None, cores=cores)
    reporter: Reporter = ConsoleReporter() if verbose else Reporters([])
    with scratch_folder():
        compute_shared_features(job, topology, reporter)


@contextmanager
def reserved(cpus: float, gpus: float, limit_s: float = PLACEMENT_LIMIT_S) -> Iterator[tuple[int, Any]]:
    """Hold the CPUs of one machine that are free, at most `cpus` of them and at least one, and a GPU where asked for.

    Returns:
        How many CPUs, and Ray's placement group of them.

    Raises:
        UserError: nothing was free within `limit_s`: other work holds the cluster.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    until, is_told = time.monotonic() + limit_s, False
    what = "1 CPU and 1 GPU" if gpus else "1 CPU"
    while True:
        # Over all machines, so that more may be asked of one than it has free: then half as many.
        free = min(cpus, ray.available_resources().get("CPU", 0.0))
        for cores in halves(max(1, int(free))):
            group = placement_group([{"CPU": cores} | ({"GPU": gpus} if gpus else {})])
            try:
                if group.wait(SECONDS_TO_PLACE):
                    yield cores, group
                    return
            finally:
                remove_placement_group(group)
        if not is_told:
            is_told = True
            print(f"waiting for {what} of the cluster, which is busy", file=sys.stderr, flush=True)
        if time.monotonic() > until:
            raise UserError(
                f"--address: no machine of the cluster had {what} free for {limit_s:.0f} s, as other work holds them; "
                "wait for it, or end it"
            )


def halves(count: int) -> list[int]:
    """`count`, half of it, and so on down to 1."""
    return [count >> shift for shift in range(count.bit_length())]


def _slow_start_warning(placement: TrialPlan) -> Any:
    """A callback of Tune that says when the cluster has no room for any trial: Tune waits without a limit."""
    from ray import tune

    class SlowStartWarning(tune.Callback):
        def __init__(self) -> None:
            self._since: float | None = None

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            states, now = {trial.status for trial in trials}, time.monotonic()
            if "RUNNING" in states or "PENDING" not in states:
                self._since = None
                return
            self._since = self._since or now
            if now - self._since > PLACEMENT_LIMIT_S:
                self._since = now
                what = " + ".join(f"{value:g} {name}" for name, value in placement.resources().items() if value)
                text = f"no trial has started for a minute: each needs {what}, and the cluster is busy; waiting"
                print(text, file=sys.stderr, flush=True)

    return SlowStartWarning()


def run_tune_trial(config: dict[str, Any], workers: dict[str, Any] | None) -> None:
    """What Tune runs for a trial, in a process of the cluster."""
    from ray import tune

    job = TrialJob(**json.loads(config["job"]))
    trained = Config.model_validate(job.config)
    curve: list[tuple[int, float]] = []
    last_report = time.monotonic()

    def send() -> None:
        # All epochs since the last report, in their order, as without Ray.
        epochs_done, best = curve[-1] if curve else (0, 0.0)
        tune.report({"trial": job.number, "epochs_done": epochs_done, OBJECTIVE: best, "curve": list(curve)})

    def report(row: dict[str, Any], best: float) -> bool:
        nonlocal last_report
        curve.append((int(row["epochs_done"]), best))
        # Always at the end of a stage: what is to be stopped there must not first run an epoch of the next. Of the last
        # epoch below, when the model is saved.
        due = ends_stage(trained, row) or time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS
        if due and not is_last_epoch(trained, row):
            last_report = time.monotonic()
            send()
        return False  # Tune itself ends the process of a trial that it stops

    if workers is None:
        _in_this_process(job, report)
    else:
        _through_ray_train(job, WorkerPlan(**workers), report)
    send()


_topologies: list[Any] = []
"""Of this process, prepared once: one that runs trial after trial cannot change its threads later."""


def _in_this_process(job: TrialJob, report: Report) -> None:
    import ray

    if not _topologies:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        _topologies.append(prepare_devices(None, cores=max(1, int(cpus))))
    with scratch_folder():
        metrics = RayMetrics(job.name, int(job.config["global_batch_size"]))
        run_trial(job, _topologies[0], report, "ray", [metrics])


def _through_ray_train(job: TrialJob, plan: WorkerPlan, report: Report) -> None:
    def train(config: Config, run: Path, listeners: Reporter, _dataset: OpenDataset) -> dict[str, Any]:
        workers = RayWorkers(config, job.dataset, plan, lambda: plan, hparams=job.values, name=job.name)
        return workers.train_and_follow(run, listeners)

    run_prepared(job, plan.replicas, report, train)
