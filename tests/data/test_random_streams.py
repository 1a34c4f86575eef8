"""Random numbers that decide a run: their values are fixed, so that another NumPy that changes them is noticed."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cxr_dist.data import augmentation, batch_sampler, random_streams
from cxr_dist.features import cache


def test_the_order_of_an_epoch_has_fixed_values() -> None:
    """Computed once, with NumPy 1.26.4, 2.0.2 and 2.4.6 alike: a run that is resumed must see the same order."""
    assert batch_sampler.epoch_order(10, seed=0, epoch=0).tolist() == [3, 5, 2, 4, 7, 0, 9, 6, 1, 8]
    assert batch_sampler.epoch_order(10, seed=0, epoch=1).tolist() == [4, 5, 8, 6, 7, 1, 0, 2, 3, 9]
    assert batch_sampler.epoch_order(10, seed=1, epoch=0).tolist() == [8, 0, 1, 7, 4, 5, 9, 2, 6, 3]
    assert batch_sampler.epoch_order(14_814, seed=5, epoch=7)[:5].tolist() == [1675, 14542, 8343, 10217, 8677]


def test_the_draws_of_a_view_have_fixed_values() -> None:
    """Exact in float32: the copies of an image that a feature cache holds."""
    draws = cache.copy_draws(2, seed=0, number=1)
    assert draws.dtype == np.float32
    assert draws.shape == (2, augmentation.DRAWS)
    assert (draws.ravel()[:3] * 2**23).tolist() == [1794410.0, -511225.0, 2806470.0]


@given(count=st.integers(0, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000))
def test_it_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = random_streams.permutation(count, "test", seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, random_streams.permutation(count, "test", seed, epoch))


def test_purposes_seeds_and_epochs_have_streams_of_their_own() -> None:
    """Also where the numbers written one after another are the same."""
    asked = [("a", 1, 23), ("a", 12, 3), ("a", 123), ("a1", 23), ("b", 1, 23), ("a", 1, 24), ("a",), ("a", 0)]
    orders = {random_streams.permutation(100, *key).tobytes() for key in asked}
    draws = {random_streams.uniform((10,), *key).tobytes() for key in asked}
    figures = {random_streams.generator(*key).bytes(16) for key in asked}
    assert len(orders) == len(draws) == len(figures) == len(asked)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_permutation_comes_as_often(count: int) -> None:
    """Chi-squared over all permutations."""
    permutations = math.factorial(count)
    draws = 200 * permutations
    seen = Counter(random_streams.permutation(count, "test", seed).tobytes() for seed in range(draws))
    assert len(seen) == permutations
    chi_squared = sum((times - 200) ** 2 / 200 for times in seen.values())
    freedom = permutations - 1
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_every_position_goes_everywhere() -> None:
    """The mean place of each of many positions, and of neighbours the distance, are those of a uniform permutation."""
    count, orders = 1000, 400
    places = np.stack([np.argsort(random_streams.permutation(count, "test", seed)) for seed in range(orders)])
    error = count / np.sqrt(12 * orders)
    assert np.abs(places.mean(0) - (count - 1) / 2).max() < 5 * error
    distance = np.abs(np.diff(places, axis=1)).mean()
    assert distance == pytest.approx((count + 1) / 3, rel=0.01)


def test_uniform_draws() -> None:
    draws = random_streams.uniform((200, 500), "test", 1)
    assert draws.min() >= -1
    assert draws.max() < 1
    assert abs(draws.mean()) < 5 / np.sqrt(3 * draws.size)
    assert draws.var() == pytest.approx(1 / 3, rel=0.02)
