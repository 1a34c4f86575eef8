"""Training through Ray Train: the same loop on every worker, in bundles that the cluster can place."""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist import compat
from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import muted_stderr, prepare_devices, scratch_folder
from cxr_dist.launch.placement import WorkerPlan, cluster_nodes, plan_most_workers
from cxr_dist.launch.ray_connection import connected
from cxr_dist.launch.ray_metrics import RayMetrics
from cxr_dist.launch.restarts import LostWorkersError, RestartPolicy, UnplacedError
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import CheckpointFolder
from cxr_dist.runs.events import EventFile, EventFollower, Reporter, Reporters, closing
from cxr_dist.runs.heartbeat import HEARTBEATS, exit_reasons
from cxr_dist.runs.loggers import end_mlflow_run, run_reporters
from cxr_dist.runs.stop_request import RegroupedError, StoppedError, StopRequest, stopped_by_sigterm
from cxr_dist.tuning.search_space import Values
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import disk_error
from tfrecords_builder.common.places import Place, absolute, parse_place
from tfrecords_builder.remote import local_copy

GROWTH_INTERVAL_S = 30.0
"""Between two looks at whether a run of `--workers MIN:MAX` could have more."""


@contextmanager
def workers_on_cluster(
    config: Config,
    dataset: Place,
    workers: tuple[int, int] | None,
    devices_per_worker: int | None,
    address: str | None,
    verbose: bool,
) -> Iterator["RayWorkers"]:
    """Connect to a cluster and plan the workers of a run; the folders are on storage that all machines share.

    Args:
        dataset: A folder on such storage, or an address, from which each machine fetches it.
        workers: Least and most.
        address: None: a cluster of this machine alone.

    Raises:
        UserError: More is asked than the cluster has.
    """

    def can_share_batch(replicas: int) -> bool:
        return config.global_batch_size % (replicas * config.accumulation_steps) == 0

    def plan() -> WorkerPlan:
        return plan_most_workers(cluster_nodes(), workers, devices_per_worker, can_share_batch)

    with connected(address, verbose):
        may_grow = workers is not None and workers[0] < workers[1]
        yield RayWorkers(config, absolute(dataset), plan(), plan, may_grow)


@dataclass
class RayWorkers:
    """The workers of a run on the cluster that this process is connected to."""

    config: Config
    dataset: str
    """A folder that all workers see, or an address."""
    plan: WorkerPlan
    plan_again: Callable[[], WorkerPlan]
    """What the cluster has room for now: asked when workers were lost, or there is room for more."""
    may_grow: bool = False
    """Whether the run resumes with more workers when the cluster has got room for them."""
    hparams: Values | None = None
    """What a trial sets, for TensorBoard."""
    name: str | None = None
    """Of the run, in metrics; by default its folder's."""

    @property
    def replicas(self) -> int:
        return self.plan.replicas

    def train(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """Train in the opened folder `run`, with SIGTERM as a request to stop; result.json.

        Raises:
            UserError: A worker met something that the user can mend.
        """
        import ray

        try:
            with stopped_by_sigterm(run):
                return self.train_and_follow(run, reporter)
        except BaseException as error:
            if isinstance(error, Exception):
                # Where the chief worker was killed, nobody else can say so.
                end_mlflow_run(run, "killed" if isinstance(error, StoppedError) else "failed")
            ray.shutdown()  # the run's lock is given up next: no worker may write there any more
            raise

    def train_and_follow(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """Launch workers until they have finished the run; after a loss, from its newest checkpoint; result.json."""
        policy = RestartPolicy(run, may_grow=self.may_grow)
        checkpoints, plan = CheckpointFolder(run / run_folder.CHECKPOINTS), self.plan
        with following(run / run_folder.EVENTS, reporter):
            while True:
                before = checkpoints.newest_position()
                shutil.rmtree(run / HEARTBEATS, ignore_errors=True)
                try:
                    with _asking_to_grow(run, plan, self.plan_again, reporter) if policy.may_grow else nullcontext():
                        launch(_train_worker, self._arguments(run, plan), plan, run)
                    return run_folder.finished_result(run)
                except (RegroupedError, LostWorkersError, UnplacedError) as error:
                    restart = policy.after(
                        error,
                        plan,
                        has_progressed=checkpoints.newest_position() != before,
                        reasons=exit_reasons(run / HEARTBEATS),
                        now=time.monotonic(),
                    )
                if restart.event is not None:
                    reporter.emit(restart.event)
                plan = restart.plan or _planned_by(restart.deadline, self.plan_again)
                reporter.emit({"kind": "message", "text": f"resuming with {plan.workers} workers"})

    def _arguments(self, run: Path, plan: WorkerPlan) -> dict[str, Any]:
        return {
            "config": self.config.tree(),
            "dataset": self.dataset,
            "run": str(run.resolve()),
            "devices": plan.devices_per_worker,
            "cores": int(plan.cpus_per_worker),
            "name": self.name or run.name,
            "hparams": self.hparams,
        }


def _asking_to_grow(
    run: Path, plan: WorkerPlan, plan_again: Callable[[], WorkerPlan], reporter: Reporter
) -> AbstractContextManager[None]:
    """While it lasts, ask the run to stop for more workers once there has been room for them twice in a row.

    Going on costs a checkpoint and the start of all workers, about a minute: not for a machine that comes and goes.
    """
    from ray.exceptions import RayError

    last = plan.workers

    def look() -> None:
        nonlocal last
        try:
            workers = plan_again().workers
        except (UserError, OSError, RuntimeError, RayError):
            workers = plan.workers  # less room than the run has, or no answer: for whoever notices the loss
        if workers == last > plan.workers:
            StopRequest(run).make(for_more_workers=True)
        last = workers

    return _every(GROWTH_INTERVAL_S, look, "growth", reporter)


@contextmanager
def _every(interval_s: float, look: Callable[[], None], name: str, reporter: Reporter) -> Iterator[None]:
    """Call `look` in a thread again and again while the context lasts.

    A call that fails is a warning, the same failure in a row only once: the run itself does not need it.
    """
    ended = threading.Event()

    def run() -> None:
        last = ""
        while not ended.wait(interval_s):
            failure = ""
            try:
                look()
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread must not end without a word
                failure = f"{name}: {type(error).__name__}: {one_line(error)}"
            if failure and failure != last:
                with suppress(Exception):  # the reporter may be what fails, as when nobody reads its output
                    reporter.emit({"kind": "warning", "text": f"{failure}; trying again"})
            last = failure

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _planned_by(until: float, plan: Callable[[], WorkerPlan]) -> WorkerPlan:
    """Lost machines are replaced, and resources of lost processes given back, some time later."""
    while True:
        try:
            return plan()
        except UserError:
            if time.monotonic() > until:
                raise
        time.sleep(2.0)


def launch(worker: Callable[[dict[str, Any]], None], arguments: dict[str, Any], plan: WorkerPlan, run: Path) -> None:
    """Run `worker` in the bundles of `plan` through Ray Train's TensorflowTrainer, and wait for it.

    Raises:
        LostWorkersError: a process ended from outside.
        StoppedError: the run was asked to end, and did; RegroupedError where it was for more workers.
        UnplacedError: the workers did not get their places in time.
        UserError: a worker met something that the user can mend.
    """
    with muted_stderr():
        import ray.train
        from ray.train.tensorflow import TensorflowTrainer

    trainer = TensorflowTrainer(
        worker,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers, use_gpu=plan.kind == "GPU", resources_per_worker=plan.resources()
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(run.resolve()),
            # Ray would try for ever to place workers on a cluster that is busy, and to replace lost ones.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        # Ray Train handles Ctrl-C itself, and ends this process with status 0, as if the run were complete.
        raise KeyboardInterrupt from None
    except Exception as error:
        meaning = _meaning(_errors_in(error), plan)
        if meaning is None:
            raise
        raise meaning from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupted)


def _meaning(errors: list[BaseException], plan: WorkerPlan) -> Exception | None:
    """What a launch that ended with `errors` raises; None for a defect."""
    import ray.exceptions
    import ray.train

    for error in errors:
        if isinstance(error, StoppedError):
            return (RegroupedError if isinstance(error, RegroupedError) else StoppedError)(*error.args)
        mendable = error if isinstance(error, UserError) else disk_error(error)
        if mendable is not None:
            return UserError(str(mendable))
        if isinstance(error, compat.ray_startup_timeout_error()):
            return UnplacedError(
                f"--workers {plan.workers}: the cluster has such workers, but they are busy with other work "
                "(none were free for a minute); wait, or ask for fewer"
            )
    losses = (ray.exceptions.RayActorError, ray.train.PreemptionError, *compat.ray_lost_worker_errors())
    tensorflow: Any = sys.modules.get("tensorflow")  # it is imported where there is an error of its own
    if tensorflow is not None:  # of workers whose partner went away
        names = tensorflow.errors
        losses = (*losses, names.UnavailableError, names.AbortedError, names.DeadlineExceededError)
    return next((LostWorkersError(_last_line(error)) for error in errors if isinstance(error, losses)), None)


def _train_worker(arguments: dict[str, Any]) -> None:
    """What each worker process runs; Ray Train has set TF_CONFIG."""
    import ray.train

    from cxr_dist.training.loop import train
    from tfrecords_builder.format.manifest import read_manifest

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    topology = prepare_devices(arguments["devices"], workers, rank, cores=arguments["cores"])
    run = Path(arguments["run"])
    # What is told goes through files. `ray.train.report` at every epoch would make the workers wait for the
    # controller: from one to twelve seconds each time on two busy cores.
    reporters: list[Reporter] = []
    if topology.is_chief:
        reporters = [
            EventFile(run / run_folder.EVENTS),
            *run_reporters(run, arguments["name"], arguments["hparams"]),
            RayMetrics(arguments["name"], int(arguments["config"]["global_batch_size"])),
        ]
    config = Config.model_validate(arguments["config"])
    with scratch_folder(), closing(Reporters(reporters)), local_copy(parse_place(arguments["dataset"])) as dataset:
        train(config, dataset, read_manifest(dataset), run, topology, Reporters(reporters), "ray")


@contextmanager
def following(path: Path, reporter: Reporter) -> Iterator[None]:
    """Show what the chief worker writes to its event file, while it does."""
    follower = EventFollower(path, reporter)
    try:
        with _every(0.3, follower.poll, "event-follower", reporter):
            yield
    finally:
        follower.poll()


def _last_line(error: BaseException) -> str:
    """What a traceback in an error's text comes to, without Ray's list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(". ")[0] if lines else type(error).__name__


def _errors_in(error: BaseException) -> list[BaseException]:
    """`error` and all that it was made of, on workers and controller."""
    errors: list[BaseException] = []
    pending: list[Any] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or any(current is known for known in errors):
            continue
        errors.append(current)
        names = ("__cause__", "__context__", "cause", "controller_failure", "health_check_failure")
        pending += [getattr(current, name, None) for name in names]
        failures = getattr(current, "worker_failures", None)
        pending += failures.values() if isinstance(failures, dict) else []
    return errors
