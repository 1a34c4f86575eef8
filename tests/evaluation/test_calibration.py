"""Calibration: the temperature that was planted is found, and the threshold keeps the risk that it promises."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special

from cxr_dist.evaluation import calibration
from cxr_dist.evaluation.metrics import evaluate_predictions
from cxr_dist.evaluation.predictions import Predictions

NAMES = ("A", "B", "C")


def calibrated_predictions(seed: int, images: int, temperature: float, spread: float = 2.5) -> Predictions:
    """Labels drawn from softmax(logits); what is predicted is softmax(logits * temperature)."""
    random = np.random.default_rng(seed)
    logits = spread * random.normal(size=(images, len(NAMES)))
    labels = (special.softmax(logits, axis=1).cumsum(axis=1) < random.random((images, 1))).sum(axis=1)
    paths = [str(row) for row in range(images)]
    return Predictions(paths, labels, special.softmax(logits * temperature, axis=1), NAMES)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_planted_temperature_is_found(temperature: float) -> None:
    predictions = calibrated_predictions(0, 20_000, temperature)
    found = calibration.fit_temperature(predictions)
    assert found == pytest.approx(temperature, rel=0.04)
    scaled = calibration.scaled(predictions, found)
    before, after = evaluate_predictions(predictions), evaluate_predictions(scaled)
    assert after["calibration_error"] < 0.015
    assert after["log_loss"] <= before["log_loss"]
    np.testing.assert_array_equal(scaled.predicted, predictions.predicted)


def test_no_other_temperature_has_a_smaller_loss() -> None:
    predictions = calibrated_predictions(1, 300, 1.7)
    best = evaluate_predictions(calibration.scaled(predictions, calibration.fit_temperature(predictions)))["log_loss"]
    for temperature in np.geomspace(0.05, 20, 60):
        assert best <= evaluate_predictions(calibration.scaled(predictions, temperature))["log_loss"] + 1e-9


def test_probabilities_of_zero_are_taken() -> None:
    predictions = calibrated_predictions(2, 200, 1.0)
    sure = np.eye(3)[predictions.predicted]
    found = calibration.fit_temperature(replace(predictions, probabilities=sure))
    assert found == pytest.approx(20, rel=1e-3)
    assert np.isfinite(calibration.scaled(replace(predictions, probabilities=sure), found).probabilities).all()


@pytest.mark.parametrize("risk", [pytest.param(0.05, marks=pytest.mark.nightly), 0.1])
def test_the_risk_is_kept_as_often_as_promised(risk: float) -> None:
    broken, given = 0, 0
    for seed in range(100):
        threshold = calibration.abstain_threshold(calibrated_predictions(seed, 2000, 1.0, 4), risk)
        if threshold is None:
            continue
        given += 1
        # The true risk among the answers: of calibrated probabilities, what they leave.
        confidence = calibrated_predictions(10_000 + seed, 20_000, 1.0, 4).probabilities.max(axis=1)
        broken += (1 - confidence[confidence >= threshold]).mean() > risk
    assert given > 80
    assert broken <= 0.05 * given


def answers_given(predictions: Predictions, risk: float) -> int:
    """How many of 300 images are answered at the threshold that is found on `predictions`."""
    threshold = calibration.abstain_threshold(predictions, risk)
    return 0 if threshold is None else int((predictions.probabilities[:300].max(axis=1) >= threshold).sum())


@pytest.mark.parametrize("risk", [0.05, 0.1])
def test_copies_add_no_confidence(risk: float) -> None:
    for seed in range(12):
        once = calibrated_predictions(seed, 300, 1.0, 4)
        rows = np.tile(np.arange(300), 10)
        paths = [str(number) for number in range(3000)]
        copies = replace(once, paths=paths, labels=once.labels[rows], probabilities=once.probabilities[rows])
        grouped = replace(copies, groups=[str(row) for row in rows])
        # More rows are looked at in more places: one may lie an image or two beside those of fewer.
        assert answers_given(grouped, risk) <= answers_given(once, risk) + 3
        assert answers_given(copies, risk) >= answers_given(once, risk) + 10


def test_a_group_is_wrong_if_any_answer_to_it_is() -> None:
    labels = np.zeros(2000, np.int64)
    labels[:200:10] = 1  # one image in ten of 20 groups; 200 groups in all
    probabilities = np.tile([0.9, 0.1], (2000, 1))
    predictions = Predictions([str(row) for row in range(2000)], labels, probabilities, ("A", "B"))
    assert calibration.abstain_threshold(predictions, 0.05) == 0.0
    grouped = replace(predictions, groups=[str(row // 10) for row in range(2000)])
    assert calibration.abstain_threshold(grouped, 0.05) is None
    assert calibration.abstain_threshold(grouped, 0.25) == 0.0


def test_thresholds_at_both_ends() -> None:
    predictions = calibrated_predictions(4, 500, 1.0)
    assert calibration.abstain_threshold(predictions, 0.9) == 0.0
    assert calibration.abstain_threshold(predictions, 1e-6) is None
    answers = calibration.coverage_at_threshold(predictions, {"temperature": 1.0, "abstain_threshold": None})
    assert answers == {"predicted": 0, "coverage": 0.0, "accuracy": None}
    everything = calibration.coverage_at_threshold(predictions, {"temperature": 2.0, "abstain_threshold": 0.0})
    assert everything["predicted"] == 500
    assert everything["accuracy"] == evaluate_predictions(predictions)["accuracy"]


def test_risk_and_coverage_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.6, 0.4]])
    predictions = Predictions(list("abcd"), np.array([0, 1, 1, 1]), probabilities, ("A", "B"))
    coverage, risk = calibration.risk_coverage(predictions)
    # b and c are equally sure and are answered alike.
    assert coverage.tolist() == [0.25, 0.75, 1.0]
    assert risk == pytest.approx([0, 1 / 3, 1 / 2])


def test_reliability_counts_every_image_and_gives_the_error() -> None:
    predictions = calibrated_predictions(5, 400, 2.0)
    bins = calibration.reliability(predictions)
    assert sum(row["images"] for row in bins) == 400
    for row in bins:
        assert row["low"] < row["confidence"] <= row["high"]
    error = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / 400
    assert error == pytest.approx(evaluate_predictions(predictions)["calibration_error"])
