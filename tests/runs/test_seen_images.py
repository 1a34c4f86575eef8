"""Images that a run has seen are found in any folder and any dataset, counted, and left out of figures of their own."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk

from cxr_dist.cli import main
from cxr_dist.evaluation import bootstrap
from cxr_dist.evaluation.evaluate import evaluate_run, predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.predictions import read_predictions
from cxr_dist.runs import run_folder
from cxr_dist.runs.seen_images import SEEN, digests_of, read_seen
from tests.html_page import Page
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("small_network", "figures_not_drawn")


ASKED_FOR = {
    "training": 56, "validation": 0, "share": 1.0, "asked_for": True, "kinds": {}, "not_compared": None,
}  # fmt: skip


def seen_files(training: int, validation: int, share: float) -> dict[str, Any]:
    """What metrics.json says of images of which so many files are identical to the run's, and no other is alike."""
    return {
        "training": training,
        "validation": validation,
        "share": share,
        "asked_for": False,
        "kinds": {"identical": training + validation, "near-duplicate": 0, "patient": 0},
        "not_compared": None,
    }


def splits_of(dataset: Path) -> dict[str, str | None]:
    """By the SHA-256 of the file."""
    return {row.sha256 or "": row.split for row in read_manifest(dataset).rows}


@pytest.fixture(scope="module")
def rebuilt(phantom_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, dealt to the splits by another seed."""
    folder = tmp_path_factory.mktemp("rebuilt") / "dataset"
    build_dataset(phantom_source, folder, BuildOptions(image_size=32, workers=1, seed=1))
    return folder


def test_a_run_keeps_what_it_has_seen(finished_run: Path, dataset: Path) -> None:
    seen, splits = read_seen(finished_run), splits_of(dataset)
    assert seen is not None
    for digests, split in ((seen.training, "train"), (seen.validation, "validation")):
        expected = sorted(
            int.from_bytes(bytes.fromhex(sha256)[:8], "big") for sha256, of in splits.items() if of == split
        )
        assert digests.tolist() == expected
    for digest, split in zip(digests_of(splits), splits.values(), strict=True):
        training, validation = seen.mark(np.array([digest]))
        assert (training[0], validation[0]) == (split == "train", split == "validation")
    assert (finished_run / SEEN).stat().st_size < 11 * 68 + 700


def test_a_damaged_list_is_an_error_and_a_missing_one_is_said(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    content = (run / SEEN).read_bytes()
    for place in range(0, len(content), 97):
        (run / SEEN).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=rf"{SEEN}: damaged"):
            read_seen(run)
    (run / SEEN).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{SEEN}: damaged"):
        read_seen(run)
    (run / SEEN).unlink()
    main.main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--examine", "0"])
    assert "note: Whether the model was trained on any of these images is unknown" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["seen"] is None


def test_a_rebuilt_dataset(
    finished_run: Path, dataset: Path, rebuilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of unseen images are those that scikit-learn computes from the predictions of these alone."""
    out = tmp_path / "out"
    main.main(["evaluate", str(finished_run), "--out", str(out), "--dataset", str(rebuilt), "--examine", "0"])
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    of_file = splits_of(dataset)
    split_of = {row.path: of_file[row.sha256 or ""] for row in read_manifest(rebuilt).rows}
    predictions = read_predictions(out / "predictions.parquet")
    before = [split_of[path] for path in predictions.paths]
    assert metrics["seen"]["training"] == before.count("train") > 0
    assert metrics["seen"]["validation"] == before.count("validation")
    assert metrics["seen"]["share"] == (before.count("train") + before.count("validation")) / 12
    assert metrics["published"] == []
    unseen, kept = metrics["metrics_unseen"], np.array([split == "test" for split in before])
    assert unseen["n"] == kept.sum() > 0
    labels, predicted = predictions.labels[kept], predictions.predicted[kept]
    assert unseen["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    f1 = sk.f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    assert unseen["f1_macro"] == pytest.approx(f1)
    expected = json.loads(json.dumps(bootstrap.bootstrap(predictions.subset(kept))))
    assert unseen["uncertainty"] == expected
    warning = next(line for line in printed.splitlines() if line.startswith("WARNING: "))
    assert f"{before.count('train')} match its training images" in warning
    assert f"{metrics['seen']['share']:.1%}" in warning
    assert f"On the other {kept.sum()} image" in warning
    assert f"accuracy {unseen['accuracy']:.3f}" in warning
    text = Page((out / "report.html").read_text()).text
    assert text.index("The model has seen images of this evaluation") < text.index("Accuracy")


def test_folders_of_images(finished_run: Path, phantom_source: Path, dataset: Path, tmp_path: Path) -> None:
    splits = splits_of(dataset)
    everything = evaluate_run(EvaluationSpec(finished_run, tmp_path / "out", images=phantom_source))
    assert everything["seen"] == seen_files(56, 12, 0.85)
    assert everything["metrics_unseen"]["n"] == 12
    # The same files as the test split, so the same figures.
    test = evaluate_run(EvaluationSpec(finished_run, tmp_path / "test"))
    assert test["seen"] == seen_files(0, 0, 0.0)
    assert test["metrics_unseen"] is None
    for key in ("accuracy", "f1_macro", "auc_macro_ovr", "confusion_matrix"):
        assert everything["metrics_unseen"][key] == (
            test[key] if key == "confusion_matrix" else pytest.approx(test[key])
        )
    # Copies under other names, of training images alone: a warning, and no other figures.
    copies = tmp_path / "copies"
    for number, path in enumerate(sorted(phantom_source.glob("*/images/*.png"))):
        if splits[hashlib.sha256(path.read_bytes()).hexdigest()] == "train":
            (copies / path.parts[-3]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copies / path.parts[-3] / f"copy-{number}.png")
    metrics = evaluate_run(EvaluationSpec(finished_run, tmp_path / "copied", images=copies))
    assert metrics["seen"] == seen_files(56, 0, 1.0)
    assert metrics["metrics_unseen"] is None
    assert "There are no other images" in (tmp_path / "copied" / "report.html").read_text()


@pytest.mark.parametrize("given", [False, True])
def test_a_split_that_was_asked_for_is_named_without_an_alarm(
    finished_run: Path, dataset: Path, tmp_path: Path, given: bool
) -> None:
    request = EvaluationSpec(finished_run, tmp_path / "out", "train", dataset=dataset if given else None)
    metrics = evaluate_run(request)
    assert metrics["seen"] == ASKED_FOR
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "These are the model's training images" in text
    assert "Warning." not in text


def test_what_differs_is_named_and_the_mistake_is_not_invited(
    finished_run: Path, rebuilt: Path, dataset: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))

    def trained_on(place: Path) -> None:
        info = json.loads((run / run_folder.RUN).read_text())
        (run / run_folder.RUN).write_text(json.dumps(info | {"dataset": str(place)}))

    trained_on(rebuilt)
    with pytest.raises(UserError, match=r"not the dataset that the run was trained on \(seed 1, not 0\)") as error:
        predict_run(EvaluationSpec(run, tmp_path / "out"))
    assert "give the dataset with --dataset" not in str(error.value)
    trained_on(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"was trained on {tmp_path}/gone, which does not exist; .*--dataset"):
        predict_run(EvaluationSpec(run, tmp_path / "out"))
    assert len(predict_run(EvaluationSpec(run, tmp_path / "out", dataset=dataset))) == 12
