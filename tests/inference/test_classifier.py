"""A finished run as a function: what evaluation gives, with temperature and threshold on top."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.evaluation.evaluate import evaluate_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.predictions import read_predictions
from cxr_dist.inference.classifier import Classifier, calibrated, load_classifier
from cxr_dist.model import resnet, split_point
from cxr_dist.runs.calibration_file import CALIBRATION, Calibration, read_calibration
from tests.small_training import CLASSES, SIZE, config, small_base
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decode import load_gray

pytestmark = pytest.mark.usefixtures("small_network")
FITTED = {"temperature": 2.5, "abstain_threshold": 0.4, "target_risk": 0.05, "fitted_on": "validation"}


@pytest.fixture
def plain_run(finished_run: Path, tmp_path: Path) -> Path:
    """Not calibrated: predictions.parquet has what the network itself says."""
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(finished_run, tmp_path / "plain", ignore=ignored))


@pytest.fixture
def calibrated_run(finished_run: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    (run / CALIBRATION).write_text(json.dumps(FITTED))
    return run


def phantoms(source: Path, count: int) -> tuple[list[str], np.ndarray]:
    """Paths below the folder, and uint8 [count, 32, 32]."""
    paths = sorted(source.glob("*/images/*.png"))[:count]
    return [str(path.relative_to(source)) for path in paths], np.stack([load_gray(path, 32) for path in paths])


def unlike(classifier: Classifier, images: np.ndarray) -> list[bool]:
    """Whether each image is unlike the training images, of which there are few."""
    assert classifier.typical is not None
    return [reason is not None for reason in classifier.typical.unlike(images)]


def test_the_same_as_evaluation_at_any_batch_size(plain_run: Path, phantom_source: Path, tmp_path: Path) -> None:
    evaluate_run(EvaluationSpec(plain_run, tmp_path / "out", images=phantom_source))
    predictions = read_predictions(tmp_path / "out" / "predictions.parquet")
    paths, images = phantoms(phantom_source, 80)
    by_path = dict(zip(predictions.paths, predictions.probabilities, strict=True))
    expected = np.array([by_path[path] for path in paths])
    classifier = load_classifier(plain_run)
    assert classifier.class_names == predictions.class_names
    for batch in (80, 33, 1):
        parts = [classifier.probabilities(images[first : first + batch]) for first in range(0, 80, batch)]
        found = np.concatenate(parts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    answers = classifier.predict(images)
    assert [answer.predicted for answer in answers] == [predictions.class_names[top] for top in expected.argmax(axis=1)]
    assert [answer.abstained for answer in answers] == unlike(classifier, images)
    assert sum(unlike(classifier, images)) <= 4


def test_temperature_and_threshold(plain_run: Path, calibrated_run: Path, phantom_source: Path) -> None:
    _, images = phantoms(phantom_source, 80)
    plain, fitted = load_classifier(plain_run), load_classifier(calibrated_run)
    # softmax(logits / T) is proportional to the T-th root of softmax(logits).
    roots = plain.probabilities(images).astype(np.float64) ** (1 / FITTED["temperature"])
    expected = roots / roots.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.probabilities(images), expected, atol=1e-5)
    answers = fitted.predict(images)
    tops = [max(answer.probabilities.values()) for answer in answers]
    strange = unlike(fitted, images)
    assert [answer.abstained for answer in answers] == [
        top < 0.4 or other for top, other in zip(tops, strange, strict=True)
    ]
    assert {
        answer.reason for answer, other in zip(answers, strange, strict=True) if answer.abstained and not other
    } <= {"probability below the threshold"}
    assert fitted.calibration == Calibration(2.5, 0.4)
    threshold = float(np.float32(0.25))
    fitted.calibration = Calibration(1.0, threshold)
    assert not fitted.prediction(np.full(4, 0.25, np.float32)).abstained, "at the threshold it answers"
    assert fitted.prediction(np.array([0.24, 0.24, 0.24, 0.24], np.float32)).abstained


def test_any_batch_is_one_trace() -> None:
    network = split_point.whole_network(resnet.build_model(CLASSES, SIZE, config(), "float32", small_base))
    forward = calibrated(network, SIZE, 1.0)
    for count in (1, 2, 7):
        assert forward(np.zeros((count, SIZE, SIZE), np.uint8)).shape == (count, CLASSES)
    assert forward.experimental_get_tracing_count() == 1


def test_other_images_are_a_defect(finished_run: Path) -> None:
    classifier = load_classifier(finished_run)
    for images in (np.zeros((1, 31, 32), np.uint8), np.zeros((1, 32, 32), np.float32), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match="not uint8"):
            classifier.probabilities(images)


def test_no_calibration(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"abstain_threshold": 1.5}, "abstain_threshold"),
        ({"abstain_threshold": float("nan")}, "abstain_threshold"),
        ({"abstain_threshold": [1]}, "abstain_threshold"),
    ],
)
def test_a_damaged_calibration(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_text(json.dumps(FITTED | change))
    with pytest.raises(UserError, match=f"{CALIBRATION}: .*{words}.*; run `cxr-dist calibrate`"):
        read_calibration(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"temperature": 1}', '{"abstain_threshold": 0.5}'])
def test_a_calibration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(UserError, match=f"^[^\\n]*{CALIBRATION}: [^\\n]*$"):
        read_calibration(tmp_path)
    (tmp_path / CALIBRATION).write_text(json.dumps(FITTED | {"abstain_threshold": None, "temperature": 2}))
    assert read_calibration(tmp_path) == Calibration(2.0, math.inf)


def test_a_run_that_cannot_be_used(finished_run: Path, calibrated_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_classifier(tmp_path / "missing")
    (calibrated_run / CALIBRATION).write_text("{")
    with pytest.raises(UserError, match=CALIBRATION):
        load_classifier(calibrated_run)
    (calibrated_run / CALIBRATION).unlink()
    weights = calibrated_run / "model.keras"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.keras: cannot be loaded"):
        load_classifier(calibrated_run)
    (calibrated_run / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        load_classifier(calibrated_run)
