"""Two classifiers on the same images: the difference with its interval, McNemar's test, and the published result."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cxr_dist.evaluation import assessment, bootstrap
from cxr_dist.evaluation.compare import COMPARED, compare
from cxr_dist.evaluation.metrics import evaluate_predictions
from tests.evaluation.test_bootstrap import drawn
from tfrecords_builder.common.errors import UserError


def test_the_difference_is_that_of_the_metrics_in_any_order_of_images() -> None:
    first = drawn(0, 300, (0.7, 0.2, 0.1))
    second = replace(first, probabilities=np.roll(first.probabilities, 7, axis=0))
    order = np.random.default_rng(0).permutation(len(first))
    shuffled = replace(
        second,
        paths=[second.paths[row] for row in order],
        labels=second.labels[order],
        probabilities=second.probabilities[order],
        groups=None,
    )
    result = compare(first, shuffled)
    assert result == compare(first, second)
    before, after = evaluate_predictions(first), evaluate_predictions(second)
    for name in COMPARED:
        row = result["metrics"][name]
        assert (row["first"], row["second"]) == pytest.approx((before[name], after[name]), abs=1e-9)
        assert row["difference"] == pytest.approx(after[name] - before[name], abs=1e-9)
        assert row["low"] < row["difference"] < row["high"]
    right = [predictions.labels == predictions.predicted for predictions in (first, second)]
    table = result["mcnemar"]
    assert table["only_first_right"] == (right[0] & ~right[1]).sum()
    expected = stats.binomtest(int((right[0] & ~right[1]).sum()), int((right[0] != right[1]).sum())).pvalue
    assert table["p_value"] == pytest.approx(expected)


def test_equal_classifiers_do_not_differ() -> None:
    first = drawn(2, 100)
    result = compare(first, first)
    assert result["mcnemar"] == {"only_first_right": 0, "only_second_right": 0, "p_value": 1.0}
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in result["metrics"].values())


@pytest.mark.nightly
def test_the_interval_of_a_difference_holds_the_truth() -> None:
    """Two classifiers that share most of their noise: far narrower than unpaired, and right 95 % of the time."""
    held, narrower, truth = 0, 0, _true_difference()
    for seed in range(150):
        random = np.random.default_rng(seed)
        first = drawn(seed, 300, (0.6, 0.3, 0.1))
        worse = np.log(first.probabilities) + 0.3 * random.normal(size=first.probabilities.shape)
        odds = np.exp(worse)
        second = replace(first, probabilities=odds / odds.sum(axis=1, keepdims=True))
        row = compare(first, second, resamples=200)["metrics"]["cosine_similarity"]
        held += row["low"] <= truth <= row["high"]
        low, high = bootstrap.bootstrap(first, resamples=200)["intervals"]["cosine_similarity"]
        narrower += row["high"] - row["low"] < high - low
    assert narrower == 150
    assert 0.91 <= held / 150 <= 0.985


def _true_difference() -> float:
    first = drawn(12345, 100_000, (0.6, 0.3, 0.1))
    random = np.random.default_rng(12345)
    odds = np.exp(np.log(first.probabilities) + 0.3 * random.normal(size=first.probabilities.shape))
    second = replace(first, probabilities=odds / odds.sum(axis=1, keepdims=True))
    values = [evaluate_cosine(predictions) for predictions in (first, second)]
    return values[1] - values[0]


def evaluate_cosine(predictions: object) -> float:
    return float(bootstrap.weighted_metrics(predictions, np.ones((1, len(predictions))))["cosine_similarity"][0])  # type: ignore[arg-type]


def test_other_images_are_refused() -> None:
    first = drawn(0, 30)
    with pytest.raises(UserError, match=r"the images differ \(x is in only one\)"):
        compare(replace(first, paths=["x", *first.paths[1:]]), first)
    labels = first.labels.copy()
    labels[3] = (labels[3] + 1) % 4
    with pytest.raises(UserError, match="3: has two labels"):
        compare(first, replace(first, labels=labels))
    with pytest.raises(UserError, match="classes differ"):
        compare(first, replace(first, class_names=("A", "B", "C", "D")))


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.80, "lower"), (0.94, "within noise"), (0.99, "higher")])
def test_the_published_result_is_beside_ours(accuracy: float, verdict: str) -> None:
    random = np.random.default_rng(0)
    base = drawn(0, 1000)
    answers = np.where(random.random(1000) < accuracy, base.labels, (base.labels + 1) % 4)
    predictions = replace(base, probabilities=np.eye(4)[answers] * 0.9 + 0.025)
    rows = assessment.beside_published(evaluate_predictions(predictions), bootstrap.bootstrap(predictions))
    assert [row["metric"] for row in rows] == ["accuracy", "f1_macro"]
    for row in rows:
        assert row["verdict"] == verdict
        assert row["difference"] == pytest.approx(row["ours"] - row["published"])
    # Both uncertainties and the rounding: neither alone.
    share = rows[0]["ours"]
    ours = 1.96 * np.sqrt(share * (1 - share) / 1000)
    assert rows[0]["noise"] == pytest.approx(np.hypot(ours, 1.96 * np.sqrt(0.95 * 0.05 / 3179)) + 0.005, rel=0.25)
