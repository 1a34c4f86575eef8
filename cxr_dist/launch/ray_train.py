"""Training through Ray Train: the same loop on every worker, in bundles that the cluster can place."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import muted_stderr, prepare_devices, scratch_folder
from cxr_dist.launch.placement import WorkerPlan, cluster_nodes, plan_most_workers
from cxr_dist.launch.ray_connection import connected
from cxr_dist.launch.ray_metrics import RayMetrics
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import CheckpointFolder
from cxr_dist.runs.events import EventFile, EventFollower, Reporter, Reporters, closing
from cxr_dist.runs.heartbeat import BEATS, reasons
from cxr_dist.runs.interrupt import RESUME
from cxr_dist.runs.loggers import end_mlflow_run, run_reporters
from cxr_dist.runs.stop_request import RegroupedError, StoppedError, StopRequest, stopped_by_sigterm
from cxr_dist.tuning.search_space import Values
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import disk_error
from tfrecords_builder.remote import Place, absolute, local_copy, parse_place

Prepare = Callable[[int], bool]
"""Makes the run's folder for so many replicas; False when nothing is left to do."""
GROWTH_INTERVAL_S = 30.0
"""Between two looks at whether a run of `--workers MIN:MAX` could have more."""
MOST_LOSSES = 3
"""In a row, without a checkpoint between them: more than that is no bad luck."""
REPLACEMENT_LIMIT_S = 120.0
"""For a cluster to have room again for the least number of workers."""


SIGNS_OF_LOSS = frozenset(
    {
        # Ray Train's, of workers that do not answer.
        "WorkerHealthCheckFailedError",
        "WorkerHealthCheckTimeoutError",
        "PreemptionError",
        # TensorFlow's, of workers whose partner went away.
        "UnavailableError",
        "AbortedError",
        "DeadlineExceededError",
    }
)


class LostWorkersError(Exception):
    """Worker processes or their machines are gone; what they computed since the newest checkpoint with them."""


class UnplacedError(UserError):
    """The cluster has the workers' places, but did not give them in time."""


def train_with_ray(
    config: Config,
    dataset: Place,
    run: Path,
    reporter: Reporter,
    *,
    prepare: Prepare,
    workers: tuple[int, int] | None = None,
    devices_per_worker: int | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run `loop.train` on the workers of a Ray cluster; the folders are on storage that all of them share.

    When workers are lost the run goes on from its newest checkpoint, on as many as there are then.

    Args:
        dataset: a folder on such storage, or an address, from which each machine fetches it.
        prepare: called once the cluster can place the workers.
        workers: least and most.

    Returns:
        result.json.

    Raises:
        UserError: more is asked than the cluster has, or a worker met something that the user can mend.
    """
    with connected(address, verbose):

        def accepts(replicas: int) -> bool:
            return config.global_batch_size % (replicas * config.accumulation_steps) == 0

        def plan() -> WorkerPlan:
            return plan_most_workers(cluster_nodes(), workers, devices_per_worker, accepts)

        first = plan()
        if not prepare(first.replicas):
            return _result(run)
        with following(run / run_folder.EVENTS, reporter), stopped_by_sigterm(run):
            elastic = workers is not None and workers[0] < workers[1]
            try:
                return launch_training(
                    config, absolute(dataset), run, first, plan, reporter, name=run.name, grows=elastic
                )
            except Exception as error:
                # Where the chief worker was killed, nobody else can say so.
                end_mlflow_run(run, "killed" if isinstance(error, StoppedError) else "failed")
                raise


def _result(run: Path) -> dict[str, Any]:
    result = run_folder.read_result(run)
    if result is None:
        raise RuntimeError(f"{run}: the workers ended without a result")
    return result


def launch_training(
    config: Config,
    dataset: str,
    run: Path,
    plan: WorkerPlan,
    plan_again: Callable[[], WorkerPlan],
    reporter: Reporter,
    *,
    name: str,
    hparams: Values | None = None,
    grows: bool = False,
) -> dict[str, Any]:
    """Run `loop.train` on the workers of `plan`, on the cluster that this process is connected to.

    Args:
        dataset: A folder that all workers see, or an address.
        plan_again: Says where to go on when workers were lost, or there is room for more.
        reporter: Hears of that.
        name: Of the run, in metrics.
        hparams: What a trial set, for TensorBoard.
        grows: Whether the run goes on with more workers, from a checkpoint, when the cluster has got room for them.

    Returns:
        result.json.
    """
    checkpoints = CheckpointFolder(run / run_folder.CHECKPOINTS)
    lost, replaced_by = 0, 0.0
    smaller: WorkerPlan | None = None  # from which the run has just grown
    while True:
        arguments = {
            "config": config.tree(),
            "dataset": dataset,
            "run": str(run.resolve()),
            "devices": plan.devices_per_worker,
            "cores": int(plan.cpus_per_worker),
            "name": name,
            "hparams": hparams,
        }
        before = checkpoints.newest_position()
        shutil.rmtree(run / BEATS, ignore_errors=True)
        try:
            with _asking_to_grow(run, plan, plan_again, reporter) if grows else nullcontext():
                launch(_train_worker, arguments, plan, run)
            return _result(run)
        except RegroupedError:
            lost, smaller = 0, plan
            plan = _planned_by(time.monotonic() + REPLACEMENT_LIMIT_S, plan_again)
            reporter.emit({"kind": "message", "text": f"machines have joined: going on with {plan.workers} workers"})
        except UnplacedError:
            if smaller is not None:
                # The plan is of all that the cluster has, and what has joined may do other work by now.
                plan, smaller, grows = smaller, None, False
                reporter.emit({"kind": "warning", "text": f"no room for more: going on with {plan.workers} workers"})
                continue
            # For a while, a cluster counts a host that it has lost among those it has.
            if time.monotonic() > replaced_by:
                raise
            plan = _planned_by(replaced_by, plan_again)
        except LostWorkersError as error:
            lost = 1 if checkpoints.newest_position() != before else lost + 1
            said = "; ".join([str(error), *reasons(run / BEATS)])
            if lost > MOST_LOSSES:
                raise UserError(
                    f"{run}: workers were lost {lost} times with no checkpoint between ({said}); look at the machines, "
                    f"and {RESUME}"
                ) from None
            reporter.emit({"kind": "warning", "text": f"workers were lost ({said}); going on with those there are"})
            replaced_by = time.monotonic() + REPLACEMENT_LIMIT_S
            plan = _planned_by(replaced_by, plan_again)


@contextmanager
def _asking_to_grow(
    run: Path, plan: WorkerPlan, plan_again: Callable[[], WorkerPlan], reporter: Reporter
) -> Iterator[None]:
    """While it lasts, ask the run to stop for more workers once there has been room for them twice in a row.

    Going on costs a checkpoint and the start of all workers, about a minute: not for a machine that comes and goes.
    """
    from ray.exceptions import RayError

    seen = plan.workers

    def look() -> None:
        nonlocal seen
        try:
            found = plan_again().workers
        except (UserError, OSError, RuntimeError, RayError):
            found = plan.workers  # less room than the run has, or no answer: for whoever notices the loss
        if found == seen > plan.workers:
            StopRequest(run).make(for_more_workers=True)
        seen = found

    with _every(GROWTH_INTERVAL_S, look, "growth", reporter):
        yield


@contextmanager
def _every(interval_s: float, look: Callable[[], None], name: str, reporter: Reporter) -> Iterator[None]:
    """Call `look` in a thread called `name`, again and again, while the context lasts.

    A call that fails is a warning, the same failure in a row only once: the run itself does not need it.
    """
    ended = threading.Event()

    def run() -> None:
        last = ""
        while not ended.wait(interval_s):
            try:
                look()
                last = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread must not end without a word
                failure = f"{name}: {type(error).__name__}: {one_line(error)}"
                if failure != last:
                    last = failure
                    with suppress(Exception):  # the reporter may be what fails, as when nobody reads its output
                        reporter.emit({"kind": "warning", "text": f"{failure}; trying again"})

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
        import ray.exceptions
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
        errors = list(_errors_in(error))
        for found in errors:
            if isinstance(found, StoppedError):
                raise (RegroupedError if isinstance(found, RegroupedError) else StoppedError)(*found.args) from None
            mendable = found if isinstance(found, UserError) else disk_error(found)
            if mendable is not None:
                raise UserError(str(mendable)) from None
            if type(found).__name__ == "WorkerGroupStartupTimeoutError":
                raise UnplacedError(
                    f"--workers {plan.workers}: the cluster has such workers, but they are busy with other work "
                    "(none were free for a minute); wait, or ask for fewer"
                ) from None
        for found in errors:
            if isinstance(found, ray.exceptions.RayActorError) or type(found).__name__ in SIGNS_OF_LOSS:
                raise LostWorkersError(_last_line(found)) from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupted)


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
            *run_reporters(run, run_folder.TENSORBOARD, arguments["name"], arguments["hparams"]),
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


def _errors_in(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that it was made of, on workers and controller."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inside = [getattr(current, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        pending += [
            found for found in (current.__cause__, current.__context__, *inside) if isinstance(found, BaseException)
        ]
        failures = getattr(current, "worker_failures", None)
        pending += failures.values() if isinstance(failures, dict) else []
