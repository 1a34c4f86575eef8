"""What a job asks of a cluster, checked before anything waits: a placement that cannot fit waits for ever."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cxr_dist.strategy import DeviceKind
from tfrecords_builder.errors import UserError


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
    if not nodes:
        raise UserError("the cluster has no machine; start one, or use --launcher local")
    for name, value in (("--workers", workers), ("--devices-per-worker", devices_per_worker)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    gpu_nodes = [node for node in nodes if node.gpus >= 1]
    if gpu_nodes:
        per_node = min(int(node.gpus) for node in gpu_nodes)
        if devices_per_worker is None:
            devices_per_worker = per_node if workers is None else _most_devices(nodes, workers)
        if workers is None:
            workers = _places(WorkerPlan(1, devices_per_worker, "GPU", 1.0), nodes)
        share = min(node.cpus * devices_per_worker / node.gpus for node in gpu_nodes)
        plan = WorkerPlan(max(workers, 1), devices_per_worker, "GPU", max(1.0, float(int(share))))
    else:
        workers = workers or 1
        if workers > 1 and (devices_per_worker or 1) > 1:
            raise UserError(
                f"--devices-per-worker {devices_per_worker}: without GPUs each of several workers has one logical CPU; "
                "leave it out, or ask for one worker"
            )
        share = sum(node.cpus for node in nodes) / workers
        largest = max(node.cpus for node in nodes)
        plan = WorkerPlan(workers, devices_per_worker or 1, "CPU", max(1.0, float(int(min(share, largest)))))
    return _fitted(plan, nodes)


def _most_devices(nodes: Sequence[Node], workers: int) -> int:
    """The most GPUs that each of `workers` can have on one machine; 1 when not even that fits."""
    largest = max(int(node.gpus) for node in nodes)
    fitting = (each for each in range(largest, 1, -1) if _places(WorkerPlan(1, each, "GPU", 1.0), nodes) >= workers)
    return next(fitting, 1)


def _fitted(plan: WorkerPlan, nodes: Sequence[Node]) -> WorkerPlan:
    """The plan, with as many CPUs per worker as let all workers be placed."""
    for cpus in range(int(plan.cpus_per_worker), 0, -1):
        fitted = WorkerPlan(plan.workers, plan.devices_per_worker, plan.kind, float(cpus))
        if _places(fitted, nodes) >= plan.workers:
            return fitted
    what = f"{plan.devices_per_worker} GPU(s) and 1 CPU" if plan.kind == "GPU" else "1 CPU"
    there = ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes)
    room = _places(WorkerPlan(plan.workers, plan.devices_per_worker, plan.kind, 1.0), nodes)
    raise UserError(
        f"--workers {plan.workers} --devices-per-worker {plan.devices_per_worker}: each worker needs {what} on one "
        f"machine, and the cluster ({there}) has room for {room}; ask for fewer workers or devices, or add machines"
    )


def _places(plan: WorkerPlan, nodes: Sequence[Node]) -> int:
    """How many workers the machines can hold."""
    gpus = plan.devices_per_worker if plan.kind == "GPU" else 0
    return sum(
        min(int(node.cpus // plan.cpus_per_worker), int(node.gpus // gpus) if gpus else int(node.cpus))
        for node in nodes
    )


def cluster_nodes() -> list[Node]:
    """The live machines of the cluster that this process is connected to."""
    import ray

    def resources(node: dict[str, Any]) -> Node:
        return Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))

    return [resources(node) for node in ray.nodes() if node["Alive"]]
