"""Metrics against scikit-learn, recomputed from the predictions file as a reader would."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from hypothesis import given, strategies as st

from cxr_dist.evaluation import metrics
from cxr_dist.evaluation.predictions import Predictions, is_predictions_file, read_predictions, write_predictions
from tfrecords_builder.common import files
from tfrecords_builder.common.errors import UserError

TOLERANCE = 1e-6


def make_predictions(
    classes: int, images: int, seed: int, *, sharpness: float = 2.0, absent: int = 0, coarse: bool = False
) -> Predictions:
    """Random float32 softmax rows; imbalanced classes, the first `absent` empty; `coarse` makes many ties."""
    random = np.random.default_rng(seed)
    weights = np.where(np.arange(classes) < absent, 0.0, np.arange(1, classes + 1) ** 2)
    labels = random.choice(classes, size=images, p=weights / weights.sum())
    logits = random.normal(size=(images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += sharpness
    if coarse:
        logits = np.round(logits)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert probabilities.dtype == np.float32
    names = tuple(f"Class_{index}" for index in range(classes))
    return Predictions([f"{names[label]}/{row}.png" for row, label in enumerate(labels)], labels, probabilities, names)


def read_columns(path: Path, names: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    table = pq.read_table(path).to_pydict()
    return (
        np.array(table["label"]),
        np.array(table["predicted"]),
        np.stack([table[f"prob_{name}"] for name in names], axis=1),
    )


@given(
    classes=st.integers(2, 12),
    images=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    sharpness=st.sampled_from([0.0, 2.0, 30.0]),
    absent=st.integers(0, 3),
    coarse=st.booleans(),
)
def test_metrics_equal_scikit_learn_on_the_written_file(
    tmp_path_factory: pytest.TempPathFactory,
    classes: int,
    images: int,
    seed: int,
    sharpness: float,
    absent: int,
    coarse: bool,
) -> None:
    predictions = make_predictions(
        classes, images, seed, sharpness=sharpness, absent=min(absent, classes - 1), coarse=coarse
    )
    path = tmp_path_factory.mktemp("predictions") / "predictions.parquet"
    write_predictions(path, predictions)
    result = metrics.evaluate_predictions(predictions)
    labels, predicted, probabilities = read_columns(path, result["class_names"])
    options: dict[str, Any] = {"labels": np.unique(labels), "zero_division": 0}
    expected = {
        "n": images,
        "accuracy": sk.accuracy_score(labels, predicted),
        "precision_macro": sk.precision_score(labels, predicted, average="macro", **options),
        "recall_macro": sk.recall_score(labels, predicted, average="macro", **options),
        "f1_macro": sk.f1_score(labels, predicted, average="macro", **options),
        "f1_weighted": sk.f1_score(labels, predicted, average="weighted", **options),
        "log_loss": sk.log_loss(labels, probabilities, labels=range(classes)),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=TOLERANCE), name
    assert result["confusion_matrix"] == sk.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    # cos(one-hot, p), spelled out: an implementation of its own.
    one_hot = np.eye(classes)[labels]
    norms = np.sqrt((one_hot**2).sum(axis=1)) * np.sqrt((probabilities**2).sum(axis=1))
    cosine = ((one_hot * probabilities).sum(axis=1) / norms).mean()
    assert result["cosine_similarity"] == pytest.approx(cosine, abs=TOLERANCE)
    for index, name in enumerate(result["class_names"]):
        row = result["per_class"][name]
        member = labels == index
        assert row["support"] == member.sum()
        for key, score in (("f1", sk.f1_score), ("recall", sk.recall_score), ("precision", sk.precision_score)):
            value = score(member, predicted == index, zero_division=0)
            assert row[key] == (pytest.approx(value, abs=TOLERANCE) if member.any() else None), key
        if 0 < member.sum() < images:
            assert row["auc"] == pytest.approx(sk.roc_auc_score(member, probabilities[:, index]), abs=TOLERANCE)
        else:
            assert row["auc"] is None
    if len(np.unique(labels)) == classes:
        score = probabilities[:, 1] if classes == 2 else probabilities
        expected_auc = sk.roc_auc_score(labels, score, multi_class="ovr", average="macro")
        assert result["auc_macro_ovr"] == pytest.approx(expected_auc, abs=TOLERANCE)
    counts = metrics.counts_metrics(np.array(result["confusion_matrix"], np.float32))
    assert counts == pytest.approx({name: expected[name] for name in counts}, abs=TOLERANCE)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_absent_classes_have_no_auc_and_the_macro_is_over_the_others() -> None:
    predictions = make_predictions(4, 60, 3, absent=2)
    result = metrics.evaluate_predictions(predictions)
    aucs = [result["per_class"][name]["auc"] for name in predictions.class_names]
    assert aucs[:2] == [None, None]
    assert result["auc_macro_ovr"] == pytest.approx((aucs[2] + aucs[3]) / 2)
    one_class = metrics.evaluate_predictions(make_predictions(4, 9, 3, absent=3))
    assert one_class["auc_macro_ovr"] is None


@pytest.mark.parametrize(
    "missing", [which for count in range(4) for which in itertools.combinations(range(4), count)], ids=str
)
def test_macro_means_are_over_the_classes_that_have_images(missing: tuple[int, ...]) -> None:
    """However the answers name classes that have no images, and whether or not they do."""
    everything = make_predictions(4, 200, 11, sharpness=1.0)
    predictions = everything.subset(~np.isin(everything.labels, missing))
    result = metrics.evaluate_predictions(predictions)
    names, labels, predicted = predictions.class_names, predictions.labels, predictions.predicted
    present = [index for index in range(4) if index not in missing]
    assert (np.isin(predicted, missing).any()) == bool(missing)
    assert result["averaged_classes"] == [names[index] for index in present]
    assert result["missing_classes"] == [names[index] for index in missing]
    options: dict[str, Any] = {"labels": present, "average": "macro", "zero_division": 0}
    for key, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert result[f"{key}_macro"] == pytest.approx(score(labels, predicted, **options))
        assert result[f"{key}_macro"] == pytest.approx(
            np.mean([result["per_class"][names[index]][key] for index in present])
        )
        assert all(result["per_class"][names[index]][key] is None for index in missing)
    counts = metrics.counts_metrics(result["confusion_matrix"])
    assert counts == pytest.approx({name: result[name] for name in counts})


def test_a_class_without_images_costs_nothing() -> None:
    labels = np.repeat([0, 1, 2], 10)
    predictions = Predictions([str(row) for row in range(30)], labels, np.eye(4)[labels], ("a", "b", "c", "d"))
    result = metrics.evaluate_predictions(predictions)
    assert result["f1_macro"] == result["recall_macro"] == result["precision_macro"] == 1.0


def test_cosine_similarity_known_values() -> None:
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.8, 0.2]])
    predictions = Predictions(["a", "b", "c"], np.array([0, 1, 1]), probabilities, ("x", "y"))
    expected = (1 + 1 / math.sqrt(2) + 0.2 / math.sqrt(0.68)) / 3
    assert metrics.evaluate_predictions(predictions)["cosine_similarity"] == pytest.approx(expected, abs=1e-12)


def test_ties_go_to_the_lowest_index() -> None:
    probabilities = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]], np.float32)
    predictions = Predictions(["a", "b"], np.array([0, 1]), probabilities, ("x", "y", "z"))
    assert predictions.predicted.tolist() == [0, 1]
    assert predictions.predicted.dtype == np.int32


def test_the_file_holds_the_documented_columns_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    predictions = make_predictions(3, 200, 5, sharpness=12.0)
    path = tmp_path / "predictions.parquet"
    write_predictions(path, predictions)
    schema = pq.read_schema(path)
    assert schema.names == ["path", "label", "predicted", "prob_Class_0", "prob_Class_1", "prob_Class_2"]
    assert [str(field.type) for field in schema] == ["string", "int32", "int32", "double", "double", "double"]
    again = read_predictions(path)
    assert again.paths == predictions.paths
    assert again.class_names == predictions.class_names
    np.testing.assert_array_equal(again.labels, predictions.labels)
    np.testing.assert_array_equal(again.probabilities, predictions.probabilities)
    assert np.abs(again.probabilities.sum(axis=1) - 1).max() < 1e-12
    assert is_predictions_file(path)


def test_a_file_that_is_not_predictions_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(_written(tmp_path)).select(["path"]).replace_schema_metadata({}), other)
    for path in (broken, other, tmp_path / "missing.parquet"):
        assert not is_predictions_file(path)
        with pytest.raises(UserError, match=path.name) as caught:
            read_predictions(path)
        assert "\n" not in str(caught.value)


def _written(folder: Path) -> Path:
    path = folder / "good.parquet"
    write_predictions(path, make_predictions(3, 5, 0))
    return path


GOOD: dict[str, Any] = {
    "paths": ["a", "b"],
    "labels": np.array([0, 1]),
    "probabilities": np.array([[0.25, 0.75], [1.0, 0.0]], np.float32),
    "class_names": ("x", "y"),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0])}, "labels"),
        ({"labels": np.array([0.0, 1.0])}, "labels"),
        ({"labels": np.array([0, 2])}, "labels"),
        ({"labels": np.array([-1, 0])}, "labels"),
        ({"probabilities": np.ones((2, 3)) / 3}, "probabilities must be"),
        ({"probabilities": np.array([[0.5, np.nan], [1, 0]])}, "finite"),
        ({"probabilities": np.array([[1.5, -0.5], [1, 0]])}, "not negative"),
        ({"probabilities": np.array([[0.5, 0.501], [1, 0]])}, "sum to 1"),
        ({"probabilities": np.array([[3.0, 4.0], [1, 0]])}, "sum to 1"),
        ({"class_names": ("x", "x")}, "class_names"),
        ({"class_names": ("x",)}, "class_names"),
        ({"paths": ["a", "a"]}, "'a' occurs more than once"),
        ({"paths": [], "labels": np.zeros(0, int), "probabilities": np.zeros((0, 2))}, "no predictions"),
    ],
)
def test_predictions_refuse_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    Predictions(**GOOD)
    with pytest.raises(ValueError, match=message):
        Predictions(**GOOD | changes)


@pytest.mark.parametrize("confusion", [np.zeros((2, 2)), np.ones((2, 3)), -np.eye(2), np.full((2, 2), np.nan)])
def test_counts_refuse_what_makes_no_sense(confusion: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="confusion"):
        metrics.counts_metrics(confusion)


@given(classes=st.integers(2, 6), images=st.integers(10, 80), seed=st.integers(0, 2**32 - 1), coarse=st.booleans())
def test_area_below_the_mean_curve_is_the_macro_auc(classes: int, images: int, seed: int, coarse: bool) -> None:
    predictions = make_predictions(classes, images, seed, coarse=coarse)
    curves = metrics.roc_curves(predictions)
    macro = metrics.evaluate_predictions(predictions)["auc_macro_ovr"]
    if macro is None:
        assert not curves
        return
    fpr, tpr = metrics.mean_roc_curve(list(curves.values()))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(tpr) >= -1e-12).all()
    assert sk.auc(fpr, tpr) == pytest.approx(macro, abs=1e-9)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
