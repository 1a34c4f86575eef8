"""Placement: what is planned always fits, and what cannot fit is said before anything waits."""

import itertools

import pytest
from hypothesis import given, strategies as st

from cxr_dist.launch.placement import Node, WorkerPlan, plan_most_workers, plan_workers
from tfrecords_builder.common.errors import UserError

EIGHT = [Node(64, 8)]


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    import socket

    from cxr_dist.launch.ray_connection import connected

    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(UserError, match="no server answers there"), connected(address, verbose=False):
                pass


def places(plan: WorkerPlan, nodes: list[Node]) -> bool:
    """Whether a scheduler that fills one machine after another places every bundle."""
    left = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes]
    wanted = plan.resources()
    for _ in range(plan.workers):
        for node in left:
            if all(node[name] >= amount for name, amount in wanted.items()):
                for name, amount in wanted.items():
                    node[name] -= amount
                break
        else:
            return False
    return True


NODES = st.lists(
    st.builds(Node, cpus=st.integers(0, 20).map(float), gpus=st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 8.0])),
    min_size=1,
    max_size=4,
)
SOME = st.one_of(st.none(), st.integers(1, 9))


@given(nodes=NODES, workers=SOME, devices=SOME)
def test_a_plan_fits_and_a_refusal_is_right(nodes: list[Node], workers: int | None, devices: int | None) -> None:
    kind = "GPU" if any(node.gpus for node in nodes) else "CPU"
    if kind == "CPU" and (workers or 1) > 1 and (devices or 1) > 1:
        # TensorFlow's multi-worker strategy uses one CPU device of a worker, and leaves the others idle.
        with pytest.raises(UserError, match=f"--devices-per-worker {devices}: .*one logical CPU"):
            plan_workers(nodes, workers, devices)
        return
    try:
        plan = plan_workers(nodes, workers, devices)
    except UserError as error:
        message = str(error)
        for node in nodes:
            assert f"{node.cpus:g} CPU + {node.gpus:g} GPU" in message, "says what is there"
        for name, asked in (("--workers", workers), ("--devices-per-worker", devices)):
            if asked is not None:
                assert f"{name} {asked}" in message, "says what was asked"
        smallest = WorkerPlan(workers or 1, devices or 1, kind, 1.0)  # type: ignore[arg-type]
        assert not places(smallest, nodes), "not even the least fits"
        return
    assert plan.kind == kind
    assert places(plan, nodes)
    assert plan.workers == workers or workers is None
    assert plan.devices_per_worker == devices or devices is None
    assert plan.cpus_per_worker >= 1
    assert plan.cpus_per_worker == int(plan.cpus_per_worker)


@given(nodes=NODES, workers=st.integers(1, 9))
def test_workers_get_as_much_as_fits(nodes: list[Node], workers: int) -> None:
    try:
        plan = plan_workers(nodes, workers, None)
    except UserError:
        return
    if plan.kind == "GPU":
        richer = WorkerPlan(workers, plan.devices_per_worker + 1, "GPU", 1.0)
        assert not places(richer, nodes), "one GPU more for each would fit, too"
    else:
        richer = WorkerPlan(workers, 1, "CPU", plan.cpus_per_worker + 1)
        assert not places(richer, nodes), "one CPU more for each would fit, too"


@pytest.mark.parametrize(
    ("nodes", "workers", "devices", "planned"),
    [
        (EIGHT, 2, 4, (2, 4)),
        (EIGHT, 8, 1, (8, 1)),
        (EIGHT, 8, None, (8, 1)),
        (EIGHT, 2, None, (2, 4)),
        (EIGHT, 3, None, (3, 2)),
        (EIGHT, None, 2, (4, 2)),
        (EIGHT, None, None, (1, 8)),
        ([Node(32, 4)] * 2, None, None, (2, 4)),
        ([Node(32, 4)] * 2, 8, None, (8, 1)),
        ([Node(32, 4)] * 2, 1, None, (1, 4)),
        ([Node(8, 3)] * 2, 3, None, (3, 1)),
        ([Node(8, 8), Node(8, 4)], None, None, (3, 4)),
        ([Node(8, 8), Node(8, 1)], 2, None, (2, 4)),
        ([Node(16), Node(32, 4)], None, None, (1, 4)),
        ([Node(4, 8)], None, 1, (4, 1)),
        ([Node(1, 8), Node(1, 2)], 2, None, (2, 2)),
    ],
)
def test_gpus(nodes: list[Node], workers: int | None, devices: int | None, planned: tuple[int, int]) -> None:
    plan = plan_workers(nodes, workers, devices)
    assert plan.kind == "GPU"
    assert (plan.workers, plan.devices_per_worker) == planned
    assert plan.resources() == {"GPU": planned[1], "CPU": plan.cpus_per_worker}


def test_cpus_go_with_the_gpus() -> None:
    assert plan_workers(EIGHT, 2, 4).cpus_per_worker == 32
    assert plan_workers(EIGHT, 2, 1).cpus_per_worker == 8
    assert plan_workers([Node(2, 8)], None, None).cpus_per_worker == 2


@pytest.mark.parametrize(
    ("nodes", "workers", "devices", "planned"),
    [
        ([Node(2)], None, None, (1, 1, 2)),
        ([Node(2)], 2, None, (2, 1, 1)),
        ([Node(2)], 1, 4, (1, 4, 2)),
        ([Node(16), Node(16)], None, None, (1, 1, 16)),
        ([Node(16), Node(16)], 2, None, (2, 1, 16)),
        ([Node(3), Node(3)], 3, None, (3, 1, 1)),
        ([Node(0), Node(4)], 2, None, (2, 1, 2)),
    ],
)
def test_cpus_alone(nodes: list[Node], workers: int | None, devices: int | None, planned: tuple[int, int, int]) -> None:
    plan = plan_workers(nodes, workers, devices)
    assert plan.kind == "CPU"
    assert (plan.workers, plan.devices_per_worker, plan.cpus_per_worker) == planned
    assert plan.resources() == {"CPU": planned[2]}


@pytest.mark.parametrize(
    ("nodes", "workers", "devices", "words"),
    [
        (EIGHT, 3, 4, ["--workers 3", "4 GPU(s)", "64 CPU + 8 GPU", "room for 2"]),
        (EIGHT, 9, None, ["--workers 9", "1 GPU(s)", "room for 8"]),
        (EIGHT, None, 16, ["--devices-per-worker 16", "16 GPU(s)", "room for 0"]),
        ([Node(32, 4)] * 2, 1, 8, ["8 GPU(s)", "one machine", "room for 0"]),
        ([Node(4, 8)], 8, 1, ["--workers 8", "1 CPU", "4 CPU + 8 GPU", "room for 4"]),
        ([Node(2)], 3, None, ["--workers 3", "2 CPU + 0 GPU", "room for 2"]),
        ([], 1, None, ["no machine"]),
        ([Node(2)], 0, None, ["--workers 0"]),
        ([Node(2)], 1, -1, ["--devices-per-worker -1"]),
    ],
)
def test_asking_too_much(nodes: list[Node], workers: int | None, devices: int | None, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan_workers(nodes, workers, devices)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_the_order_of_machines_does_not_matter() -> None:
    machines = [Node(4, 2), Node(8, 0), Node(2, 3)]
    plans = {plan_workers(list(order), workers, None) for order in itertools.permutations(machines) for workers in (2,)}
    assert len(plans) == 1


@pytest.mark.parametrize("cores", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("most", [3, 4, 8])
@pytest.mark.parametrize("batch", [12, 32])
def test_a_range_of_workers_takes_the_most_that_fit_and_share_the_batch(
    cores: int, least: int, most: int, batch: int
) -> None:
    nodes = [Node(1.0)] * cores
    possible = [number for number in range(least, most + 1) if number <= cores]
    if not possible:
        with pytest.raises(UserError, match=f"--workers {least} "):
            plan_most_workers(nodes, (least, most), None)
        return
    sharing = [number for number in possible if batch % number == 0]
    plan = plan_most_workers(nodes, (least, most), None, lambda replicas: batch % replicas == 0)
    assert plan.workers == max(sharing or possible)
    assert plan_most_workers(nodes, None, None) == plan_workers(nodes, None, None)
