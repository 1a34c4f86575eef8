"""What a job asks of a cluster, checked before anything waits: a placement that cannot fit waits for ever."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_dist.distributed.devices import DeviceKind
from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    from cxr_dist.tuning.search_space import SearchConfig

DRIVER_MEMORY = 256e6
"""Bytes, of a trial's own process that waits for its workers."""
TRIALS_PER_MACHINE = 2
"""Without GPUs, by default: a second trial fills the gaps of the first."""


@dataclass(frozen=True)
class Node:
    """The resources of one machine of the cluster."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class WorkerPlan:
    """The bundles that a training job asks for: `workers` of them, each on one machine."""

    workers: int
    devices_per_worker: int
    kind: DeviceKind
    cpus_per_worker: float

    @property
    def replicas(self) -> int:
        return self.workers * self.devices_per_worker

    def resources(self) -> dict[str, float]:
        """Of one worker, in Ray's terms."""
        gpus = {"GPU": float(self.devices_per_worker)} if self.kind == "GPU" else {}
        return {"CPU": self.cpus_per_worker, **gpus}


def plan_workers(nodes: Sequence[Node], workers: int | None, devices_per_worker: int | None) -> WorkerPlan:
    """Choose workers and devices from what there is, or check what was asked.

    With GPUs a worker is a process with several of them: by default one worker per machine with all its
    GPUs, or with `workers` given, the GPUs in equal parts. Without, a worker has one logical CPU by
    default, and the cores in equal parts.

    Raises:
        UserError: the cluster cannot place the workers; says what is there and what was asked.
    """
    _check_any(nodes)
    for name, value in (("--workers", workers), ("--devices-per-worker", devices_per_worker)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    gpu_nodes = [node for node in nodes if node.gpus >= 1]
    if gpu_nodes:
        per_node = min(int(node.gpus) for node in gpu_nodes)
        devices = devices_per_worker or (per_node if workers is None else _most_devices(nodes, workers))
        workers = workers or max(_slots(nodes, 1.0, devices), 1)
        share = min(node.cpus * devices / node.gpus for node in gpu_nodes)
        return _fitted(WorkerPlan(workers, devices, "GPU", max(1.0, float(int(share)))), nodes)
    workers, devices = workers or 1, devices_per_worker or 1
    if workers > 1 and devices > 1:
        raise UserError(
            f"--devices-per-worker {devices}: without GPUs, each of several workers has one logical CPU; "
            "leave it out, or use one worker"
        )
    share = min(sum(node.cpus for node in nodes) / workers, max(node.cpus for node in nodes))
    return _fitted(WorkerPlan(workers, devices, "CPU", max(1.0, float(int(share)))), nodes)


def plan_most_workers(
    nodes: Sequence[Node],
    workers: tuple[int, int] | None,
    devices_per_worker: int | None,
    accepts: Callable[[int], bool] = lambda _replicas: True,
) -> WorkerPlan:
    """As many workers of a range as the machines hold; see `plan_workers`.

    Args:
        nodes: What there is.
        workers: Least and most, both included; None: one plan from what there is.
        devices_per_worker: As for `plan_workers`.
        accepts: Whether so many replicas can share a batch; where none can, the most workers that fit are taken.

    Raises:
        UserError: there is no room for the least.
    """
    if workers is None:
        return plan_workers(nodes, None, devices_per_worker)
    fitting = []
    for number in range(workers[1], workers[0] - 1, -1):
        try:
            fitting.append(plan_workers(nodes, number, devices_per_worker))
        except UserError:
            if number == workers[0] and not fitting:
                raise
    return next((plan for plan in fitting if accepts(plan.replicas)), fitting[0])


def _check_any(nodes: Sequence[Node]) -> None:
    if not nodes:
        raise UserError("the cluster has no machine; add one, or use --launcher local")


def _most_devices(nodes: Sequence[Node], workers: int) -> int:
    """The most GPUs that each of `workers` can have on one machine; 1 when not even that fits."""
    largest = max(int(node.gpus) for node in nodes)
    return next((count for count in range(largest, 1, -1) if _slots(nodes, 1.0, count) >= workers), 1)


def _fitted(plan: WorkerPlan, nodes: Sequence[Node]) -> WorkerPlan:
    """The plan, with as many CPUs per worker as let all workers be placed."""
    gpus = plan.devices_per_worker if plan.kind == "GPU" else 0
    for cpus in range(int(plan.cpus_per_worker), 0, -1):
        if _slots(nodes, float(cpus), gpus) >= plan.workers:
            return replace(plan, cpus_per_worker=float(cpus))
    what = f"{gpus} GPU(s) and 1 CPU" if gpus else "1 CPU"
    raise UserError(
        f"--workers {plan.workers} --devices-per-worker {plan.devices_per_worker}: each worker needs {what} on one "
        f"machine, and the cluster ({_format(nodes)}) has room for {_slots(nodes, 1.0, gpus)}; use fewer workers "
        "or devices, or add machines"
    )


def _slots(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs the machines hold; a fraction of a GPU is of one GPU."""
    total = 0
    for node in nodes:
        slots = int(node.cpus / cpus + 1e-9)
        if gpus:
            slots = min(slots, int(node.gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(node.gpus // gpus))
        total += slots
    return total


def _format(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes)


@dataclass(frozen=True)
class TrialPlan:
    """What each trial of a search holds, and how many run at a time."""

    cpus: float
    gpus: float
    concurrent: int
    workers: WorkerPlan | None = None
    """Of each trial, through Ray Train; None for one process without it."""

    def resources(self) -> dict[str, float]:
        """Of the trial's own process, in Ray's terms: with workers, these hold what the trial needs."""
        if self.workers is not None:
            return {"CPU": 0.0, "memory": DRIVER_MEMORY}  # Tune has no place for what asks for nothing at all
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def plan_trials(nodes: Sequence[Node], search: "SearchConfig") -> TrialPlan:
    """Choose what each trial gets from what there is, or check what was asked.

    By default a trial has one GPU where there are any, and its share of the cores; without, half of a machine's cores.

    Raises:
        UserError: a trial, or as many as were asked for at a time, cannot be placed; says what there is and was asked.
    """
    _check_any(nodes)
    gpu_nodes = [node for node in nodes if node.gpus >= 1]
    gpus = search.gpus_per_trial if search.gpus_per_trial is not None else (1.0 if gpu_nodes else 0.0)
    if search.cpus_per_trial is not None:
        cpus = search.cpus_per_trial
    elif gpus and gpu_nodes:
        cpus = max(1.0, float(int(min(node.cpus * gpus / node.gpus for node in gpu_nodes))))
    else:
        cpus = max(1.0, float(int(min(node.cpus for node in nodes)) // TRIALS_PER_MACHINE))
    workers = search.workers_per_trial
    room = _slots(nodes, cpus, gpus) // workers
    concurrent = search.concurrent or room
    if room < max(concurrent, 1):
        worker = f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
        trial = f"{workers} workers of {worker}" if workers > 1 else worker
        raise UserError(
            f"search: {search.concurrent or 1} trial(s) at a time of {trial} each, and the cluster ({_format(nodes)}) "
            f"has room for {room}; lower search.concurrent, or its workers_, cpus_ or gpus_per_trial"
        )
    if workers == 1:
        return TrialPlan(cpus, gpus, concurrent)
    kind: DeviceKind = "GPU" if gpus else "CPU"
    return TrialPlan(cpus, gpus, concurrent, WorkerPlan(workers, max(int(gpus), 1), kind, cpus))


def this_machine() -> Node:
    """At most what a cluster of this machine alone will have: all that is plugged in, usable or not."""
    return Node(float(os.cpu_count() or 1), float(len(list(Path("/dev").glob("nvidia[0-9]*")))))


def cluster_nodes() -> list[Node]:
    """The live machines of the cluster that this process is connected to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]
