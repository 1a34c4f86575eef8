"""The Python interface: its names alone, what importing it changes, and the steps from a folder to a prediction."""

import argparse
import dataclasses
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import cxr_dist
from cxr_dist import api
from cxr_dist.api.steps import BuildKeywords, LaunchKeywords
from cxr_dist.cli import main
from cxr_dist.distributed.devices import prepare_environment
from tests.conftest import SMALL_RUN
from tests.interrupting import ROOT
from tfrecords_builder.build import BuildOptions

NAMES = {
    *("build", "train", "tune", "evaluate", "compare", "load", "load_config", "__version__", "UserError"),
    *("Classifier", "Comparison", "Dataset", "Evaluation", "Run", "Search"),
}
FUNCTIONS = ("build", "train", "tune", "evaluate", "compare", "load", "load_config")
VARIABLES = ("TF_ENABLE_ONEDNN_OPTS", "KERAS_BACKEND")
SETTINGS = {
    key: json.loads(value) if value[0].isdigit() else value for key, _, value in (t.partition("=") for t in SMALL_RUN)
}


def fresh(code: str, **variables: str) -> list[str]:
    """The lines that a process of its own prints, without the variables that we set."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# What it is


def test_the_names() -> None:
    assert set(cxr_dist.__all__) == NAMES
    assert set(dir(cxr_dist)) >= NAMES
    for name in NAMES:
        assert getattr(cxr_dist, name) is not None
    modules = {module.name for module in pkgutil.iter_modules(cxr_dist.__path__)}
    assert not modules & NAMES, "importing such a module would put it in the function's place"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        cxr_dist.trian  # noqa: B018


def test_importing_every_name_changes_nothing() -> None:
    code = (
        "import os, sys, warnings\n"
        "before, filters = dict(os.environ), list(warnings.filters)\n"
        "import cxr_dist\n"
        "print(sorted({'numpy', 'pyarrow', 'tensorflow', 'keras', 'ray'} & set(sys.modules)))\n"
        "for name in cxr_dist.__all__: getattr(cxr_dist, name)\n"
        "print(dict(os.environ) == before, warnings.filters == filters)\n"
        "print(sorted({'tensorflow', 'keras', 'ray', 'matplotlib'} & set(sys.modules)))\n"
    )
    assert fresh(code) == ["[]", "True True", "[]"]


def test_importing_takes_no_time() -> None:
    code = "import time\nt = time.process_time()\nimport cxr_dist\nprint(time.process_time() - t)"
    assert min(float(fresh(code)[0]) for _ in range(3)) < 0.1


def parameters(function: typing.Any) -> Iterator[str]:
    """Its arguments, with those that stand for `**`."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from (BuildKeywords if "Build" in str(parameter.annotation) else LaunchKeywords).__annotations__
        elif parameter.name != "self":
            yield parameter.name


@pytest.mark.parametrize("function", [*(getattr(api, name) for name in FUNCTIONS), api.Classifier.predict])
def test_docstrings_say_arguments_errors_and_return(function: typing.Any) -> None:
    text = inspect.getdoc(function) or ""
    assert all(f"\n{part}:\n" in text for part in ("Args", "Returns", "Raises")), text
    described = text.partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    names = [line.strip().partition(":")[0] for line in described.splitlines() if line[:5].strip() and line[4] != " "]
    assert names == list(parameters(function))


@pytest.mark.parametrize("result", [api.Dataset, api.Run, api.Search, api.Evaluation, api.Comparison])
def test_results_are_frozen(result: typing.Any) -> None:
    assert dataclasses.is_dataclass(result)
    assert result.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("function", "command"),
    [
        (api.build, "build a b"),
        (api.train, "train a --out b"),
        (api.tune, "tune a --out b"),
        (api.evaluate, "evaluate a --out b"),
        (api.compare, "compare a b"),
    ],
)
def test_arguments_are_the_options_of_the_command(function: typing.Any, command: str) -> None:
    options = vars(main.build_parser().parse_args(command.split()))
    only_command = {"verbose", "dry_run", "check_command", "action", "command", "json", "evaluation"}
    assert set(options) - only_command == set(parameters(function)) - {"verbose"}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty and parameter.name != "overrides":
            given = options[parameter.name]
            assert (str(given) if isinstance(given, Path) else given) == parameter.default


def test_defaults_of_build_are_those_of_the_command() -> None:
    options = vars(main.build_parser().parse_args(["build", "a", "b"]))
    fields = {item.name: item.default for item in dataclasses.fields(BuildOptions)}
    assert {name: options[name] for name in fields} == fields
    assert set(BuildKeywords.__annotations__) == {*fields, "launcher", "address", "verbose"}


# The environment of processes


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(api.UserError, match="KERAS_BACKEND jax: only TensorFlow"):
        prepare_environment()


AT_THE_IMPORT = (
    "import os, sys\n"
    "class Finder:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'tensorflow':\n"
    f"            print(*(os.environ.get(name) for name in {VARIABLES}), flush=True)\n"
    "            os._exit(0)\n"
    "sys.meta_path.insert(0, Finder())\n"
)
"""The variables at the moment in which TensorFlow would be imported."""


@pytest.mark.parametrize(
    "code",
    [
        "import cxr_dist\ncxr_dist.train(DATASET, OUT, launcher='local', config='smoke')",
        "from cxr_dist.cli.main import main\n"
        "main(['train', DATASET, '--out', OUT, '--launcher', 'local', '--config', 'smoke'])",
        "from cxr_dist.launch.train import run_training\nfrom cxr_dist.config.loading import load_config\n"
        "from pathlib import Path\n"
        "run_training(load_config(overrides=['model.weights=none']), Path(DATASET), Path(OUT), launcher='local')",
        # Of a trial without Ray, of a Ray worker, of a Serve replica: each begins with this.
        "from cxr_dist.distributed.devices import prepare_devices\nprepare_devices(1)",
    ],
    ids=["api", "command", "launch", "worker"],
)
def test_a_process_that_trains_has_them_before_tensorflow(code: str, dataset: Path, tmp_path: Path) -> None:
    given = f"DATASET, OUT = {str(dataset)!r}, {str(tmp_path / 'run')!r}\n"
    assert fresh(AT_THE_IMPORT + given + code) == ["1 tensorflow"]


def test_processes_of_a_build_have_them(phantom_source: Path, tmp_path: Path) -> None:
    """Also where the script that builds has no `if __name__ == "__main__"`: it runs once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, cxr_dist\n"
        "from tfrecords_builder.common.pool import Pool\n"
        "print('began')\n"
        f"cxr_dist.build({str(phantom_source)!r}, {str(tmp_path / 'dataset')!r}, image_size=32, workers=2)\n"
        "with Pool(2) as pool:\n"
        f"    print(*pool.map(os.getenv, {VARIABLES}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["began", "1 tensorflow", ""], "")


# Configurations


def test_configurations(tmp_path: Path) -> None:
    smoke = cxr_dist.load_config("smoke")
    assert cxr_dist.load_config() == cxr_dist.load_config(None, {})
    path = tmp_path / "own.yaml"
    path.write_text(smoke.to_yaml())
    assert cxr_dist.load_config(path) == cxr_dist.load_config(str(path)) == cxr_dist.load_config(smoke) == smoke
    changed = cxr_dist.load_config(smoke, {"stages.1.epochs": 5, "xla": "off"})
    assert (changed.stages[1].epochs, changed.xla, changed.seed) == (5, "off", smoke.seed)
    assert cxr_dist.load_config("smoke", ["stages.1.epochs=5", "xla='off'"]) == changed
    for wrong, words in (
        ({"model.dropot": 1}, "overrides model.dropot: unknown config key; did you mean model.dropout?"),
        ({"seed": "one"}, "config seed"),
        (["seed"], "--set seed: expected key=value"),
    ):
        with pytest.raises(cxr_dist.UserError, match=words.replace("?", r"\?")):
            cxr_dist.load_config("smoke", wrong)  # type: ignore[arg-type]
    with pytest.raises(cxr_dist.UserError, match="no preset of that name"):
        cxr_dist.load_config("smoky")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d, o: cxr_dist.train(d, o, launcher="slurm"), "--launcher slurm: must be one of ray, local"),
        (lambda d, o: cxr_dist.train(d, o, workers=0), "--workers 0:0: invalid range"),
        (lambda d, o: cxr_dist.train(d, o, workers=(3, 2)), "--workers 3:2: invalid range"),
        (lambda d, o: cxr_dist.train(d, o, devices_per_worker=0), "--devices-per-worker 0: must be"),
        (lambda d, o: cxr_dist.train(d, o, launcher="local", workers=2), "--launcher local: uses one process"),
        (lambda d, o: cxr_dist.tune(d, o, workers=(1, 2)), "--workers 1:2: a trial needs a fixed number"),
        (lambda d, o: cxr_dist.tune(d, o, launcher="local", address="auto"), "--address: needs --launcher ray"),
        (lambda d, o: cxr_dist.tune(d, o, config="smoke"), "no section search"),
        (lambda d, o: cxr_dist.evaluate(d, o, split="test", images=d), "--images: takes the place of --split"),
        (lambda d, o: cxr_dist.evaluate(d, o, examine=-1), "--examine -1: must be"),
        (lambda d, o: cxr_dist.evaluate(d, o, devices=0), "--devices 0: must be"),
        (lambda d, o: cxr_dist.evaluate(d, o, risk=2), "--risk 2: expected an error rate"),
        (lambda d, o: cxr_dist.evaluate(d, o), "is not the folder of a run"),
        (lambda d, o: cxr_dist.compare(o, o), "no such folder"),
        (lambda d, o: cxr_dist.load(d), "is not the folder of a run"),
        (lambda d, o: cxr_dist.build(d, o, encoding="tiff"), "encoding: must be one of raw"),
        (lambda d, o: cxr_dist.build(d, o, address="auto"), "--address: needs --launcher ray"),
    ],
)
def test_errors_are_exceptions(
    call: typing.Any, words: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(cxr_dist.UserError, match=words) as caught:
        call(dataset, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("function", [cxr_dist.build, cxr_dist.train, cxr_dist.tune])
def test_an_unknown_argument_is_a_defect(function: typing.Any, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'worker'"):
        function(dataset, tmp_path / "out", worker=1)


# The steps


class Rows(HTMLParser):
    """The text of a table's cells; no tag that is not ours."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, _attributes: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


@pytest.mark.usefixtures("small_network")
def test_from_a_folder_to_a_prediction(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = cxr_dist.build(phantom_source, tmp_path / "data <set>", image_size=32, workers=1)
    assert (dataset.path, dataset.image_size, len(dataset.class_names)) == (tmp_path / "data <set>", 32, 4)
    assert sum(sum(counts.values()) for counts in dataset.counts.values()) == 80
    settings = SETTINGS | {"stages.1.epochs": 1, "stages.2.epochs": 0}
    run = cxr_dist.train(dataset, tmp_path / "run", overrides=settings, launcher="local")
    assert run.path == tmp_path / "run"
    rows = run.history()
    assert (run.stage, run.epoch, run.validation_accuracy) in [
        (row["stage"], row["epoch"], row["val_accuracy"]) for row in rows
    ]
    texts = [f"{key}={value}" for key, value in settings.items()]
    assert cxr_dist.train(dataset, run, overrides=texts, launcher="local") == run, "it was finished already"
    evaluation = cxr_dist.evaluate(run, tmp_path / "evaluation", examine=0)
    assert evaluation.report.is_file()
    assert (evaluation.images, evaluation.accuracy) == (12, evaluation.metrics["accuracy"])
    comparison = cxr_dist.compare(evaluation, run)
    assert (comparison.images, comparison.metrics["accuracy"]["difference"], comparison.p_value) == (12, 0, 1)
    classifier = cxr_dist.load(run)
    paths = sorted(phantom_source.glob("*/images/*.png"))[:3]
    found = classifier.predict(paths, overlay=tmp_path / "overlays")
    assert [set(prediction.probabilities) for prediction in found] == [set(dataset.class_names)] * 3
    assert sum(found[0].probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    assert classifier.predict(str(paths[0])) == classifier.predict(paths[:1])
    assert len(classifier.predict(phantom_source / "Normal")) == 20
    assert capsys.readouterr().out == ""
    for result in (dataset, run, evaluation, comparison):
        shown = Rows(result._repr_html_())
        assert "table" in shown.tags
        assert not shown.tags - {"table", "caption", "tr", "th", "td", "details", "summary", "iframe", "p"}
    assert f"Dataset {dataset.path}, 32 pixels" in Rows(dataset._repr_html_()).cells


@pytest.mark.usefixtures("small_network")
def test_predictions_for_arrays(finished_run: Path, phantom_source: Path) -> None:
    from tfrecords_builder.images.decode import decode_gray, read_bytes

    classifier = cxr_dist.load(finished_run)
    paths = sorted(phantom_source.glob("*/images/*.png"))[:3]
    images = [decode_gray(read_bytes(path), path).gray for path in paths]
    of_files = classifier.predict(paths)
    for given in (images, np.stack(images)):
        for one, other in zip(classifier.predict(given), of_files, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    for wrong in (images[0], np.zeros((1, 8, 8)), np.zeros((1, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="not uint8"):
            classifier.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(cxr_dist.UserError, match="overlay: is for files"):
        classifier.predict(images, overlay="overlays")
    with pytest.raises(cxr_dist.UserError, match="images: holds both paths and arrays"):
        classifier.predict([*images, "image.png"])
    (missing,) = [paths[0].with_name("none.png")]
    with pytest.raises(cxr_dist.UserError, match=r"none\.png: no such file"):
        classifier.predict(missing)


def test_the_command_line_has_no_way_of_its_own() -> None:
    """Each command that has a function of the same name calls it."""
    commands = {"build": "dataset", "train": "train", "tune": "tune", "evaluate": "evaluate", "compare": "evaluate"}
    for name, module in commands.items():
        source = inspect.getsource(getattr(__import__(f"cxr_dist.cli.{module}", fromlist=[name]), name))
        assert f"api.{name}(" in source
    assert isinstance(main.build_parser(), argparse.ArgumentParser)
