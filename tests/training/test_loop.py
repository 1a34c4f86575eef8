"""A whole run in this process: what it leaves, that it goes on, and that the cached features change nothing.

On a small residual base; `integration/test_ray.py` runs the commands on ResNet50.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorflow.python.framework import config as tf_config

from cxr_dist.config.loading import load_config
from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import prepare_devices
from cxr_dist.evaluation.evaluate import predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.metrics import evaluate_predictions
from cxr_dist.features.cache import FrozenFeatures
from cxr_dist.inference.classifier import load_model
from cxr_dist.inference.export import export_run
from cxr_dist.launch import train
from cxr_dist.launch.train import run_training
from cxr_dist.runs import checkpoint_file, checkpoints, run_folder, versions
from cxr_dist.runs.events import Event, Reporter, Reporters
from cxr_dist.runs.run_folder import read_finished
from cxr_dist.training import loop, train_step
from cxr_dist.training.steps_per_call import FixedStepsPerCall, StepsPerCall
from tests.conftest import SMALL_RUN, use_small_base
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("small_network")


def history(run: Path) -> list[dict[str, Any]]:
    return run_folder.read_history(run)


def weights_of(run: Path) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in load_model(read_finished(run), "float32").weights]


def small(*changes: str) -> Config:
    return load_config(None, [*SMALL_RUN, *changes])


def test_what_a_run_leaves(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert result["launcher"] == "local"
    assert result["steps_computed"] == 3 * (56 // 8)
    assert [(row["stage"], row["epoch"]) for row in history(finished_run)] == [(1, 1), (1, 2), (2, 1)]
    best = max(history(finished_run), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (result["best"]["stage"], result["best"]["epoch"]) == (best["stage"], best["epoch"])
    assert load_config(finished_run / "config.yaml").stages[2].learning_rate == 1e-4
    assert not list(finished_run.rglob("*.tmp*"))


@pytest.mark.parametrize(("metric", "column"), [("log_loss", "val_loss"), ("f1_macro", "val_f1_macro")])
def test_the_metric_of_the_selection_chooses_the_model(
    dataset: Path, tmp_path: Path, metric: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stages = ("stages.1.epochs=3", "stages.1.learning_rate=3e-2", "stages.2.epochs=0")
    result = run_training(small(f"selection.metric={metric}", *stages), dataset, run, launcher="local")
    rows = history(run)
    sign = -1 if metric == "log_loss" else 1
    best = max(rows, key=lambda row: (sign * row[column], -row["val_loss"]))
    assert [row["selection"] for row in rows] == [sign * row[column] for row in rows]
    assert result["best"] == {
        "stage": best["stage"],
        "epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "val_loss": best["val_loss"],
        "metric": metric,
    }
    predictions = predict_run(EvaluationSpec(run, tmp_path / "out", "validation"))
    assert evaluate_predictions(predictions)["log_loss"] == pytest.approx(best["val_loss"], abs=1e-4)
    assert "warning: the validation split has few images (3 of COVID, " in capsys.readouterr().err


def test_a_finished_run_keeps_its_model_and_no_checkpoint(
    run_with_checkpoints: Path, finished_run: Path, dataset: Path, tmp_path: Path
) -> None:
    """A process that was killed before it had removed them leaves that to the next start."""
    assert list((run_with_checkpoints / run_folder.CHECKPOINTS).iterdir())
    assert not list((finished_run / run_folder.CHECKPOINTS).iterdir())
    run = Path(shutil.copytree(run_with_checkpoints, tmp_path / "run"))
    (run / run_folder.RESULT).rename(tmp_path / "result.json")
    train.remove_checkpoints(run)
    assert list((run / run_folder.CHECKPOINTS).iterdir()), "the run is not finished"
    (tmp_path / "result.json").rename(run / run_folder.RESULT)
    run_training(small(), dataset, run, launcher="local")
    assert not list((run / run_folder.CHECKPOINTS).iterdir())
    assert (run / run_folder.MODEL).read_bytes() == (finished_run / run_folder.MODEL).read_bytes()


def test_checkpoints_hold_what_training_changed(dataset: Path, tmp_path: Path) -> None:
    """And with the base weights' file, which is written once, they hold all."""
    train_here(small("stages.1.epochs=1", "stages.2.unfreeze_layers=3"), dataset, tmp_path / "run", Reporters([]))
    folder = tmp_path / "run" / run_folder.CHECKPOINTS
    (base,) = folder.glob(checkpoints.BASE_PATTERN)
    frozen, _ = checkpoint_file.load_arrays(base)
    position = checkpoints.CheckpointFolder(folder).newest_position()
    assert position is not None
    written, _ = checkpoint_file.load_arrays(folder / position.file_name)
    whole = checkpoints.CheckpointFolder(folder).load(position).arrays
    of_model = {name for name in whole if name.startswith("model/")}
    assert of_model == frozen.keys() | {name for name in written if name.startswith("model/")}
    assert any(name not in written for name in frozen)
    for name in frozen.keys() & written.keys():
        assert frozen[name].tobytes() != written[name].tobytes()
    for name, value in whole.items():
        assert value.tobytes() == (written[name] if name in written else frozen[name]).tobytes()


def test_a_finished_run_is_left_alone(finished_run: Path, dataset: Path) -> None:
    before = (finished_run / "result.json").read_bytes()
    run_training(small(), dataset, finished_run, launcher="local")
    assert (finished_run / "result.json").read_bytes() == before


def test_inputs_that_stay_on_the_device_change_no_byte(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    """Neither cached features, which stage 1 reads, nor the images of stage 2."""
    run = tmp_path / "run"
    run_training(small("input.device_memory_gb=1"), dataset, run, launcher="local")
    for name in ("loss", "val_loss"):
        assert [row[name] for row in history(run)] == [row[name] for row in history(finished_run)]
    for weight, expected in zip(weights_of(run), weights_of(finished_run), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_other_settings_need_another_folder(finished_run: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match=r"seed 0, not 1"):
        run_training(small("seed=1"), dataset, finished_run, launcher="local")


class CopyAfter:
    """Copies a run's folder as it stands after a step or an epoch, as if the process had been killed then."""

    def __init__(self, run: Path, copy: Path, stage: int, epoch: int, step: int | None) -> None:
        self._run, self._copy, self._at = run, copy, (stage, epoch, step)

    def emit(self, event: Event) -> None:
        row = event["row"] | {"step": None} if event["kind"] == "epoch" else event
        if event["kind"] in ("epoch", "progress") and (row["stage"], row["epoch"], row["step"]) == self._at:
            shutil.copytree(self._run, self._copy)


def train_here(config: Config, dataset: Path, run: Path, reporter: Reporter) -> dict[str, Any]:
    manifest = read_manifest(dataset)
    config = run_folder.resolve_config(config, manifest)
    run_folder.prepare(run, config, dataset, manifest)
    return loop.train(config, dataset, manifest, run, prepare_devices(1), reporter, "local")


@pytest.fixture
def determinism_ends() -> Iterator[None]:
    """TensorFlow's switch is one of the process, and it has no public way back."""
    yield
    tf_config.disable_op_determinism()


@dataclass(frozen=True)
class Moment:
    """When a run is stopped, and how it resumes."""

    stage: int
    epoch: int
    step: int | None
    checkpoint: str
    steps_left: int


MOMENTS = [
    Moment(1, 1, 2, "epoch-00000-step-0000002", 33),
    Moment(1, 1, None, "epoch-00001", 28),
    Moment(1, 2, 6, "epoch-00001-step-0000006", 22),
    Moment(1, 2, None, "epoch-00002", 21),
    Moment(2, 2, 4, "epoch-00003-step-0000004", 10),
    Moment(2, 3, None, "epoch-00005", 0),
]
QUICK_MOMENTS = (MOMENTS[4],)
INTERRUPTED = [
    "stages.2.epochs=3",
    "stages.2.optimizer=adam",
    "stages.2.augment=true",
    "stages.2.ema_decay=0.9",
    "deterministic=true",
    "checkpoint.every_steps=2",
    "checkpoint.background=false",
]


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a whole run, a copy of it as it stood at each of the moments, and the run's result."""
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = folder / "whole"
    copies = [
        CopyAfter(whole, folder / moment.checkpoint, moment.stage, moment.epoch, moment.step) for moment in MOMENTS
    ]
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        result = train_here(small(*INTERRUPTED), dataset, whole, Reporters(copies))
    tf_config.disable_op_determinism()
    return folder, result


@pytest.mark.usefixtures("determinism_ends")
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, id=moment.checkpoint, marks=[] if moment in QUICK_MOMENTS else pytest.mark.nightly)
        for moment in MOMENTS
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    dataset: Path, undisturbed: tuple[Path, dict[str, Any]], moment: Moment
) -> None:
    """After any step, in an epoch or between two: the same history, and to the bit the same weights and optimizer."""
    folder, result = undisturbed
    whole, copy = folder / "whole", folder / moment.checkpoint
    resumed = train_here(small(*INTERRUPTED), dataset, copy, Reporters([]))
    assert resumed["resumed_from"] == f"{moment.checkpoint}.safetensors"
    assert resumed["steps_computed"] == moment.steps_left
    assert resumed["best"] == result["best"]
    seconds = resumed["seconds"]
    assert seconds["total"] >= sum(value for phase, value in seconds.items() if phase != "total")
    assert comparable(history(copy)) == comparable(history(whole))
    (arrays, _), (expected, _) = (
        checkpoint_file.load_arrays(run / "checkpoints/epoch-00005.safetensors") for run in (copy, whole)
    )
    assert arrays.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(arrays[key], value, err_msg=key)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a repeated run has in common: all but what clocks say."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


CLOCKS = {"images_per_second", "input_wait", "run_seconds", "seconds"}


@pytest.mark.nightly
def test_a_damaged_newest_checkpoint_is_passed_over(
    run_with_checkpoints: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "remove_checkpoints", lambda _run: None)
    run = tmp_path / "run"
    shutil.copytree(run_with_checkpoints, run)
    for name in ("result.json", "model.keras", "history.jsonl"):
        (run / name).unlink()
    kept = sorted((run / "checkpoints").glob("epoch-*.safetensors"))
    assert [path.name for path in kept][-1] == "epoch-00003.safetensors"
    assert len(kept) == 2
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])
    result = run_training(small(), dataset, run, launcher="local")
    position = checkpoints.Position.of_file(kept[0].name)
    assert position is not None
    assert result["resumed_from"] == position.file_name
    assert result["steps_computed"] == (3 - position.epochs_done) * 7 - position.step > 0
    whole, resumed = history(run_with_checkpoints), history(run)
    assert [(row["stage"], row["epoch"]) for row in resumed] == [(row["stage"], row["epoch"]) for row in whole]
    assert kept[-1].with_suffix(".damaged").stat().st_size == 1000, "it is out of the way, and still there"


def test_a_checkpoint_whose_best_weights_are_damaged_is_passed_over(
    run_with_checkpoints: Path, dataset: Path, tmp_path: Path
) -> None:
    """Nobody could end a run that lost them; the checkpoint before may have others, which are whole."""
    run = Path(shutil.copytree(run_with_checkpoints, tmp_path / "run"))
    folder = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS)
    found = folder.newest(pytest.fail)
    assert found is not None
    later = checkpoints.Position(found.position.epochs_done + 1)
    model = {name: value for name, value in found.arrays.items() if name.startswith("model/")}
    folder.save(later, found.arrays, found.state, 9, model)
    folder.best(9).write_bytes(b"damaged")
    warnings: list[str] = []
    again = folder.newest(warnings.append, set_aside=True)
    assert again is not None
    assert again.position == found.position
    assert len(warnings) == 1
    assert folder.best(9).name in warnings[0]
    assert folder.newest_position() == found.position
    assert folder.newest(pytest.fail) is not None


class Listener:
    """The warnings of a run."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def emit(self, event: Event) -> None:
        if event["kind"] == "warning":
            self.warnings.append(event["text"])


@pytest.mark.nightly
def test_a_run_names_its_versions_and_warns_when_it_is_resumed_under_others(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the next start under the same versions has nothing to say."""
    settings = ["stages.1.epochs=1", "stages.2.epochs=1", "checkpoint.every_steps=2", "checkpoint.background=false"]
    config = small(*settings)
    whole, middle, late = tmp_path / "whole", tmp_path / "middle", tmp_path / "late"
    train_here(config, dataset, whole, CopyAfter(whole, middle, 1, 1, 4))
    (made_with,) = json.loads((whole / run_folder.RUN).read_text())["made_with"]
    assert {"cxr-dist", "python", "numpy", "tensorflow", "keras", "processor", "device"} <= made_with.keys()
    version_of = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: "9.9" if name == "numpy" else version_of(name))
    told, told_later = Listener(), Listener()
    train_here(config, dataset, middle, Reporters([CopyAfter(middle, late, 2, 1, 4), told]))
    (warning,) = told.warnings
    assert f"{middle}: resumed under other versions (numpy {version_of('numpy')} -> 9.9)" in warning
    assert json.loads((middle / run_folder.RUN).read_text())["made_with"] == [made_with, made_with | {"numpy": "9.9"}]
    train_here(config, dataset, late, told_later)
    assert told_later.warnings == []


CHANGES: dict[str, list[Callable[[dict[str, Any], dict[str, Any]], Any]]] = {
    "float32": [
        lambda arrays, state: state.update(unknown=1),
        lambda arrays, state: state["best"].update(unknown=1),
        lambda arrays, state: state.pop("best"),
        lambda arrays, state: state["totals"].pop(),
        lambda arrays, state: arrays.pop("model/head_dense/kernel"),
        lambda arrays, state: arrays.pop("optimizer/2"),
    ],
    "float16": [lambda arrays, state: arrays.pop("loss_scale")],
}


@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.nightly)])
def test_a_state_that_does_not_fit_is_one_line_that_names_the_checkpoint(
    dataset: Path, tmp_path: Path, precision: str
) -> None:
    settings = ["stages.1.epochs=1", "stages.2.epochs=0", "checkpoint.every_steps=2", "checkpoint.background=false"]
    config = small(*settings, f"precision={precision}")
    copy = tmp_path / "copy"
    train_here(config, dataset, tmp_path / "whole", CopyAfter(tmp_path / "whole", copy, 1, 1, 4))
    path = copy / run_folder.CHECKPOINTS / "epoch-00000-step-0000004.safetensors"
    whole = path.read_bytes()
    for change in CHANGES[precision]:
        path.write_bytes(whole)
        arrays, state = checkpoint_file.load_arrays(path)
        change(arrays, state)
        checkpoint_file.save_arrays(path, arrays, state)
        with pytest.raises(UserError, match=r"does not fit this version of cxr-dist .*; use the version") as caught:
            train_here(config, dataset, copy, Reporters([]))
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_a_run_leaves_the_state_of_the_process_as_it_was(dataset: Path, tmp_path: Path) -> None:
    """A program that uses this one as a library goes on with its own random numbers and its own policy."""
    import keras

    before = random.getstate(), np.random.get_state()[1].tolist()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        config = small("stages.1.epochs=1", "stages.2.epochs=0", "precision=bfloat16")
        train_here(config, dataset, tmp_path / "run", Reporters([]))
        load_model(read_finished(tmp_path / "run"), "bfloat16")
        export_run(tmp_path / "run", tmp_path / "export", "savedmodel")
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.nightly
def test_what_was_measured_once_is_not_measured_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached activations are rounded: a run that goes on reads what it read, however busy the machine is by then."""
    config = small("stages.1.epochs=1", "stages.2.epochs=2", "stages.2.unfreeze_layers=3", "checkpoint.every_steps=2")
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    monkeypatch.setattr(FrozenFeatures, "pays", lambda *_: True)
    train_here(config, dataset, whole, CopyAfter(whole, copy, 2, 1, 4))
    monkeypatch.setattr(FrozenFeatures, "pays", lambda *_: pytest.fail("it measures again"))
    resumed = train_here(config, dataset, copy, Reporters([]))
    assert resumed["resumed_from"]
    np.testing.assert_allclose(
        [row["loss"] for row in history(copy)], [row["loss"] for row in history(whole)], atol=1e-4
    )


@pytest.mark.nightly
def test_a_first_stage_does_not_decide_for_another_second_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials share the checkpoint of a first stage, in which it may be decided already what the second reads."""
    settings = ["stages.1.epochs=1", "stages.2.epochs=1", "checkpoint.every_steps=2"]
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    measured: list[str] = []
    monkeypatch.setattr(FrozenFeatures, "pays", lambda _self, _model, split, *_: measured.append(split.name) or True)
    train_here(small(*settings, "stages.2.unfreeze_layers=3"), dataset, whole, CopyAfter(whole, copy, 1, 1, 4))
    of_the_first, other = set(measured), tmp_path / "other"
    manifest, config = read_manifest(dataset), small(*settings, "stages.2.unfreeze_layers=12")
    run_folder.prepare(other, run_folder.resolve_config(config, manifest), dataset, manifest)
    shutil.copytree(copy / run_folder.CHECKPOINTS, other / run_folder.CHECKPOINTS, dirs_exist_ok=True)
    result = train_here(config, dataset, other, Reporters([]))
    assert result["resumed_from"]
    assert len(of_the_first) == 1
    assert len(set(measured)) == 2


@pytest.mark.nightly
def test_nothing_is_measured_where_runs_must_repeat(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, determinism_ends: None
) -> None:
    monkeypatch.setattr(FrozenFeatures, "pays", lambda *_: pytest.fail("a clock decides"))
    config = small("stages.1.epochs=1", "stages.2.epochs=1", "stages.2.unfreeze_layers=3", "deterministic=true")
    train_here(config, dataset, tmp_path / "run", Reporters([]))


@pytest.mark.nightly
def test_two_mirrored_devices_through_the_whole_loop(dataset: Path, tmp_path: Path) -> None:
    """What one device gives, from the features of both splits to the last validation."""
    settings = small("model.synchronize_batch_norm=true", "model.dropout=0", "stages.2.optimizer=sgd")
    results = [
        run_training(settings, dataset, tmp_path / str(devices), launcher="local", devices_per_worker=devices)
        for devices in (1, 2)
    ]
    assert [result["strategy"] for result in results] == ["OneDeviceStrategy", "MirroredStrategy"]
    assert [result["replicas"] for result in results] == [1, 2]
    one, two = (history(tmp_path / str(devices)) for devices in (1, 2))
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], atol=1e-4)


def test_the_calls_of_several_workers_do_not_depend_on_their_clocks() -> None:
    """Collectives inside a loop are known by its iteration: calls of other lengths on another worker would hang."""

    def lengths(seconds: list[float], fixed: int | None) -> list[int]:
        calls = StepsPerCall(fixed)
        found = []
        for each in seconds:
            found.append(calls.count)
            calls.record(calls.count, each)
        return found

    slow, fast = [9.0, 3.0, 5.0, 2.0, 7.0], [0.9, 0.01, 0.02, 0.05, 0.01]
    assert lengths(slow, fixed=8) == lengths(fast, fixed=8) == [1, 1, 8, 8, 8]
    assert lengths(slow, fixed=None) == [1] * 5
    assert lengths(fast, fixed=None)[-1] > 1


def test_calls_without_a_clock_are_short_where_a_step_is_long() -> None:
    """Two workers on two cores take ten seconds for a step of 64 images; a notice leaves 25."""
    assert FixedStepsPerCall.of("CPU", head_alone=False) == (1, 2)
    for kind, head_alone in (("CPU", True), ("GPU", True), ("GPU", False)):
        assert FixedStepsPerCall.of(kind, head_alone=head_alone) == (8, 64)


def test_the_loop_is_traced_once_in_a_stage(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one step, of more and of what is left of an epoch share a trace."""
    made = []
    make = train_step.make_train_step

    def remember(*arguments: Any, **named: Any) -> train_step.TrainStep:
        made.append(make(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(train_step, "make_train_step", remember)
    run_training(small(), dataset, tmp_path / "run", launcher="local")
    assert [step.traces for step in made] == [1, 1]


@pytest.mark.nightly
def test_cached_features_change_no_number(finished_run: Path, dataset: Path, tmp_path: Path) -> None:
    """The curve of stage 1 from features computed once is that from images, within float tolerance."""
    config = small("features.cache=off", "stages.2.epochs=0", "model.dropout=0")
    cached = small("features.cache=on", "stages.2.epochs=0", "model.dropout=0")
    for name, settings in (("images", config), ("features", cached)):
        run_training(settings, dataset, tmp_path / name, launcher="local")
    left, right = history(tmp_path / "images"), history(tmp_path / "features")
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose([row[key] for row in left], [row[key] for row in right], atol=1e-4)


def test_cached_activations_change_no_number(dataset: Path, tmp_path: Path) -> None:
    """Stage 2 from tensors inside the base, kept in half precision, follows stage 2 from images."""
    common = ["model.dropout=0", "stages.1.epochs=1", "stages.2.epochs=3", "stages.2.unfreeze_layers=3"]
    for name, settings in (("images", ["features.cache=off"]), ("cached", ["features.cache_activations=on"])):
        run_training(small(*common, *settings), dataset, tmp_path / name / "run", launcher="local")
    left, right = history(tmp_path / "images" / "run"), history(tmp_path / "cached" / "run")
    assert [row["stage"] for row in left] == [1, 2, 2, 2]
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose([row[key] for row in left], [row[key] for row in right], atol=2e-3)
    assert len(list((tmp_path / "cached" / run_folder.FEATURE_CACHE).glob("*/entry.json"))) == 4
    assert not (tmp_path / "images" / run_folder.FEATURE_CACHE).exists()


def test_a_flipped_bit_ends_the_run_in_words(dataset: Path, tmp_path: Path) -> None:
    broken = tmp_path / "dataset"
    shutil.copytree(dataset, broken)
    shard = max(broken.glob("*train*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        run_training(small("stages.2.epochs=0"), broken, tmp_path / "run", launcher="local")


@pytest.mark.nightly
def test_features_are_those_of_the_base_as_it_stands(dataset: Path, tmp_path: Path) -> None:
    """A stage of the head after one of the base: what an earlier stage kept is of another base."""
    three = ["stages.1.epochs=1", "stages.2.learning_rate=1e-2", "stages.3.learning_rate=1e-3", "stages.3.epochs=1"]
    for name in ("on", "off"):
        config = small(*three, "model.dropout=0", f"features.cache={name}")
        run_training(config, dataset, tmp_path / name, launcher="local")
    left, right = history(tmp_path / "on"), history(tmp_path / "off")
    assert [row["stage"] for row in left] == [1, 2, 3]
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose([row[key] for row in left], [row[key] for row in right], rtol=1e-3)


@pytest.mark.parametrize(
    ("most", "said"),
    [(3, "4 steps had a non-finite loss"), pytest.param(100, "no step was finite", marks=pytest.mark.nightly)],
)
def test_a_run_that_diverges_ends_and_says_where(dataset: Path, tmp_path: Path, most: int, said: str) -> None:
    """A weight that is not finite makes every step so, and none of them may count as a result."""
    run = tmp_path / "run"
    good = train_here(small("stages.2.epochs=0", "checkpoint.every_steps=7"), dataset, run, Reporters([]))
    folder = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS)
    found = folder.newest(pytest.fail)
    assert found is not None
    poisoned = {name: np.full_like(value, np.nan) if "dense" in name else value for name, value in found.arrays.items()}
    broken = tmp_path / "broken"
    config = small("stages.2.epochs=0", "stages.1.epochs=3", f"max_nonfinite_steps={most}", "checkpoint.every_steps=1")
    manifest = read_manifest(dataset)
    run_folder.prepare(broken, run_folder.resolve_config(config, manifest), dataset, manifest)
    shutil.copytree(run / run_folder.CHECKPOINTS, broken / run_folder.CHECKPOINTS)
    # Whichever epoch was the best, its weights are kept.
    checkpoints.CheckpointFolder(broken / run_folder.CHECKPOINTS).save(
        found.position, poisoned, found.state, found.best_epochs_done
    )
    with pytest.raises(UserError, match=rf"diverged: {said}.* in stage 1, epoch 3, by step {min(most + 1, 7)};"):
        train_here(config, dataset, broken, Reporters([]))
    assert run_folder.read_result(broken) is None
    assert good["best"]["epoch"] in (1, 2)
