"""The cost model: what it is fitted to, what it predicts, and what a cluster's file may say."""

import itertools
from pathlib import Path

import pytest

from cxr_dist.bench.cost_model import (
    Cluster,
    CostModel,
    Measured,
    errors,
    fit,
    held_out_errors,
    predict,
    read_cluster,
    traffic,
)
from tfrecords_builder.common.errors import UserError

GRADIENTS = 90_000_000
TRUE = CostModel(0.05, 0.1, 2e-9, GRADIENTS)
GRID = [(1, 16), (1, 64), (2, 32), (2, 64), (4, 64)]


def point(workers: int, batch: int, seconds: float) -> Measured:
    """Workers of one machine: each has its part of the device."""
    return Measured(1, workers, batch, batch / seconds, GRADIENTS // 4, "CPU")


def points(model: CostModel = TRUE, noise: float = 0.0) -> list[Measured]:
    signs = itertools.cycle((1, -1))
    return [point(n, batch, model.step_seconds(n, batch, 1 / n) * (1 + next(signs) * noise)) for n, batch in GRID]


def test_the_costs_that_made_the_points_are_found() -> None:
    found = fit(points())
    assert found.fixed_seconds == pytest.approx(TRUE.fixed_seconds, rel=1e-6)
    assert found.seconds_per_image == pytest.approx(TRUE.seconds_per_image, rel=1e-6)
    assert found.seconds_per_byte == pytest.approx(TRUE.seconds_per_byte, rel=1e-6)
    assert held_out_errors(points()) == pytest.approx([0.0] * len(GRID), abs=1e-6)


def test_a_wrong_model_is_told_by_its_errors() -> None:
    noisy = points(noise=0.1)
    found = fit(noisy)
    assert max(map(abs, errors(found, noisy))) < 0.15
    assert max(map(abs, held_out_errors(noisy))) > 0.1


def test_no_cost_is_below_zero() -> None:
    """A second worker that makes the same batch faster has no negative bandwidth."""
    found = fit([point(1, 32, 4.0), point(2, 32, 3.0)])
    assert min(found.fixed_seconds, found.seconds_per_image, found.seconds_per_byte) >= 0
    with pytest.raises(ValueError, match="do not determine"):
        fit(points()[:1])


def test_traffic_is_that_of_a_ring() -> None:
    assert [traffic(n, 100) for n in (1, 2, 4)] == [0, 100, 150]


def cluster(**changes: object) -> Cluster:
    settings: dict[str, object] = {
        "name": "c",
        "machines": 64,
        "devices_per_machine": 8,
        "relative_speed": 10,
        "network_gigabits": 100,
        "storage_gigabytes": 1,
        "price_per_machine_hour": 30,
    }
    return Cluster.model_validate(settings | changes)


def test_one_machine_is_as_fast_as_its_devices() -> None:
    model = CostModel(0.0, 0.1, 0.0, GRADIENTS)
    found = predict(model, cluster(), 1, 36_000, 50_000)
    assert found.images_per_second == pytest.approx(8 * 10 / 0.1)
    assert (found.replicas, found.limit) == (8, "compute")
    assert (found.hours, found.cost) == (pytest.approx(36_000 / 800 / 3600), pytest.approx(0.0125 * 30))


@pytest.mark.parametrize("machines", [2, 8, 64])
def test_more_machines_are_faster_by_less(machines: int) -> None:
    one, many = (predict(TRUE, cluster(), n, 10**6, 50_000) for n in (1, machines))
    assert one.images_per_second < many.images_per_second < machines * one.images_per_second


@pytest.mark.parametrize(
    ("change", "limit"), [({"storage_gigabytes": 0.001}, "input"), ({"network_gigabits": 0.1}, "all-reduce")]
)
def test_the_narrowest_place_is_named(change: dict[str, object], limit: str) -> None:
    assert predict(TRUE, cluster(**change), 8, 10**6, 50_000).limit == limit


def test_what_storage_gives_is_the_limit() -> None:
    found = predict(TRUE, cluster(storage_gigabytes=0.001), 4, 10**6, 50_000)
    assert found.images_per_second == pytest.approx(4 * 0.001e9 / 50_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[", "is not YAML"),
        ("- 1", "not a mapping"),
        ("name: x\nmachines: 0\nrelative_speed: 1\nnetwork_gigabits: 1\nstorage_gigabytes: 1", "machines"),
        ("name: x\nmachines: 1\nrelative_speed: 1\nstorage_gigabytes: 1", "network_gigabits"),
        ("name: x\nmachines: 1\nspeed: 1\nrelative_speed: 1\nnetwork_gigabits: 1\nstorage_gigabytes: 1", "speed"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        read_cluster(path)


def test_the_example_can_be_read() -> None:
    found = read_cluster(Path(__file__).parents[2] / "cluster" / "example.yaml")
    assert found.machines > 1
