"""A search through Ray Tune: our sampler says what to try, Tune's schedulers stop, and the cluster decides where.

Tune keeps no state that a search needs: trials are in the experiment's folder (`search.record`), from which the
sampler learns again. So a search goes on after anything, on another cluster too, and `Tuner.restore` is not used: it
goes back to Tune's last snapshot, seconds old, and loses the trials begun since.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import muted_stderr, prepare_devices, scratch_folder
from cxr_dist.launch.placement import TrialPlan, WorkerPlan, cluster_nodes, plan_trials, this_machine
from cxr_dist.launch.ray_connection import OWN_CLUSTER, connected, resolved_address
from cxr_dist.launch.ray_metrics import CountingWatch, RayMetrics
from cxr_dist.launch.ray_train import RayWorkers
from cxr_dist.runs.events import Reporter, Reporters
from cxr_dist.runs.loggers import ConsoleReporter
from cxr_dist.tuning.experiment import TUNE, Experiment, Trial
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan
from cxr_dist.tuning.trial import TrialJob, compute_shared_features, ends_stage, is_last_epoch, prepared, run_trial
from cxr_dist.tuning.trial_jobs import Jobs, Watch
from tfrecords_builder.common.errors import UserError

SECONDS_BETWEEN_REPORTS = 2.0
"""Each report waits for Tune: as long as an epoch of a head on cached features takes."""
PLACEMENT_LIMIT_S = 60.0
"""For a busy cluster to have room, as long as Ray Train waits for its workers."""
SECONDS_TO_PLACE = 5.0
"""For Ray to answer whether something that may be free can be had."""
TrialFunction = Callable[[dict[str, Any], dict[str, Any] | None], None]
_OBJECTIVE, _TIME = "val_accuracy", "epochs_done"


def search_with_ray(
    plan: SearchPlan,
    experiment: Experiment,
    jobs: Jobs,
    begin: Callable[[], tuple[Sampler, Watch]],
    *,
    address: str | None,
    verbose: bool,
    trial: TrialFunction | None = None,
) -> None:
    """Run all trials that are left on a Ray cluster whose machines share the folders.

    Args:
        begin: Called once the cluster can place the trials; takes the experiment's folder.
        trial: What Tune runs, given the job as {"job": JSON} and the workers' plan.

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
        placement = plan_trials(nodes, plan.search)
        sampler, watch = begin()
        left = plan.search.planned_trials() - sampler.asked + len(jobs.left)
        if left <= 0:
            return
        if placement.workers is None:
            _fill_cache(jobs, max(node.cpus for node in nodes), placement.gpus, verbose)
        ended = [experiment.outcome(trial) for trial in experiment.trials() if trial.state != "running"]
        counting = CountingWatch(watch, experiment.folder.name, plan.search.planned_trials(), ended)
        _run(plan, experiment, jobs, sampler, counting, placement, left, verbose, trial or run_tune_trial)


def _fill_cache(jobs: Jobs, cpus: float, gpus: float, verbose: bool) -> None:
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
            ray.get(fill.remote(json.dumps(asdict(jobs.shared())), cores, verbose))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise


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

    until = time.monotonic() + limit_s
    said = False
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
        what = "1 CPU and 1 GPU" if gpus else "1 CPU"
        if not said:
            said = True
            print(f"waiting for {what} of the cluster, which other work holds", file=sys.stderr, flush=True)
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
            states = {trial.status for trial in trials}
            if "RUNNING" in states or "PENDING" not in states:
                self._since = None
                return
            now = time.monotonic()
            self._since = self._since or now
            if now - self._since > PLACEMENT_LIMIT_S:
                self._since = now
                what = " + ".join(f"{value:g} {name}" for name, value in placement.resources().items() if value)
                print(
                    f"no trial has started for a minute: each needs {what}, and other work holds the cluster; waiting",
                    file=sys.stderr,
                    flush=True,
                )

    return SlowStartWarning()


def _compute_features(job_text: str, cores: int, verbose: bool) -> None:
    job = TrialJob(**json.loads(job_text))
    topology = prepare_devices(None, cores=cores)
    reporter: Reporter = ConsoleReporter() if verbose else Reporters([])
    with scratch_folder():
        compute_shared_features(
            Config.model_validate(job.config), Path(job.dataset), Path(job.experiment), topology, reporter
        )


def _run(
    plan: SearchPlan,
    experiment: Experiment,
    jobs: Jobs,
    sampler: Sampler,
    watch: CountingWatch,
    placement: TrialPlan,
    left: int,
    verbose: bool,
    trial: TrialFunction,
) -> None:
    with muted_stderr():
        from ray import tune

    trainable = tune.with_resources(
        tune.with_parameters(trial, workers=asdict(placement.workers) if placement.workers else None),
        placement.resources(),
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=_OBJECTIVE,
            mode="max",
            search_alg=_searcher(experiment, jobs, sampler, watch),
            scheduler=_scheduler(plan),
            num_samples=left,
            max_concurrent_trials=placement.concurrent,
            # A trial of the head alone takes less time than starting TensorFlow; one that trains upper layers takes its
            # memory along when it ends.
            trial_dirname_creator=lambda trial: str(trial.trial_id),  # by default it spells out all the trial sets
            reuse_actors=plan.trains_head_alone() and placement.workers is None,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(experiment.folder),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=1 if verbose else 0,
            callbacks=[_slow_start_warning(placement)],
        ),
    )
    tuner.fit()


def _scheduler(plan: SearchPlan) -> Any:
    from ray.tune import schedulers

    search = plan.search
    if search.scheduler == "asha":
        return schedulers.AsyncHyperBandScheduler(
            time_attr=_TIME,
            grace_period=search.grace_epochs,
            reduction_factor=search.reduction_factor,
            max_t=max(plan.largest_epochs(), search.grace_epochs) + 1,  # one that arrives there is not stopped
        )
    if search.scheduler == "median":
        return schedulers.MedianStoppingRule(time_attr=_TIME, grace_period=search.grace_epochs, min_samples_required=3)
    return schedulers.FIFOScheduler()


def _searcher(experiment: Experiment, jobs: Jobs, sampler: Sampler, watch: CountingWatch) -> Any:
    """Our sampler, as Tune asks for trials; every answer is written down before Tune hears it."""
    from ray.tune.search import Searcher

    class RecordedSearcher(Searcher):
        def __init__(self, experiment: Experiment, jobs: Jobs, sampler: Sampler, watch: CountingWatch) -> None:
            super().__init__(metric=_OBJECTIVE, mode="max")
            self._experiment, self._jobs, self._sampler, self._watch = experiment, jobs, sampler, watch
            self._interrupted = jobs.interrupted(sampler)
            self._running: dict[str, tuple[Trial, float]] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its searchers; ours is in the experiment's folder

        def suggest(self, trial_id: str) -> Any:
            job = next(self._interrupted, None)
            if job is None:
                chosen = self._sampler.ask()
                if chosen is None:
                    return Searcher.FINISHED
                job = self._jobs.of(*chosen)
            trial = self._experiment.begin(job.number, job.values)
            self._running[trial_id] = trial, time.monotonic()
            self._watch.began(trial)
            # As text: Tune takes a tree apart at every key.
            return {"job": json.dumps(asdict(job))}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False, **_: Any) -> None:
            trial, started = self._running.pop(trial_id)
            reason = None
            if error and not self._experiment.failure(trial.number).is_file():
                reason = "its process ended; out of memory?"
            outcome = self._experiment.end(trial, time.monotonic() - started, reason=reason)
            self._sampler.tell(trial.number, outcome.finished())
            self._watch.ended(outcome)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the experiment's folder has it all."""

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError("a search goes on from its folder")

    return RecordedSearcher(experiment, jobs, sampler, watch)


def run_tune_trial(config: dict[str, Any], workers: dict[str, Any] | None) -> None:
    """What Tune runs for a trial, in a process of the cluster."""
    from ray import tune

    job = TrialJob(**json.loads(config["job"]))
    trained = Config.model_validate(job.config)
    reported = [time.monotonic(), 0.0, 0.0]

    def report(row: dict[str, Any], best: float) -> bool:
        reported[1:] = float(row["epochs_done"]), best
        # Always at the end of a stage: what is to be stopped there must not first run an epoch of the next. Of the last
        # epoch below, when the model is saved.
        due = ends_stage(trained, row) or time.monotonic() - reported[0] > SECONDS_BETWEEN_REPORTS
        if due and not is_last_epoch(trained, row):
            reported[0] = time.monotonic()
            tune.report({_TIME: int(row["epochs_done"]), _OBJECTIVE: best})
        return False  # Tune itself ends the process of a trial that it stops

    if workers is None:
        _in_this_process(job, report)
    else:
        _through_ray_train(job, WorkerPlan(**workers), report)
    tune.report({_TIME: int(reported[1]), _OBJECTIVE: reported[2]})


def _in_this_process(job: TrialJob, report: Callable[[dict[str, Any], float], bool]) -> None:
    import ray

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    topology = _devices(max(1, int(cpus)))
    batch = int(job.config["global_batch_size"])
    with scratch_folder():
        run_trial(job, topology, report, "ray", [RayMetrics(job.name, batch)])


_topologies: list[Any] = []


def _devices(cores: int) -> Any:
    """Prepared once: a process that runs trial after trial cannot change its threads later."""
    if not _topologies:
        _topologies.append(prepare_devices(None, cores=cores))
    return _topologies[0]


def _through_ray_train(job: TrialJob, plan: WorkerPlan, report: Callable[[dict[str, Any], float], bool]) -> None:
    def train(config: Config, run: Path, listeners: Reporter) -> dict[str, Any]:
        workers = RayWorkers(config, job.dataset, plan, lambda: plan, hparams=job.values, name=job.name)
        return workers.train_and_follow(run, listeners)

    prepared(job, plan.replicas, report, train)
