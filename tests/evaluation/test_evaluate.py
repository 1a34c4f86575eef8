"""Every image counts once, on any number of devices, from shards or from a folder."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.cli import main
from cxr_dist.config.loading import load_config
from cxr_dist.data import pipeline
from cxr_dist.data.batch_sampler import EvaluationBatchSampler
from cxr_dist.data.image_folder import FolderSource
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.evaluation import calibration, evaluated_images
from cxr_dist.evaluation.evaluate import calibrate_run, class_probabilities, evaluate_run, predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.predictions import read_predictions
from cxr_dist.model import forward, resnet
from cxr_dist.training import train_step
from tests.small_training import CLASSES, SIZE, config, images, local_topology, small_base
from tfrecords_builder import remote
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place
from tfrecords_builder.format.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("small_network", "figures_not_drawn")


def test_101_images_on_1_2_and_3_replicas() -> None:
    import keras

    source = images(101)
    confusions, outputs = [], []
    for replicas in (1, 2, 3):
        strategy = make_strategy(local_topology(replicas))
        keras.utils.set_random_seed(0)
        with strategy.scope():
            network = resnet.build_model(CLASSES, SIZE, config(), "float32", small_base)
        plan = EvaluationBatchSampler(source.count, 16, replicas)
        iterator = pipeline.distributed_batches(strategy, local_topology(replicas), source, plan)
        confusion, _ = train_step.make_evaluation_step(strategy, network, CLASSES, xla=False)(iterator, plan.steps)
        confusions.append(confusion)
        step = forward.make_forward_step(strategy, network, xla=False)
        outputs.append(class_probabilities(strategy, local_topology(replicas), source, 16, step))
    assert confusions[0].sum() == 101
    assert confusions[0].sum(axis=1).tolist() == np.bincount(source.labels).tolist()
    for confusion, probabilities in zip(confusions[1:], outputs[1:], strict=True):
        np.testing.assert_array_equal(confusion, confusions[0])
        np.testing.assert_allclose(probabilities, outputs[0], atol=1e-5)
    assert outputs[0].shape == (101, CLASSES)


def test_a_folder_of_other_images(finished_run: Path, phantom_source: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(EvaluationSpec(finished_run, tmp_path / "out", images=phantom_source))
    assert metrics["n"] == 80
    assert metrics["published"] == [], "these are not the test images of anything"
    predictions = read_predictions(tmp_path / "out" / "predictions.parquet")
    assert sorted(predictions.paths) == sorted(
        str(path.relative_to(phantom_source)) for path in phantom_source.glob("*/images/*.png")
    )
    assert all(
        predictions.class_names[label] == path.split("/")[0].replace(" ", "_")
        for path, label in zip(predictions.paths, predictions.labels, strict=True)
    )


def test_the_test_split(finished_run: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(EvaluationSpec(finished_run, tmp_path / "out"))
    assert metrics["n"] == 12
    assert metrics["published"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    with pytest.raises(UserError, match="other files than an evaluation"):
        evaluate_run(EvaluationSpec(finished_run, finished_run))


def test_model_keras_alone_gives_the_same_predictions(finished_run: Path, phantom_source: Path, tmp_path: Path) -> None:
    """A user who loads model.keras with Keras gets what our evaluation got."""
    import keras

    evaluate_run(EvaluationSpec(finished_run, tmp_path / "out", images=phantom_source))
    predictions = read_predictions(tmp_path / "out" / "predictions.parquet")
    loaded = keras.models.load_model(finished_run / "model.keras", safe_mode=True)
    source = FolderSource(phantom_source, predictions.class_names, 32)
    pixels = source._read(np.arange(8)).astype("float32")
    logits = np.asarray(loaded(pixels, training=False))
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, predictions.probabilities[:8], atol=1e-4)


def test_what_cannot_be_evaluated(finished_run: Path, phantom_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        evaluate_run(EvaluationSpec(tmp_path / "missing", tmp_path / "out"))
    (tmp_path / "other" / "Fracture").mkdir(parents=True)
    (tmp_path / "other" / "Fracture" / "1.png").write_bytes(next(phantom_source.glob("*/images/*.png")).read_bytes())
    with pytest.raises(UserError, match="Fracture"):
        evaluate_run(EvaluationSpec(finished_run, tmp_path / "out", images=tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    assert load_config(finished_run / "config.yaml").model.image_size == 32


def test_calibrate_fits_on_validation_and_evaluate_takes_what_is_kept(finished_run: Path, tmp_path: Path) -> None:
    run, out = Path(shutil.copytree(finished_run, tmp_path / "run")), tmp_path / "out"
    fitted = calibrate_run(run)
    assert json.loads((run / "calibration.json").read_text()) == fitted
    assert fitted == calibration.fit(predict_run(EvaluationSpec(run, out, "validation")))
    assert fitted["selected_the_model"]
    metrics = evaluate_run(EvaluationSpec(run, out))
    assert {key: metrics["calibration"][key] for key in fitted} == fitted
    assert metrics["calibration"]["kept_with_run"]
    assert metrics["calibration"]["in_sample"] == 0
    assert metrics["calibration_note"] is None
    # Another risk is for one report alone.
    other = evaluate_run(EvaluationSpec(run, out, risk=0.5))
    assert other["calibration"]["target_risk"] == 0.5
    assert not other["calibration"]["kept_with_run"]
    assert "for this report only" in other["calibration_note"]
    assert json.loads((run / "calibration.json").read_text()) == fitted
    assert calibrate_run(run, risk=0.5)["target_risk"] == 0.5
    assert evaluate_run(EvaluationSpec(run, out))["calibration"]["target_risk"] == 0.5, "the run's own is the default"
    (run / "calibration.json").write_text('{"temperature": -1}')
    with pytest.raises(UserError, match=r"calibration\.json: damaged \(temperature -1"):
        evaluate_run(EvaluationSpec(run, out))
    assert calibrate_run(run) == fitted, "a damaged one is replaced"


def test_calibration_on_the_images_that_it_was_fitted_on_says_so(finished_run: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(EvaluationSpec(finished_run, tmp_path / "out", "validation"))
    assert metrics["calibration"]["in_sample"] == metrics["n"] == 12
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fitted on 12 of these images, so these results are optimistic" in page
    assert "the model&#39;s validation images, which selected its best epoch" in page


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize("calibrated", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_no_command_that_reads_a_run_changes_it(
    finished_run: Path, phantom_source: Path, tmp_path: Path, calibrated: bool
) -> None:
    """Not a byte, a name or a time, and so in a folder that cannot be written too."""
    run, out = Path(shutil.copytree(finished_run, tmp_path / "run")), tmp_path / "out"
    if calibrated:
        calibrate_run(run)
    for path in [*run.rglob("*"), run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(run)
    try:
        main.main(["evaluate", str(run), "--out", str(out), "--risk", "0.3", "--examine", "8"])
        main.main(["evaluate", str(run), "--out", str(out), "--images", str(phantom_source), "--examine", "0"])
        main.main(["compare", str(run), str(run)])
        main.main(["predict", str(run), str(phantom_source / "COVID")])
        assert state(run) == before
    finally:
        for path in [run, *run.rglob("*")]:
            path.chmod(0o755)


def test_without_the_dataset_there_is_no_calibration_and_the_report_says_so(
    finished_run: Path, phantom_source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"dataset": str(tmp_path / "gone")}))
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", images=phantom_source))
    assert metrics["calibration"] is None
    assert "validation images are not available" in (tmp_path / "out" / "report.html").read_text()


def run_naming(finished_run: Path, place: object, folder: Path) -> Path:
    """A copy of the run that says it was trained on `place`."""
    shutil.copytree(finished_run, folder)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"dataset": str(place)}))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """The datasets that an evaluation has opened."""
    places: list[object] = []

    def recorded(place: Place) -> AbstractContextManager[Path]:
        places.append(place)
        return remote.local_copy(place)

    monkeypatch.setattr(evaluated_images, "local_copy", recorded)
    monkeypatch.setenv(remote.STAGE_VARIABLE, str(tmp_path / "stage"))
    return places


def test_a_given_dataset_calibrates_in_place_of_the_one_that_the_run_names(
    finished_run: Path, dataset: Path, phantom_source: Path, tmp_path: Path, opened: list[object]
) -> None:
    run = run_naming(finished_run, tmp_path / "gone", tmp_path / "run")
    expected = calibration.fit(predict_run(EvaluationSpec(finished_run, tmp_path, "validation")))
    opened.clear()
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", dataset=dataset))
    assert {key: metrics["calibration"][key] for key in expected} == expected
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", images=phantom_source, dataset=dataset))
    assert {key: metrics["calibration"][key] for key in expected} == expected
    assert calibrate_run(run, dataset=dataset) == expected
    assert json.loads((run / "calibration.json").read_text()) == expected
    assert set(opened) == {dataset}


def test_another_dataset_calibrates_nothing(
    finished_run: Path, dataset: Path, phantom_source: Path, tmp_path: Path, opened: list[object]
) -> None:
    other = tmp_path / "other"
    build_dataset(phantom_source, other, BuildOptions(image_size=32, workers=1, seed=1))
    run = run_naming(finished_run, dataset, tmp_path / "run")  # it is there, and nobody asked for it
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", dataset=other))
    assert metrics["calibration"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "is not the dataset that the run was trained on (seed 1, not 0)" in page
    known = {"temperature": 2.0, "abstain_threshold": 0.5, "target_risk": 0.3, "fitted_on": "validation", "images": 12}
    (run / "calibration.json").write_text(json.dumps(known))
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", "validation", dataset=other, risk=0.05))
    assert {key: metrics["calibration"][key] for key in known} == known
    assert metrics["published"] == [], "of the validation split"
    assert "the run&#39;s, for a target error rate of 0.3" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((run / "calibration.json").read_text()) == known
    with pytest.raises(UserError, match=r"not the dataset that the run was trained on \(seed 1, not 0\)") as caught:
        calibrate_run(run, dataset=other)
    assert "give the dataset with" not in str(caught.value)
    assert set(opened) == {other}


def test_images_alone_open_no_address_that_the_run_names(
    finished_run: Path, dataset: Path, phantom_source: Path, tmp_path: Path, opened: list[object]
) -> None:
    run = run_naming(finished_run, f"file://{dataset}", tmp_path / "run")
    metrics = evaluate_run(EvaluationSpec(run, tmp_path / "out", images=phantom_source))
    assert metrics["calibration"] is None
    assert opened == []
    assert "give the dataset with --dataset" in (tmp_path / "out" / "report.html").read_text()
    # What the user names may be an address, and so may what they ask to be evaluated by default.
    assert evaluate_run(EvaluationSpec(run, tmp_path / "out"))["calibration"] is not None
    assert set(opened) == {f"file://{dataset}"}
    # A path on this machine is the user's own.
    own = run_naming(finished_run, dataset, tmp_path / "own")
    assert evaluate_run(EvaluationSpec(own, tmp_path / "out", images=phantom_source))["calibration"] is not None


def test_predictions_know_which_images_belong_together(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    rows = {row.path: row.group for row in read_manifest(dataset).rows}
    predictions = predict_run(EvaluationSpec(finished_run, tmp_path))
    assert predictions.groups == [rows[path] for path in predictions.paths]
    evaluate_run(EvaluationSpec(finished_run, tmp_path / "out"))
    assert read_predictions(tmp_path / "out" / "predictions.parquet").groups == predictions.groups
