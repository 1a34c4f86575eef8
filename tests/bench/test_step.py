"""The loop against a bare step: that both do the work that is compared, and how the rounds become one figure."""

import functools
from pathlib import Path

import pytest

from cxr_dist.bench import step
from cxr_dist.bench.step import Round, Summary
from cxr_dist.config.loading import load_config
from cxr_dist.model.resnet import build_model
from cxr_dist.runs.events import Reporters
from cxr_dist.runs.run_folder import read_history
from tests.conftest import SMALL_RUN, use_small_base
from tests.small_training import small_base


def test_the_first_round_of_a_stage_counts_nowhere_and_ratios_are_paired() -> None:
    """Ratios of the rounds are 1.0, 0.5 and 0.9; that of the medians would be 1.8."""
    rounds = [Round(1, 1.0, 100.0), Round(1, 10.0, 10.0), Round(1, 20.0, 40.0), Round(1, 18.0, 20.0)]
    assert step.summarize([*rounds, Round(2, 9.0, 1.0), Round(2, 3.0, 4.0)]) == [
        Summary(1, 18.0, 20.0, 0.9, 3),
        Summary(2, 3.0, 4.0, 0.75, 1),
    ]


def test_every_epoch_of_train_is_followed_by_bare_steps(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_base(monkeypatch)
    monkeypatch.setattr(step, "build_model", functools.partial(build_model, make_base=small_base))
    config = load_config(None, [*SMALL_RUN, *step.overrides(rounds=1)])
    rounds = step.measure(config, dataset, tmp_path / "run", Reporters([]))
    assert [row.stage for row in rounds] == [1, 1, 2, 2]
    assert all(row.train > 0 and row.bare > 0 for row in rounds)
    history = read_history(tmp_path / "run")
    assert [round(row.train * epoch["seconds"]) for row, epoch in zip(rounds, history, strict=True)] == [56] * 4


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
