"""Weighted metrics are those of repeated images, and intervals hold the truth as often as they say."""

from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, strategies as st

from cxr_dist.evaluation import bootstrap
from cxr_dist.evaluation.metrics import evaluate_predictions
from cxr_dist.evaluation.predictions import Predictions
from tests.evaluation.test_metrics import make_predictions

NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def drawn(seed: int, groups: int, sizes: tuple[float, float, float] = (1, 0, 0), sharpness: float = 3.6) -> Predictions:
    """Groups of 1, 2 or 5 images that share their label and much of their noise, from a known distribution."""
    random = np.random.default_rng(seed)
    of_group = np.repeat(np.arange(groups), random.choice([1, 2, 5], groups, p=sizes))
    labels = random.choice(4, groups, p=(0.25, 0.3, 0.25, 0.2))[of_group]
    logits = 1.2 * random.normal(size=(groups, 4))[of_group] + 0.7 * random.normal(size=(len(labels), 4))
    logits[np.arange(len(labels)), labels] += sharpness
    odds = np.exp(1.3 * logits)
    names = [str(number) for number in of_group]
    paths = [str(number) for number in range(len(labels))]
    return Predictions(paths, labels, odds / odds.sum(axis=1, keepdims=True), NAMES, names)


@given(
    classes=st.integers(2, 5),
    images=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    absent=st.integers(0, 2),
    coarse=st.booleans(),
)
def test_a_weight_repeats_an_image(classes: int, images: int, seed: int, absent: int, coarse: bool) -> None:
    predictions = make_predictions(classes, images, seed, absent=min(absent, classes - 1), coarse=coarse)
    times = np.random.default_rng(seed).integers(0, 4, images)
    times[0] += 1
    rows = np.repeat(np.arange(images), times)
    repeated = Predictions(
        [str(number) for number in range(len(rows))],
        predictions.labels[rows],
        predictions.probabilities[rows],
        predictions.class_names,
    )
    values = bootstrap.weighted_metrics(predictions, np.stack([times, np.ones(images)]).astype(float))
    for row, expected in enumerate((evaluate_predictions(repeated), evaluate_predictions(predictions))):
        numbers = leaves({key: value for key, value in expected.items() if key != "confusion_matrix"})
        for name, column in values.items():
            value = numbers[name]
            if value is None:
                assert np.isnan(column[row]), name
            else:
                assert column[row] == pytest.approx(value, abs=1e-9), name


def test_weighted_metrics_equal_those_of_scikit_learn() -> None:
    predictions = make_predictions(4, 200, 5, coarse=True)
    weights = np.random.default_rng(0).random(200)
    values = bootstrap.weighted_metrics(predictions, weights[None])
    labels, predicted = predictions.labels, predictions.predicted
    assert values["accuracy"][0] == pytest.approx(sk.accuracy_score(labels, predicted, sample_weight=weights))
    expected = sk.f1_score(labels, predicted, average="macro", sample_weight=weights)
    assert values["f1_macro"][0] == pytest.approx(expected)
    for index, name in enumerate(predictions.class_names):
        member, score = labels == index, predictions.probabilities[:, index]
        expected = sk.roc_auc_score(member, score, sample_weight=weights)
        assert values[f"per_class.{name}.auc"][0] == pytest.approx(expected)
        expected = sk.average_precision_score(member, score, sample_weight=weights)
        assert values[f"per_class.{name}.average_precision"][0] == pytest.approx(expected)


def test_resamples_draw_groups_as_a_whole_and_repeat() -> None:
    groups = bootstrap.group_numbers(drawn(0, 40, (0.5, 0.3, 0.2)))
    first, again, other = (np.concatenate(list(bootstrap.resample_weights(groups, 300, seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    for number in range(40):
        assert (np.ptp(first[:, groups == number], axis=1) == 0).all()
    one_each = first[:, np.unique(groups, return_index=True)[1]]
    assert (one_each.sum(axis=1) == 40).all()
    # A group's count is binomial (40, 1/40): its mean is one and its variance 39/40.
    assert one_each.mean() == pytest.approx(1)
    assert one_each.var() == pytest.approx(39 / 40, rel=0.1)


# Of 250 intervals of 95 %, fewer than 91 % or more than 98.8 % hold with a probability of 0.3 % each; of 60, fewer than
# 86 % do. Over all metrics, the mean has to be right.
@pytest.mark.parametrize(
    ("repeats", "least", "most", "tolerance"),
    [(60, 0.86, 1.0, 0.05), pytest.param(250, 0.91, 0.988, 0.02, marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize(("groups", "sizes"), [(640, (1, 0, 0)), (450, (0.6, 0.3, 0.1))])
def test_an_interval_of_95_percent_holds_the_truth_that_often(
    groups: int, sizes: tuple[float, float, float], repeats: int, least: float, most: float, tolerance: float
) -> None:
    many = drawn(99, 200_000, sizes)
    truth = bootstrap.weighted_metrics(many, np.ones((1, len(many))))
    names = ("accuracy", "f1_macro", "recall_macro", "precision_macro", "auc_macro_ovr", "log_loss", "brier")
    held = dict.fromkeys(names, 0)
    for seed in range(repeats):
        found = bootstrap.bootstrap(drawn(seed, groups, sizes), resamples=250, seed=seed)["intervals"]
        for name in names:
            held[name] += found[name][0] <= truth[name][0] <= found[name][1]
    for name, count in held.items():
        assert least <= count / repeats <= most, (name, count / repeats)
    assert np.mean(list(held.values())) / repeats == pytest.approx(0.95, abs=tolerance)


def test_copies_do_not_narrow_an_interval() -> None:
    single = drawn(3, 200)
    rows = np.repeat(np.arange(200), 4)
    copies = Predictions(
        [str(number) for number in range(800)],
        single.labels[rows],
        single.probabilities[rows],
        NAMES,
        [str(row) for row in rows],
    )
    widths = []
    for predictions in (single, copies, Predictions(copies.paths, copies.labels, copies.probabilities, NAMES)):
        low, high = bootstrap.bootstrap(predictions)["intervals"]["accuracy"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.1)


def test_a_perfect_class_is_not_known_to_be_perfect() -> None:
    labels = np.arange(120) % 4
    predictions = Predictions([str(row) for row in range(120)], labels, np.eye(4)[labels], NAMES)
    found = bootstrap.bootstrap(predictions)["intervals"]
    # Clopper and Pearson for 30 of 30: 0.025 ** (1 / 30) to one.
    assert found["per_class"]["COVID"]["recall"] == pytest.approx([0.025 ** (1 / 30), 1])
    assert found["accuracy"] == pytest.approx([0.025 ** (1 / 120), 1])
    low, high = found["recall_macro"]
    assert 0.9 < low < 0.99
    assert high == 1


def test_what_is_undefined_has_no_interval() -> None:
    found = bootstrap.bootstrap(make_predictions(4, 50, 1, absent=1))["intervals"]
    assert found["per_class"]["Class_0"]["auc"] == [None, None]
    assert None not in found["accuracy"]
    one = bootstrap.bootstrap(make_predictions(3, 1, 1))
    assert all(value == [None, None] for value in leaves(one["intervals"]).values())


def test_a_class_without_images_changes_no_interval() -> None:
    """As if there were three classes: also for classes that are right as a whole, whose unseen variance counts."""
    three = make_predictions(3, 120, 4)
    right = np.eye(3)[three.labels] * 0.4 + 0.2
    chosen = np.where((three.labels == 0)[:, None], right, three.probabilities)
    three = Predictions(three.paths, three.labels, chosen, three.class_names)
    padded = np.hstack([chosen, np.zeros((len(chosen), 1))])
    four = Predictions(three.paths, three.labels, padded, (*three.class_names, "Other"))
    expected, result = (leaves(bootstrap.bootstrap(each)["intervals"]) for each in (three, four))
    for name, ends in expected.items():
        assert result[name] == pytest.approx(ends), name
    for key in ("precision", "recall", "f1", "auc", "average_precision"):
        assert result[f"per_class.Other.{key}"] == [None, None]
