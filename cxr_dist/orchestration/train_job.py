"""Training through Ray Train: the same loop on every worker, in bundles that the cluster can place."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cxr_dist import run_folder
from cxr_dist.config import Config
from cxr_dist.orchestration.preflight import WorkerPlan, cluster_nodes, plan_workers
from cxr_dist.reporting import EventFile, EventFollower, Reporter, Reporters, TensorBoardReporter
from cxr_dist.strategy import muted_stderr, prepare_devices
from tfrecords_builder.errors import UserError, one_line
from tfrecords_builder.files import disk_error
from tfrecords_builder.storage import Place, absolute, local_copy, parse_place

WORKER_ENVIRONMENT = {"TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")}
Prepare = Callable[[int], bool]
"""Makes the run's folder for so many replicas; False when nothing is left to do."""
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE", "ABSL_MIN_LOG_LEVEL": "3"}


@contextmanager
def connected(address: str | None, verbose: bool) -> Iterator[None]:
    """Connected to the cluster at `address` or $RAY_ADDRESS, or to one of our own on this machine."""
    import logging

    # Said outright: without an address, Ray would join whatever cluster was last started on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or "local"

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_LOGGING", "1" if verbose else "0")
    import ray

    level = logging.INFO if verbose else logging.ERROR
    try:
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=False if address == "local" else None,
            runtime_env={"env_vars": WORKER_ENVIRONMENT | ({} if verbose else QUIET)},
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = one_line(error)
        raise UserError(f"--address {address}: the Ray cluster there cannot be used ({reason})") from None
    if not verbose:
        for name in ("ray", "ray.train", "ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def train_with_ray(
    config: Config,
    dataset: Place,
    run: Path,
    reporter: Reporter,
    *,
    prepare: Prepare,
    workers: int | None = None,
    devices_per_worker: int | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run `loop.train` on the workers of a Ray cluster; the folders are on storage that all of them share.

    Args:
        dataset: a folder on such storage, or an address, from which each machine fetches it.
        prepare: called once the cluster can place the workers.

    Returns:
        result.json.

    Raises:
        UserError: more is asked than the cluster has, or a worker met something that the user can mend.
    """
    with connected(address, verbose):
        plan = plan_workers(cluster_nodes(), workers, devices_per_worker)
        if not prepare(plan.replicas):
            return _result(run)
        arguments = {
            "config": config.tree(),
            "dataset": absolute(dataset),
            "run": str(run.resolve()),
            "devices": plan.devices_per_worker,
            "cores": int(plan.cpus_per_worker),
        }
        with _following(run / run_folder.EVENTS, reporter):
            launch(_train_worker, arguments, plan, run)
    return _result(run)


def _result(run: Path) -> dict[str, Any]:
    result = run_folder.read_result(run)
    if result is None:
        raise RuntimeError(f"{run}: the workers ended without a result")
    return result


def launch(worker: Callable[[dict[str, Any]], None], arguments: dict[str, Any], plan: WorkerPlan, run: Path) -> None:
    """Run `worker` in the bundles of `plan` through Ray Train's TensorflowTrainer, and wait for it."""
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
    try:
        trainer.fit()
    except Exception as error:
        for found in _errors_in(error):
            mendable = found if isinstance(found, UserError) else disk_error(found)
            if mendable is not None:
                raise UserError(str(mendable)) from None
            if type(found).__name__ == "WorkerGroupStartupTimeoutError":
                raise UserError(
                    f"--workers {plan.workers}: the cluster has such workers, but they are busy with other work "
                    "(none were free for a minute); wait, or ask for fewer"
                ) from None
        raise


def _train_worker(arguments: dict[str, Any]) -> None:
    """What each worker process runs; Ray Train has set TF_CONFIG."""
    import ray.train

    from cxr_dist.loop import train

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    topology = prepare_devices(arguments["devices"], workers, rank, cores=arguments["cores"])
    run = Path(arguments["run"])
    # What is told goes through files. `ray.train.report` at every epoch would make the workers wait for the
    # controller: from one to twelve seconds each time on two busy cores.
    reporters: list[Reporter] = []
    if topology.is_chief:
        reporters = [EventFile(run / run_folder.EVENTS), TensorBoardReporter(run / run_folder.TENSORBOARD)]
    config = Config.model_validate(arguments["config"])
    with local_copy(parse_place(arguments["dataset"])) as dataset:
        train(config, dataset, run, topology, Reporters(reporters), "ray")


@contextmanager
def _following(path: Path, reporter: Reporter) -> Iterator[None]:
    """Show what the chief worker writes to its event file, while it does."""
    follower = EventFollower(path, reporter)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(0.3):
            follower.poll()

    thread = threading.Thread(target=follow, name="event-follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        follower.poll()


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
        inside = [getattr(current, name, None) for name in ("cause", "controller_failure")]
        pending += [
            found for found in (current.__cause__, current.__context__, *inside) if isinstance(found, BaseException)
        ]
        failures = getattr(current, "worker_failures", None)
        pending += failures.values() if isinstance(failures, dict) else []


def train_locally(
    config: Config,
    dataset: Path,
    run: Path,
    reporter: Reporter,
    *,
    prepare: Prepare,
    devices_per_worker: int | None = None,
) -> dict[str, Any]:
    """Train in this process, with no Ray at all: the single-node fallback."""
    from cxr_dist.loop import train

    topology = prepare_devices(devices_per_worker)
    if not prepare(topology.replicas):
        return _result(run)
    reporters = Reporters([reporter, TensorBoardReporter(run / run_folder.TENSORBOARD)])
    return train(config, dataset, run, topology, reporters, "local")
