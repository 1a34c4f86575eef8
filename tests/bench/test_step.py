"""The loop against a bare step: that both do the work that is compared, and how the rounds become one figure."""

import functools
from pathlib import Path

import pytest

from cxr_dist.bench import step
from cxr_dist.bench.common import Medians, Round
from cxr_dist.config.loading import load_config
from cxr_dist.model.resnet import build_model
from cxr_dist.runs.events import Reporters
from cxr_dist.runs.run_folder import read_history
from tests.conftest import SMALL_RUN, use_small_base
from tests.small_training import small_base


def test_ratios_are_paired() -> None:
    """The median of the rounds' ratios, which a slow moment of the machine does not change."""
    rounds = [Round(10.0, 10.0), Round(20.0, 40.0), Round(18.0, 20.0)]
    assert Medians.of(rounds) == Medians(18.0, 20.0, 0.9, 3)
    assert Medians.of([Round(9.0, 1.0), Round(3.0, 4.0), Round(2.0, 8.0)]) == Medians(3.0, 4.0, 0.75, 3)
    assert step.table({2: rounds})[1].split() == ["2", "18.00", "20.00", "0.900", "(3)"]


@pytest.mark.nightly
def test_every_epoch_of_train_is_followed_by_bare_steps(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_base(monkeypatch)
    monkeypatch.setattr(step, "build_model", functools.partial(build_model, make_base=small_base))
    config = load_config(None, [*SMALL_RUN, *step.overrides(rounds=1)])
    rounds = step.measure(config, dataset, tmp_path / "run", Reporters([]))
    assert {stage: len(rows) for stage, rows in rounds.items()} == {1: 1, 2: 1}, "the first of each compiles"
    assert all(row.ours > 0 and row.baseline > 0 for rows in rounds.values() for row in rows)
    seconds = [row["seconds"] for row in read_history(tmp_path / "run")][1::2]
    assert [round(rounds[stage][0].ours * seconds[stage - 1]) for stage in (1, 2)] == [56, 56]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_bare_step_trains_what_the_stage_trains(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def remember(*arguments: object, **named: object) -> object:
        built.append(build_model(*arguments, **named, make_base=small_base))
        return built[-1]

    monkeypatch.setattr(step, "build_model", remember)
    config = load_config(None, [*SMALL_RUN, "model.image_size=32", "model.dropout=0"])
    bare = step.bare_step(config, step.prepare_devices(1), 4, stage)
    losses = [float(bare()) for _ in range(8)]
    assert losses[-1] < losses[0]
    trained = {variable.path for variable in built[0].trainable_variables}
    assert any("stem" in path for path in trained) == (stage == 2)
