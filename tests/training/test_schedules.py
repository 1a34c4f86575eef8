"""Schedules and class weights, as properties over grids."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cxr_dist.config.schema import StageConfig
from cxr_dist.training.schedules import class_weights, learning_rates

PEAK = 0.125


def stage(schedule: str, epochs: int, warmup: float) -> StageConfig:
    return StageConfig.model_validate(
        {"schedule": schedule, "epochs": epochs, "warmup_epochs": warmup, "learning_rate": PEAK}
    )


@given(
    schedule=st.sampled_from(["constant", "cosine"]),
    epochs=st.integers(0, 6),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 8),
)
def test_learning_rates(schedule: str, epochs: int, steps: int, warmup: float) -> None:
    total = epochs * steps
    warm = min(round(warmup * steps), total)
    rates = learning_rates(stage(schedule, epochs, warmup), steps)
    assert rates.shape == (total,)
    assert rates.dtype == np.float32
    assert (rates > 0).all()
    assert (rates <= np.float32(PEAK)).all()
    if not total:
        return
    assert rates.max() == np.float32(PEAK), "the peak is reached, even by a stage that is all warm-up"
    if warm:
        np.testing.assert_allclose(np.diff(rates[:warm]), PEAK / warm, rtol=1e-4, err_msg="linear, from zero")
        np.testing.assert_allclose(rates[0], PEAK / warm, rtol=1e-6)
        assert rates[warm - 1] == np.float32(PEAK)
    after = rates[warm:]
    if schedule == "constant":
        assert (after == np.float32(PEAK)).all()
    else:
        expected = [PEAK * (1 + math.cos(math.pi * i / len(after))) / 2 for i in range(len(after))]
        np.testing.assert_allclose(after, expected, rtol=1e-5)
        assert (np.diff(after) < 0).all()


def test_a_cosine_ends_just_above_zero() -> None:
    last = learning_rates(stage("cosine", 10, 1), 100)[-1]
    assert 0 < last < 1e-4 * PEAK


def test_an_unresolved_stage_is_a_defect() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        learning_rates(StageConfig(learning_rate=None), 3)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 100))
def test_class_weights_balance_the_classes(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    weights = class_weights(labels, len(counts))
    assert weights.shape == (len(counts),)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[labels].mean(dtype=np.float64), 1, rtol=1e-5)
    sums = [weights[labels[labels == label]].sum(dtype=np.float64) for label in range(len(counts))]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5, err_msg="each class weighs the same in all")


@pytest.mark.parametrize("labels", [[0, 0, 2], [0, 1], [0, 1, 2, 3]])
def test_class_weights_need_every_class(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="counts are"):
        class_weights(np.array(labels, np.int32), 3)
