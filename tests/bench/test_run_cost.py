"""The arithmetic of the page on scaling, by formulas written out here, and what its files may say."""

import math
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.bench import run_cost
from cxr_dist.bench.run_cost import Price, RunPlan, predict, read_plan, read_prices, run_of, step_of, table
from cxr_dist.cli.main import main
from tests.documentation import DOCS, ROOT
from tfrecords_builder.common.errors import UserError

CLUSTER = ROOT / "cluster"


def plan(**changes: Any) -> RunPlan:
    return RunPlan.model_validate(read_plan(CLUSTER / "h100.yaml").model_dump() | changes)


def price(**changes: Any) -> Price:
    settings = {"name": "p", "usd_per_hour": 50, "spot": False, "gpus": 8, "date": "2026-01-01"}
    return Price.model_validate(settings | {"source": "s", "check_at": "c"} | changes)


@pytest.mark.parametrize("machines", [1, 8, 64])
@pytest.mark.parametrize("rate", [2_400, 3_400, 7_000])
@pytest.mark.parametrize("batch", [64, 256])
def test_a_step_is_computation_and_two_rings(machines: int, rate: int, batch: int) -> None:
    """8 GPUs at 450 GB/s, then the machines at 12.5 GB/s, 96.3 MB each: 2 (n - 1) / n of them in and out."""
    found = step_of(plan(), machines, rate, batch)
    rings = 1.75 * 0.0963 / 450 + 2 * (1 - 1 / machines) * 0.0963 / 12.5
    assert found.gpus == 8 * machines
    assert found.all_reduce_seconds == pytest.approx(rings)
    assert found.images_per_second == pytest.approx(8 * machines * batch / (batch / rate + rings))
    assert found.lost == pytest.approx(rings / (batch / rate + rings))


def test_figures_of_the_page() -> None:
    """64 GPUs at 7,000 images/s and batch 64: 9.1 ms of computation, 13.9 ms of all-reduce."""
    found = step_of(plan(), 8, 7_000, 64)
    assert (found.all_reduce_seconds, found.lost) == (pytest.approx(0.01386, rel=1e-3), pytest.approx(0.603, abs=1e-3))


def test_reading_may_take_longer_than_the_rest() -> None:
    found = step_of(plan(storage_gigabytes=0.1), 2, 7_000, 64)
    assert found.images_per_second == pytest.approx(2 * 0.1e9 / 50_239)


def test_the_hours_of_a_run() -> None:
    """On 8 machines at 3,400 images/s; the dataset of 10.1 million images is staged at 1 GB/s."""
    found = run_of(plan(), 8, 3_400)
    start = 180 + 10.1e6 * 50_239 / 1e9
    step = 256 / 3_400 + 1.75 * 0.0963 / 450 + 1.75 * 0.0963 / 12.5
    training = 100 * (10_000_000 // 16_384) * step
    validation = 100 * 100_000 / (64 * 3 * 3_400)
    useful = training * 1.01 + validation
    frequency = 0.02 * 8 / 3_600
    lost = useful * (frequency * 45 + math.exp(frequency * start) - 1)
    assert found.start == pytest.approx(start / 3_600)
    assert found.hours(spot=False) == pytest.approx((start + useful) / 3_600)
    assert found.hours(spot=True) == pytest.approx((start + useful + lost) / 3_600)
    assert found.cost(price()) == pytest.approx((start + useful) / 3_600 * 8 * 50)
    assert found.cost(price(spot=True)) == pytest.approx((start + useful + lost) / 3_600 * 8 * 50)


def test_without_interruptions_spot_machines_take_no_longer() -> None:
    found = run_of(plan(interruptions_per_machine_hour=0), 64, 7_000)
    assert found.hours(spot=True) == found.hours(spot=False)


def test_an_epoch_of_less_than_a_step() -> None:
    with pytest.raises(UserError, match=r"training_images 100000: fewer than a step of 131,072 images"):
        run_of(plan(training_images=100_000), 64, 7_000)


def test_the_table_has_a_line_for_each_combination_and_price() -> None:
    prices = read_prices(CLUSTER / "prices.yaml", 8)
    steps, runs = predict(plan())
    assert (len(steps), len(runs)) == (18, 9)
    lines = table(plan(), steps, runs, prices)
    assert len(lines) == 2 + 18 + 3 + 9 + len(prices)
    assert all(each.source in line for each, line in zip(prices, lines[-len(prices) :], strict=True))
    assert len({len(line) for line in lines[22:32]}) == 1, "columns"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "cluster", str(CLUSTER / "h100.yaml"), "--prices", str(CLUSTER / "prices.yaml")])
    assert f"```text\n{capsys.readouterr().out}```" in (DOCS / "design" / "scaling.md").read_text(encoding="utf-8")


def test_every_price_says_from_when_and_where_it_is() -> None:
    for each in read_prices(CLUSTER / "prices.yaml", 8):
        assert each.check_at.startswith("https://")
        assert each.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: []", "prices"),
        ("prices:\n- name: a", r"prices.0.usd_per_hour"),
        (
            "prices:\n- {name: a, usd_per_hour: 1, spot: no, gpus: 4, date: 2026-01-01, source: s, check_at: c}",
            "has no price of a machine with 8 GPUs; add one",
        ),
    ],
)
def test_a_bad_file_of_prices_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        read_prices(path, 8)


def test_a_bad_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("name: x\nmachines: []")
    with pytest.raises(UserError, match=rf"^{path}: .*; see cluster/h100.yaml"):
        run_cost.read_plan(path)
