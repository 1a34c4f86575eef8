"""The evaluation's folder: figures that show what they say, a page that loads nothing and trusts nobody."""

import json
import re
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Drawing
from PIL import Image

from cxr_dist.evaluation import figures, metrics, predictions as predictions_module, report
from cxr_dist.evaluation.assessment import assess
from cxr_dist.evaluation.history import best_epoch_of
from cxr_dist.evaluation.predictions import Predictions, read_predictions
from tests.html_page import Page
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import image_bytes

FOUR = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")
CALIBRATED = {
    "temperature": 1.5,
    "abstain_threshold": 0.6,
    "target_risk": 0.05,
    "fitted_on": "validation",
    "images": 70,
    "selected_the_model": True,
}


def make_predictions(names: tuple[str, ...] = FOUR, images: int = 80, absent: tuple[int, ...] = ()) -> Predictions:
    random = np.random.default_rng(len(names))
    labels = random.choice([index for index in range(len(names)) if index not in absent], size=images)
    logits = random.normal(size=(images, len(names)))
    logits[np.arange(images), labels] += 2.0
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    paths = [f"{names[label]}/images/{row}.png" for row, label in enumerate(labels)]
    return Predictions(paths, labels, probabilities.astype(np.float32), names)


def make_history(stages: str = "1112222") -> list[dict[str, Any]]:
    rows = []
    for index, stage in enumerate(stages):
        accuracy = 0.5 + 0.05 * index
        validation = accuracy if index != len(stages) - 1 else 0.4
        rows.append(
            {
                "stage": int(stage),
                "epoch": index + 1,
                "loss": 1.0 / (index + 1),
                "accuracy": accuracy,
                "val_loss": 1.1 / (index + 1),
                "val_accuracy": validation,
                "learning_rate": 1e-3,
            }
        )
    return rows


def drawing(figure: Figure) -> Drawing:
    assert isinstance(figure.drawing, Drawing)
    return figure.drawing


def texts(figure: Drawing) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Predictions]:
    out = tmp_path_factory.mktemp("evaluation") / "deep" / "out"
    predictions = make_predictions()
    info = {
        "run": "runs/a",
        "split": "test",
        "parameters": 24122500,
        "resumed_from": None,
        "seconds": {"predict": 12.3456},
        "config": {"seed": 12345, "xla": True, "stages": {"2": {"learning_rate": 1e-4, "tags": ["a", "b"]}}},
    }
    return (
        out,
        report.write_evaluation(out, report.Evaluation(predictions, make_history(), info, calibrated=CALIBRATED)),
        predictions,
    )


def test_an_evaluation_is_complete(written: tuple[Path, dict[str, Any], Predictions]) -> None:
    out, result, predictions = written
    assert {entry.name for entry in out.iterdir()} == set(report.FILES)
    content = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    expected = assess(read_predictions(out / "predictions.parquet"), CALIBRATED, comparable=True)
    assert content == result == expected | {"calibration_note": None}
    assert content["n"] == len(predictions)
    for name in (report.CONFUSION, report.ROC, report.HISTORY):
        with Image.open(out / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 500
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_the_page_shows_the_numbers(written: tuple[Path, dict[str, Any], Predictions]) -> None:
    out, result, predictions = written
    page = Page((out / "report.html").read_text())
    assert f"{100 * result['accuracy']:.1f}%" in page.text
    assert f"{result['f1_macro']:.3f}" in page.text
    assert "not for diagnosis" in page.text
    assert "80 test images" in re.sub(r"\s+", " ", page.text)
    for text in ("Lung Opacity", "24,122,500", "12.35", "12345", "stages.2.learning_rate", "0.0001", "true", "a, b"):
        assert text in page.text
    for mistake in report.confident_mistakes(predictions):
        assert mistake["path"] in page.text


@pytest.mark.parametrize("info", [{}, {"split": "train"}, {"split": "validation"}, {"split": "test", "drawn": True}])
@pytest.mark.usefixtures("figures_not_drawn")
def test_the_published_result_is_beside_the_test_split_alone(
    written: tuple[Path, dict[str, Any], Predictions], tmp_path: Path, info: dict[str, Any]
) -> None:
    out, result, predictions = written
    assert [row["metric"] for row in result["published"]] == ["accuracy", "f1_macro"]
    assert "Compared with the published result" in (out / "report.html").read_text()
    other = report.write_evaluation(tmp_path / "other", report.Evaluation(predictions, [], info))
    assert other["published"] == []
    assert "ublished" not in (tmp_path / "other" / "report.html").read_text()
    # The test split of other classes has none either.
    foreign = make_predictions(("A", "B", "C", "D"))
    assert (
        report.write_evaluation(tmp_path / "foreign", report.Evaluation(foreign, [], {"split": "test"}))["published"]
        == []
    )


def test_the_page_loads_nothing(written: tuple[Path, dict[str, Any], Predictions]) -> None:
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    assert "://" not in text
    assert not re.search(r"@import|url\(|<script|<iframe|<object", text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            if (tag, name) != ("a", "href"):  # a link to a file beside the page is followed by people alone
                assert attributes.get(name, "data:").startswith("data:")
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    images = page.all("img")
    assert len(images) == 5
    assert all(len(image["alt"]) > 40 and image["src"].startswith("data:image/svg+xml;base64,") for image in images)


@pytest.mark.usefixtures("figures_not_drawn")
def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    names = (evil, '"><img_src=x_onerror=y>', "$\\frac{$", "{{_7*7_}}")
    predictions = make_predictions(names)
    report.write_evaluation(tmp_path / "out", report.Evaluation(predictions, [], {"run": evil, evil: {evil: [evil]}}))
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text.lower()
    assert page.all("script") == []
    assert not any("onerror" in attributes for attributes in page.all("img"))
    assert evil in page.text
    assert "{{ 7*7 }}" in page.text
    assert read_predictions(tmp_path / "out" / "predictions.parquet").class_names == names


@pytest.mark.usefixtures("figures_not_drawn")
def test_no_history_is_said_and_an_old_plot_does_not_stay(tmp_path: Path) -> None:
    report.write_evaluation(tmp_path, report.Evaluation(make_predictions(), make_history(), {}))
    assert (tmp_path / "history.png").exists()
    report.write_evaluation(tmp_path, report.Evaluation(make_predictions(), [], {}))
    assert not (tmp_path / "history.png").exists()
    assert "no training history" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("figures_not_drawn")
def test_absent_classes_and_one_class_alone_are_reported(tmp_path: Path) -> None:
    for name, absent in (("two", (0, 1)), ("one", (0, 1, 2))):
        report.write_evaluation(tmp_path / name, report.Evaluation(make_predictions(absent=absent), [], {}))
        content = json.loads((tmp_path / name / "metrics.json").read_text())
        assert content["per_class"]["COVID"]["auc"] is content["per_class"]["COVID"]["f1"] is None
        text = Page((tmp_path / name / "report.html").read_text()).text
        assert "There are no images of COVID" in text
        assert "Macro averages are over" in text
    assert content["auc_macro_ovr"] is None


@pytest.mark.usefixtures("figures_not_drawn")
def test_a_class_without_images_is_not_held_against_the_published_result(tmp_path: Path) -> None:
    for absent, rows in (((), 2), ((3,), 0)):
        metrics_ = report.write_evaluation(
            tmp_path / str(rows), report.Evaluation(make_predictions(absent=absent), [], {"split": "test"})
        )
        assert len(metrics_["published"]) == rows


def test_the_bound_of_the_threshold_is_said_not_to_hold(written: tuple[Path, dict[str, Any], Predictions]) -> None:
    out, result, _ = written
    assert result["calibration"]["selected_the_model"]
    assert "also selected the model, so the bound behind the threshold (95% confidence) is optimistic" in (
        Page((out / "report.html").read_text()).text
    )
    independent = figures.risk_coverage(written[2], result["calibration"] | {"selected_the_model": False}).caption
    assert "optimistic" not in independent


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"metrics.json": "{}"}, {"metrics.json": "no"}, {"roc.png": ""}]
)
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        report.write_evaluation(tmp_path, report.Evaluation(make_predictions(), [], {}))
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == content
    with pytest.raises(UserError, match="is a file"):
        report.check_output_folder(tmp_path / next(iter(content)))


@pytest.mark.usefixtures("figures_not_drawn")
def test_metrics_come_last_and_an_interrupted_evaluation_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write_evaluation(tmp_path, report.Evaluation(make_predictions(images=30), make_history(), {}))
    (tmp_path / "own_notes.txt").write_text("mine")
    order = []
    write = predictions_module.write_bytes

    def recorded(path: Path, content: bytes) -> None:
        assert not (tmp_path / "metrics.json").exists(), "the old metrics must not stand beside new files"
        order.append(path.name)
        write(path, content)

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == report.ROC:
            raise KeyboardInterrupt
        write(path, content)

    for module in (predictions_module, report):
        monkeypatch.setattr(module, "write_bytes", recorded)
    report.write_evaluation(
        tmp_path, report.Evaluation(make_predictions(images=40), make_history(), {}, calibrated=CALIBRATED)
    )
    assert order[0] == "predictions.parquet"
    assert order[-1] == "metrics.json"
    assert sorted(order) == sorted(report.FILES)
    assert {entry.name for entry in tmp_path.iterdir()} == {*report.FILES, "own_notes.txt"}

    other = tmp_path / "other"
    for module in (predictions_module, report):
        monkeypatch.setattr(module, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_evaluation(other, report.Evaluation(make_predictions(), make_history(), {}))
    assert not (other / "metrics.json").exists()
    monkeypatch.undo()
    (other / ".roc.png.17.tmp").write_bytes(b"")
    report.write_evaluation(other, report.Evaluation(make_predictions(), make_history(), {}))
    assert (other / "metrics.json").exists()


@pytest.mark.usefixtures("figures_not_drawn")
def test_a_figure_that_fails_leaves_an_earlier_evaluation_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write_evaluation(tmp_path, report.Evaluation(make_predictions(), [], {}))
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def broken(*_: object) -> Drawing:
        raise RuntimeError("no figure")

    monkeypatch.setattr(figures, "_draw_roc", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        report.write_evaluation(tmp_path, report.Evaluation(make_predictions(images=20), [], {}))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        report.metrics_json({"accuracy": float("nan")})


def test_mistakes_are_wrong_ranked_and_limited() -> None:
    predictions = make_predictions(images=300)
    wrong = predictions.labels != predictions.predicted
    found = report.confident_mistakes(predictions, limit=5)
    assert len(found) == 5
    surest = np.sort(predictions.probabilities.max(axis=1)[wrong])[::-1][:5]
    assert [mistake["probability"] for mistake in found] == pytest.approx(surest.tolist())
    for mistake in found:
        row = predictions.paths.index(mistake["path"])
        assert wrong[row]
        assert mistake["true"] == FOUR[predictions.labels[row]]
        assert mistake["predicted"] == FOUR[predictions.predicted[row]]
        assert mistake["true_probability"] == predictions.probabilities[row, predictions.labels[row]]
    perfect = Predictions(["a", "b"], np.array([0, 1]), np.eye(2), ("x", "y"))
    assert report.confident_mistakes(perfect) == []


def test_captions_say_what_the_numbers_say() -> None:
    def confusion(result: dict[str, Any], kind: str) -> str:
        return figures.confusion_matrix(result["confusion_matrix"], result["class_names"], kind).caption

    result = {"confusion_matrix": [[9, 0, 1], [4, 1_000, 2], [0, 0, 5]], "class_names": ["A_a", "B", "C"]}
    caption = confusion(result, "test")
    assert caption == (
        "The predicted class is correct for 1,014 of 1,021 test images (99.3%); "
        "the most frequent error is B predicted as A a (4 of 1,006)."
    )
    result["confusion_matrix"] = [[9, 4, 0], [4, 0, 0], [0, 0, 0]]
    assert "among the most frequent errors is A a predicted as B (4 of 13)" in confusion(result, "")
    result["confusion_matrix"] = np.eye(3, dtype=int).tolist()
    assert confusion(result, "").endswith("no image was misclassified.")
    text = figures.history(make_history()).caption
    assert "3 epochs of stage 1 (head), then 4 epochs of stage 2 (fine-tuning)" in text
    assert "best epoch is 6, with a validation accuracy of 75.0%" in text
    predictions = make_predictions(absent=(0,))
    assert "no curve for COVID, which has no images." in (
        figures.roc(predictions, metrics.evaluate_predictions(predictions)).caption
    )


@pytest.mark.parametrize("size", [2, 4, 12])
def test_confusion_figure_shows_every_count_and_clips_no_name(size: int) -> None:
    counts = np.arange(1000, 1000 + size * size).reshape(size, size)
    counts[0] = 0
    names = [f"Class_{index}_$of$_something_that_has_a_rather_long_name" for index in range(size)]
    figure = drawing(figures.confusion_matrix(counts, names))
    shown = texts(figure)
    assert len(figure.axes) == 1
    for value in counts[1:].ravel():
        assert f"{value:,}" in shown
    assert shown.count("0") == shown.count("–") == size  # noqa: RUF001
    assert f"{100 * counts[1, 0] / counts[1].sum():.1f}%" in shown
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted class", "True class")
    # The renderer's extent of each name lies inside the saved picture, and no two names overlap.
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert all("something" in label.get_text().replace("\n", " ") for label in labels)
        for one, other in pairwise(boxes):
            assert not one.overlaps(other)
    with Image.open(BytesIO(image_bytes(figure, "png"))) as image:
        tight = figure.get_tightbbox()
        assert image.width == pytest.approx((tight.width + 0.2) * 150, abs=3)
        assert image.height == pytest.approx((tight.height + 0.2) * 150, abs=3)


def test_confusion_figure_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        figures.confusion_matrix(np.eye(2), ["a", "b", "c"])


def test_roc_figure_has_a_curve_per_class_the_mean_and_chance() -> None:
    predictions = make_predictions(absent=(1,))
    result = metrics.evaluate_predictions(predictions)
    (axes,) = drawing(figures.roc(predictions, result)).axes
    labels = axes.get_legend_handles_labels()[1]
    for name in ("COVID", "Normal", "Viral_Pneumonia"):
        assert f"{name.replace('_', ' ')} (AUC {result['per_class'][name]['auc']:.3f})" in labels
    assert "Lung Opacity (no images)" in labels
    assert f"macro average (AUC {result['auc_macro_ovr']:.3f})" in labels
    assert any(label.startswith("chance") for label in labels)
    assert len(labels) == 6
    twelve = make_predictions(tuple(f"c{index}" for index in range(12)), images=400)
    (axes,) = drawing(figures.roc(twelve, metrics.evaluate_predictions(twelve))).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 14, "twelve classes, mean and chance look different"


@pytest.mark.parametrize(
    ("stages", "boundaries"), [("1112222", [3.5]), ("222", []), ("12", [1.5]), ("1223", [1.5, 3.5])]
)
def test_history_figure_marks_stage_boundaries_and_the_best_epoch(stages: str, boundaries: list[float]) -> None:
    history = make_history(stages)
    figure = drawing(figures.history(history))
    assert [axes.get_ylabel() for axes in figure.axes] == ["Accuracy", "Loss"]
    best = len(stages) - 1  # the last row of make_history is worse
    for axes, key in zip(figure.axes, ("accuracy", "loss"), strict=True):
        lines = [line for line in axes.get_lines() if line.get_gid() == "stage-boundary"]
        assert [line.get_xdata()[0] for line in lines] == boundaries
        by_label = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_array_equal(by_label["training"].get_xdata(), np.arange(1, len(stages) + 1))
        np.testing.assert_allclose(by_label["training"].get_ydata(), [row[key] for row in history])
        np.testing.assert_allclose(by_label["validation"].get_ydata(), [row[f"val_{key}"] for row in history])
        ring = by_label[f"best (epoch {best})"]
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (best, history[best - 1][f"val_{key}"])
    shown = texts(figure)
    assert ("stage 1: head" in shown) == ("1" in stages)
    assert "stage 2: fine-tuning" in shown
    assert ("stage 3" in shown) == ("3" in stages)


def test_history_figure_with_gaps_and_a_given_best_epoch() -> None:
    history = make_history("112")
    history[0] |= {"val_loss": None, "val_accuracy": None}
    figure = drawing(figures.history(history, best_epoch=3))
    assert any(line.get_label() == "best (epoch 3)" for line in figure.axes[0].get_lines())
    assert best_epoch_of(history) == 2
    for row in history:
        row.pop("val_accuracy", None)
    assert best_epoch_of(history) is None
    assert figures.history(history).content
    assert "no epoch was validated" in figures.history(history).caption
    with pytest.raises(ValueError, match="empty"):
        figures.history([])


def test_best_epoch_breaks_ties_by_loss_then_by_order() -> None:
    rows = [{"val_accuracy": a, "val_loss": b} for a, b in [(0.9, 0.5), (0.9, 0.3), (0.9, 0.3), (0.8, 0.1)]]
    assert best_epoch_of(rows) == 2


def test_a_figure_is_the_same_bytes_each_time() -> None:
    first, second = (figures.history(make_history()) for _ in range(2))
    assert first.content == second.content
    assert first.source == second.source
