"""The command line: help at once, and one line for everything that the user can mend."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cxr_dist import api
from cxr_dist.cli import main, train
from cxr_dist.config.loading import load_config
from cxr_dist.evaluation import evaluate
from cxr_dist.launch.tune import trial_overrides
from cxr_dist.runs import run_folder
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

COMMANDS = (
    "demo",
    "synth",
    "download",
    "build",
    "verify",
    "eda",
    "leaks",
    "train",
    "tune",
    "evaluate",
    "calibrate",
    "compare",
    "predict",
    "export",
    "serve",
    "bench",
    "config",
    "doctor",
    "submit",
    "pipeline",
    "dashboards",
)
TRAIN = ["--launcher", "local", "--config", "smoke"]


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, which finds the packages wherever it runs."""
    root = str(Path(main.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=600)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Command:
    """Runs commands in this process, and looks at how they end."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def succeeds(self, *arguments: object) -> str:
        main.main([str(argument) for argument in arguments])
        return self._capsys.readouterr().out

    def fails(self, *arguments: object) -> str:
        """Its one line on stderr, without `error: `."""
        with pytest.raises(SystemExit) as caught:
            main.main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        assert caught.value.code == 2
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of eight 40-pixel images."""
    rng = np.random.default_rng(0)
    for name in ("COVID", "Normal"):
        folder = tmp_path / "source" / name / "images"
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / f"{name}-{number}.png")
    return tmp_path / "source"


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-60])
    return path


# Help


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([name, "--help"] if name else ["--help"])
    captured = capsys.readouterr()
    assert caught.value.code == 0
    assert captured.err == ""
    assert captured.out.startswith(f"usage: cxr-dist {name or ''}".rstrip())
    for mentioned in COMMANDS if name is None else ():
        # What a long name is for stands on the next line.
        assert re.search(rf"^    {mentioned}\s", captured.out, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"cxr-dist \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_workers_of_a_search_are_those_of_a_trial() -> None:
    assert trial_overrides(["seed=1"], (2, 2), 4) == ["seed=1", "search.workers_per_trial=2", "search.gpus_per_trial=4"]
    assert trial_overrides({"seed": 1}, (2, 2), None) == {"seed": 1, "search.workers_per_trial": 2}


def test_every_command_is_tested_here() -> None:
    parser = main.build_parser()
    actions = [action for action in parser._actions if action.dest == "command"]
    assert set(actions[0].choices or ()) == set(COMMANDS)


SLOW = (
    *("tensorflow", "keras", "ray", "matplotlib", "sklearn", "scipy", "pandas", "numpy", "pyarrow", "PIL"),
    *("pydantic", "yaml", "tqdm", "packaging", "importlib.metadata", "concurrent.futures"),
)


def test_help_starts_without_what_is_slow() -> None:
    """Of any command: each help declares the options of all of them."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from cxr_dist.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        f"slow = set({SLOW}) & (set(sys.modules) - before)\n"
        "print('loaded:', sorted(slow))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "loaded: []"


# Processes of their own


def test_as_a_program(tmp_path: Path) -> None:
    done = python("-m", "cxr_dist", "verify", "missing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing: no such dataset folder")
    assert len(done.stderr.splitlines()) == 1


def test_training_on_nothing_says_one_line_and_makes_nothing(tmp_path: Path) -> None:
    """Through Ray, by default: TensorFlow and Ray are not even started."""
    (tmp_path / "dataset").mkdir()
    done = python("-m", "cxr_dist", "train", "dataset", "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: dataset: holds no manifest.parquet")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


# Options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND", "cxr-dist --help"]),
        (["trian"], ["'trian'", "train", "cxr-dist --help"]),
        (["build", "a", "b", "--imagesize", "64"], ["--imagesize"]),
        (["build", "a"], ["DATASET", "cxr-dist build --help"]),
        (["build", "a", "b", "--image-size", "big"], ["--image-size", "'big'"]),
        (["build", "a", "b", "--encoding", "tiff"], ["--encoding", "'tiff'", "png"]),
        (["build", "a", "b", "--on-error", "ignore"], ["--on-error", "'ignore'", "skip"]),
        (["build", "a", "b", "--workers", "0"], ["--workers", "0: must be", "at least 1"]),
        (["train", "a"], ["--out", "cxr-dist train --help"]),
        (["train", "a", "--out", "b", "--launcher", "slurm"], ["--launcher", "'slurm'", "ray", "local"]),
        (["train", "a", "--out", "b", "--workers", "two"], ["--workers", "two: must be", "at least 1"]),
        (["train", "a", "--out", "b", "--devices-per-worker", "-1"], ["--devices-per-worker"]),
        (["train", "a", "--out", "b", "--workers", "5:2"], ["--workers", "invalid range '5:2'", "MIN:MAX"]),
        (["tune", "a", "--out", "b", "--workers", "1:2"], ["--workers 1:2", "one number"]),
        (["bench"], ["BENCHMARK", "cxr-dist bench --help"]),
        (["bench", "serve"], ["RUN_OR_EXPERIMENT", "cxr-dist bench serve --help"]),
        (["bench", "build", "--trials", "3"], ["unrecognized arguments", "--trials"]),
        (["bench", "scaling", "--workers", "1", "--batch-sizes", "32"], ["a cost model needs several points"]),
        (["evaluate", "a", "--out", "b", "--split", "dev"], ["--split", "'dev'", "validation"]),
        (["evaluate", "a", "--out", "b", "--split", "train", "--images", "c"], ["--images", "--split"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if value else "nothing",
)
def test_mistyped_options(arguments: list[str], words: list[str], command: Command) -> None:
    message = command.fails(*arguments)
    assert all(word in message for word in words), message


def test_verbose_goes_before_and_after_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TF_CPP_MIN_LOG_LEVEL", "ABSL_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    main.main(["--verbose", "config"])
    main.main(["config", "--verbose"])
    assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    main.main(["config"])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"


# Configuration


def test_the_printed_configuration_is_one(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(command.succeeds("config", "--config", "cpu", "--set", "seed=5", "--set", "xla=on"))
    config = load_config(path)
    assert (config.seed, config.xla) == (5, "on")
    assert config.stages == load_config(Path(main.__file__).parents[2] / "tune_configs" / "cpu.yaml").stages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "model.dropot=0.1"], ["model.dropot", "did you mean model.dropout?"]),
        (["--set", "stages.1.learning_rate=fast"], ["stages.1.learning_rate", "'fast'"]),
        (["--set", "seed"], ["--set seed", "key=value"]),
        (["--config", "smoky"], ["--config smoky", "smoke"]),
        (["--config", "own.yaml"], ["own.yaml", "epocs", "did you mean"]),
    ],
)
def test_bad_configuration(
    options: list[str],
    words: list[str],
    command: Command,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("stages: {1: {epocs: 3}}")
    for message in (
        command.fails("train", dataset, "--out", "run", "--launcher", "local", *options),
        command.fails("config", *options),
    ):
        assert all(word in message for word in words), message
    assert not Path("run").exists()


# Folders that are missing, empty, or something else


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_inputs_that_are_not_there(kind: str, command: Command, tmp_path: Path) -> None:
    given, out = tmp_path / "input", tmp_path / "output"
    if kind == "empty":
        given.mkdir()
    elif kind == "file":
        given.write_text("mine")
    for arguments in (
        ["build", given, out],
        ["verify", given],
        ["train", given, "--out", out, *TRAIN],
        ["evaluate", given, "--out", out],
    ):
        assert command.fails(*arguments).startswith(f"{given}: ")
    assert not out.exists()
    if kind == "file":
        assert given.read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "manifest.parquet", "metrics.json"])
def test_outputs_that_hold_something_else(
    name: str, command: Command, source: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    finished = tmp_path / "run"
    run_folder.prepare(finished, load_config(), dataset, read_manifest(dataset))
    (finished / run_folder.RESULT).write_text("{}")
    (finished / run_folder.MODEL).write_bytes(b"")
    for arguments in (
        ["build", source, out, "--workers", 1],
        ["train", dataset, "--out", out, *TRAIN],
        ["evaluate", finished, "--out", out],
        ["demo", "--out", out],
        ["synth", out, "--workers", 1],
    ):
        assert str(out) in command.fails(*arguments)
        assert content(out) == {name: b"mine"}


def test_an_output_that_is_a_file(command: Command, source: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    for path in (out, out / "inside"):
        for arguments in (
            ["build", source, path, "--workers", 1],
            ["train", dataset, "--out", path, *TRAIN],
            ["synth", path, "--workers", 1],
            ["demo", "--out", path],
        ):
            assert str(out) in command.fails(*arguments)
    assert out.read_text() == "mine"


def test_a_resumed_demo_tells_no_total_time(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DEMO_PER_CLASS": 8, "DEMO_SIZE": 32, "DEMO_IMAGE_SIZE": 32}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(api, "train", lambda *_, **__: SimpleNamespace(seconds=1234.0))
    monkeypatch.setattr(train, "print_metrics", lambda _: None)
    for name in ("calibrate_run", "evaluate_run"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: {})
    lines = [command.succeeds("demo", "--out", tmp_path / "demo").splitlines()[-1] for _ in range(2)]
    assert re.search(r"report\.html \(total time \d+ s\)$", lines[0])
    assert re.search(r"report\.html \(this start \d+ s, training over all starts 1234 s\)$", lines[1])


# Images and datasets


def test_a_class_with_too_few_images(command: Command, source: Path, tmp_path: Path) -> None:
    for number in range(6):
        (source / "Normal" / "images" / f"Normal-{number}.png").unlink()
    message = command.fails("build", source, tmp_path / "dataset", "--workers", 1)
    assert "Normal" in message
    assert "2" in message
    assert not (tmp_path / "dataset").exists()


def test_a_truncated_image_is_named_or_skipped(command: Command, source: Path, tmp_path: Path) -> None:
    damaged = truncate(source / "COVID" / "images" / "COVID-3.png")
    out = tmp_path / "dataset"
    options = ["build", source, out, "--workers", 1, "--image-size", 32]
    message = command.fails(*options)
    assert message.startswith(f"{damaged}: ")
    assert "--on-error skip" in message
    assert not out.exists()
    printed = command.succeeds(*options, "--on-error", "skip")
    assert "left out: COVID/images/COVID-3.png: " in printed
    assert "1 file(s) left out" in printed
    assert read_manifest(out).rejected[0][0] == "COVID/images/COVID-3.png"
    assert sum(sum(counts.values()) for counts in read_manifest(out).counts.values()) == 15
    assert "15 records" in command.succeeds("verify", out)
    assert "is already complete" in command.succeeds(*options, "--on-error", "skip")
    assert "rebuilt: seed 0 -> 1" in command.succeeds(*options, "--on-error", "skip", "--seed", 1)


def test_a_dataset_that_fails_its_checksum(command: Command, dataset: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    shard = damaged / read_manifest(damaged).shards[0].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert str(shard) in command.fails("verify", damaged)
    shard.write_bytes(data[:-1])
    for arguments in (["verify", damaged], ["train", damaged, "--out", tmp_path / "run", *TRAIN]):
        assert str(shard) in command.fails(*arguments)
    shard.unlink()
    assert str(shard) in command.fails("train", damaged, "--out", tmp_path / "run", *TRAIN)
    assert not (tmp_path / "run").exists()


# Training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "model.weights=missing.h5"], ["model.weights ", "missing.h5: no such file", "imagenet", "none"]),
        (["--workers", "2"], ["--launcher local", "--workers", "ray"]),
        (["--address", "auto"], ["--launcher local", "--address"]),
        (["--set", "model.image_size=224"], ["model.image_size 224", "32 pixels", "--image-size 224"]),
    ],
)
def test_training_that_cannot_be(
    options: list[str], words: list[str], command: Command, dataset: Path, tmp_path: Path
) -> None:
    message = command.fails("train", dataset, "--out", tmp_path / "run", *TRAIN, *options)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_other_settings_than_the_run_has(command: Command, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    manifest = read_manifest(dataset)
    run_folder.prepare(run, run_folder.resolve_config(load_config(), manifest), dataset, manifest)
    (run / run_folder.CHECKPOINTS).mkdir()
    (run / run_folder.CHECKPOINTS / "epoch-00001.safetensors").write_bytes(b"")
    before = content(run)
    message = command.fails("train", dataset, "--out", run, *TRAIN)
    assert message.startswith(f"{run}: holds a run with ")
    assert content(run) == before


def test_a_finished_run_is_not_trained_again(
    command: Command, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    manifest = read_manifest(dataset)
    config = run_folder.resolve_config(
        load_config(Path(main.__file__).parents[2] / "tune_configs/smoke.yaml"), manifest
    )
    run_folder.prepare(run, config, dataset, manifest)
    result = '{"best": {"val_accuracy": 0.75, "stage": 2, "epoch": 1}, "seconds": {"total": 12.3}}'
    (run / run_folder.RESULT).write_text(result)
    before = content(run)
    main.main(["train", str(dataset), "--out", str(run), *TRAIN])
    captured = capsys.readouterr()
    assert captured.err == f"{run}: is already finished\n"
    assert "validation accuracy 0.7500 (stage 2, epoch 1), 12 s" in captured.out
    assert content(run) == before


# Evaluation


def test_a_run_that_is_not_finished(command: Command, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder.prepare(run, load_config(), dataset, read_manifest(dataset))
    message = command.fails("evaluate", run, "--out", tmp_path / "out")
    assert message.startswith(f"{run}: the run is not finished")
    (run / run_folder.RUN).write_text("{}")
    assert str(run / run_folder.RUN) in command.fails("evaluate", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_and_datasets_that_do_not_match_the_run(
    command: Command, dataset: Path, source: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run_folder.prepare(run, load_config(), dataset, read_manifest(dataset))
    (run / run_folder.RESULT).write_text("{}")
    (run / run_folder.MODEL).write_bytes(b"")
    evaluate = ["evaluate", run, "--out", out]
    assert command.fails(*evaluate, "--images", tmp_path / "none").startswith(f"{tmp_path / 'none'}: ")
    (source / "COVID").rename(source / "Cat")
    message = command.fails(*evaluate, "--images", source)
    assert "class Cat" in message
    assert "COVID" in message
    other = tmp_path / "other"
    command.succeeds("build", source, other, "--workers", 1, "--image-size", 32)
    message = command.fails(*evaluate, "--dataset", other)
    assert message.startswith(f"{other}: ")
    assert "Cat" in message
    moved = tmp_path / "moved"
    run_folder.prepare(moved, load_config(), tmp_path / "gone", read_manifest(dataset))
    for name in (run_folder.RESULT, run_folder.MODEL):
        shutil.copy(run / name, moved / name)
    for name in ("evaluate", "calibrate"):
        message = command.fails(name, moved, *(["--out", out] if name == "evaluate" else []))
        assert f"trained on {tmp_path / 'gone'}, which does not exist; give its new location with --dataset" in message
    assert not out.exists()


# What is not the user's to mend


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tfrecords_builder.verify.verify_dataset", broken)
    with pytest.raises(ZeroDivisionError):
        main.main(["verify", str(tmp_path)])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_the_users_to_mend(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number), "run/checkpoints/x.safetensors")

    monkeypatch.setattr("tfrecords_builder.verify.verify_dataset", full)
    assert command.fails("verify", tmp_path).startswith(f"run/checkpoints/x.safetensors: {os.strerror(number)}; ")
    monkeypatch.setattr("tfrecords_builder.verify.verify_dataset", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O")))
    with pytest.raises(OSError, match="I/O"):
        main.main(["verify", str(tmp_path)])


@pytest.mark.usefixtures("small_network", "figures_not_drawn")
def test_compare(
    command: Command,
    finished_run: Path,
    phantom_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.succeeds("evaluate", finished_run, "--out", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    said = command.succeeds("compare", tmp_path / "first", tmp_path / "second")
    assert "accuracy" in said
    assert "0 images are correct in the first only, 0 in the second only" in said
    told = json.loads(command.succeeds("compare", tmp_path / "first", finished_run, "--json"))
    assert told["n"] == 12
    assert told["metrics"]["accuracy"]["difference"] == 0
    command.succeeds("evaluate", finished_run, "--out", tmp_path / "third", "--images", phantom_source)
    assert "the images differ" in command.fails("compare", tmp_path / "first", tmp_path / "third")
    main.main(["compare", str(tmp_path / "third"), str(tmp_path / "third")])
    assert f"warning: {tmp_path / 'third'}: its model has seen 85.0% of these images" in capsys.readouterr().err
    (tmp_path / "first" / "metrics.json").unlink()
    assert "not complete" in command.fails("compare", tmp_path / "first", tmp_path / "second")
    assert "no such folder" in command.fails("compare", tmp_path / "none", tmp_path / "second")
    assert "--risk 2.0" in command.fails("evaluate", finished_run, "--out", tmp_path / "out", "--risk", "2")


def test_notes_of_an_error_are_printed_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        error = UserError("dataset: full; make room")
        error.add_note("dataset/.cxr-build: keeps the images that were decoded")
        raise error

    monkeypatch.setattr(main.dataset, "verify", fail)
    with pytest.raises(SystemExit) as stopped:
        main.main(["verify", "dataset"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "note: dataset/.cxr-build: keeps the images that were decoded",
        "error: dataset: full; make room",
    ]


@pytest.mark.usefixtures("small_network")
def test_compare_refuses_other_images_before_it_predicts(
    command: Command, finished_run: Path, phantom_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(*_arguments: object, **_options: object) -> None:
        pytest.fail("predicted before the images were compared")

    other = tmp_path / "other"
    command.succeeds("build", phantom_source, tmp_path / "rebuilt", "--image-size", 32, "--seed", 1, "--workers", 1)
    shutil.copytree(finished_run, other)
    run_folder.prepare(tmp_path / "prepared", load_config(), tmp_path / "rebuilt", read_manifest(tmp_path / "rebuilt"))
    shutil.copy(tmp_path / "prepared" / run_folder.RUN, other / run_folder.RUN)
    monkeypatch.setattr("cxr_dist.evaluation.evaluate.LoadedRun.load", predicted)
    assert "the images differ" in command.fails("compare", finished_run, other)
    assert "the images differ" in command.fails("compare", other, finished_run, "--json")


@pytest.mark.usefixtures("small_network", "figures_not_drawn")
def test_calibrate(
    command: Command,
    finished_run: Path,
    phantom_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    image = next(phantom_source.glob("*/images/*.png"))
    main.main(["predict", str(run), str(image)])
    assert f"warning: {run}: is not calibrated" in capsys.readouterr().err
    assert "`cxr-dist calibrate" in command.succeeds("evaluate", run, "--out", tmp_path / "out", "--examine", 0)
    said = command.succeeds("calibrate", run)
    assert "fitted on 12 validation images" in said
    assert "the validation images also selected the model" in said
    assert "replaces" not in said
    assert "replaces an earlier calibration" in command.succeeds("calibrate", run, "--risk", "0.2")
    assert json.loads((run / "calibration.json").read_text())["target_risk"] == 0.2
    main.main(["predict", str(run), str(image)])
    assert "is not calibrated" not in capsys.readouterr().err
    assert "note:" not in command.succeeds("evaluate", run, "--out", tmp_path / "out", "--examine", 0)
    assert "--risk 2.0" in command.fails("calibrate", run, "--risk", "2")


@pytest.mark.usefixtures("small_network")
def test_a_class_without_images_is_said(
    command: Command, finished_run: Path, phantom_source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "three"
    shutil.copytree(phantom_source, folder, ignore=lambda _, names: [name for name in names if "Viral" in name])
    said = command.succeeds("evaluate", finished_run, "--out", tmp_path / "out", "--images", folder, "--examine", 12)
    assert "note: There are no images of Viral Pneumonia." in said
    assert any(line.split()[:4] == ["Viral_Pneumonia", "-", "-", "-"] for line in said.splitlines())
    assert "There are no images of Viral Pneumonia" in (tmp_path / "out" / "report.html").read_text()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["missing_classes"] == ["Viral_Pneumonia"]
    rows = [row["f1"] for name, row in metrics["per_class"].items() if name != "Viral_Pneumonia"]
    assert metrics["f1_macro"] == pytest.approx(sum(rows) / 3)
