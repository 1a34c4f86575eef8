"""Who may write into a run's folder, and what is read from one."""

import json
from pathlib import Path

import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.runs.versions import FORMAT
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import Manifest, Settings

DATA = Path("somewhere/dataset")


def manifest(fingerprint: str = "f" * 64, image_size: int = 64) -> Manifest:
    settings = Settings(image_size=image_size, encoding="raw", seed=0, split_rule="any", conflicts="keep")
    return Manifest(class_names=("COVID", "Normal"), settings=settings, fingerprint=fingerprint, shards=(), rows=())


def config(*overrides: str) -> Config:
    return run_folder.resolve_config(load_config(overrides=["model.weights=none", *overrides]), manifest())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run: Path, settings: Config, data: Manifest | None = None) -> str:
    """The message; whatever is there stays as it is."""
    before = content(run) if run.is_dir() else run.read_bytes()
    with pytest.raises(UserError) as caught:
        run_folder.prepare(run, settings, DATA, data or manifest())
    assert (content(run) if run.is_dir() else run.read_bytes()) == before
    message = str(caught.value)
    assert message.startswith((f"{run}: ", f"{run / run_folder.RUN}: "))
    assert "--out" in message or "folder" in message
    assert "\n" not in message
    return message


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "run"
    run_folder.prepare(folder, config("stages.1.epochs=5"), DATA, manifest())
    return folder


@pytest.fixture
def begun(run: Path) -> Path:
    """A run with an epoch behind it."""
    (run / run_folder.CHECKPOINTS).mkdir()
    (run / run_folder.CHECKPOINTS / "epoch-00001.safetensors").write_bytes(b"x")
    return run


def test_a_new_run(run: Path) -> None:
    assert run_folder.read_config(run) == config("stages.1.epochs=5")
    assert run_folder.read_info(run) == run_folder.RunInfo(str(DATA.resolve()), "f" * 64, ("COVID", "Normal"), 64)
    assert run_folder.read_history(run) == []
    assert run_folder.read_result(run) is None


def test_a_run_that_was_stopped_in_its_first_writes_is_begun_again(run: Path) -> None:
    (run / run_folder.RUN).rename(run / f".{run_folder.RUN}.k3j4.tmp")
    (run / f".{run_folder.CONFIG}.x1y2.tmp").write_text("seed: 0")
    run_folder.prepare(run, config("stages.1.epochs=5"), DATA, manifest())
    assert run_folder.read_info(run).fingerprint == "f" * 64
    (run / run_folder.RUN).unlink()
    (run / ".mine.tmp").write_text("mine")
    refused(run, config("stages.1.epochs=5"))


def test_an_interrupted_run_is_accepted_and_left_as_it_is(begun: Path) -> None:
    run_folder.write_history(begun, [{"epoch": 1, "loss": 0.5}])
    before = content(begun)
    run_folder.prepare(begun, config("stages.1.epochs=5"), Path("moved/dataset"), manifest())
    assert content(begun) == before


def test_before_the_first_epoch_other_settings_replace_those_that_did_not_work(run: Path) -> None:
    run_folder.prepare(run, config("global_batch_size=8"), DATA, manifest("0" * 64))
    assert run_folder.read_config(run) == config("global_batch_size=8")
    assert run_folder.read_info(run).fingerprint == "0" * 64


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with run_folder.locked(run):
        with pytest.raises(UserError, match="another process is training into it"), run_folder.locked(run):
            pass
        assert run.is_dir()
    assert not run.exists(), "nothing was written"
    with run_folder.locked(run):
        (run / "kept").write_text("")
    assert (run / "kept").exists()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=str(path)), run_folder.locked(path):
            pass


def test_a_relative_path_of_weights_is_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers run in another folder."""
    monkeypatch.chdir(tmp_path)
    resolved = run_folder.resolve_config(load_config(overrides=["model.weights=w/x.h5"]), manifest())
    assert resolved.model.weights == str(tmp_path / "w" / "x.h5")
    for name in ("imagenet", "none"):
        assert (
            run_folder.resolve_config(load_config(overrides=[f"model.weights={name}"]), manifest()).model.weights
            == name
        )


def test_a_run_stopped_at_its_very_start_is_accepted(run: Path) -> None:
    (run / run_folder.RUN).unlink()
    run_folder.prepare(run, config("stages.1.epochs=5"), DATA, manifest())
    assert run_folder.read_info(run).fingerprint == "f" * 64
    empty = run.parent / "empty"
    empty.mkdir()
    run_folder.prepare(empty, config(), DATA, manifest())


@pytest.mark.parametrize(
    ("override", "key", "before", "now"),
    [
        ("stages.1.epochs=6", "stages.1.epochs", "5", "6"),
        ("seed=3", "seed", "0", "3"),
        ("model.dropout=0.5", "model.dropout", "0.3", "0.5"),
        ("stages.2.clip_norm=1", "stages.2.clip_norm", "None", "1.0"),
        ("stages.3.learning_rate=1e-5", "stages.3", "None", "1e-05"),
    ],
)
def test_other_settings_are_refused_by_name(begun: Path, override: str, key: str, before: str, now: str) -> None:
    overrides = [override] if override.startswith("stages.1") else ["stages.1.epochs=5", override]
    message = refused(begun, config(*overrides))
    assert f" {key} {before}, not " in message
    assert now in message.split(", not ")[1]


def test_the_first_of_several_differences_is_always_the_same(begun: Path) -> None:
    message = refused(begun, config("stages.1.epochs=6", "seed=1", "model.dropout=0.1"))
    assert " model.dropout 0.3, not 0.1" in message


def test_a_rebuilt_dataset_and_another_one_are_refused(begun: Path) -> None:
    message = refused(begun, config("stages.1.epochs=5"), manifest("0" * 64))
    assert f"the dataset {DATA.resolve()} as it was before it was rebuilt" in message
    assert "another" not in message.split(";")[0], "it is the same folder"
    with pytest.raises(UserError, match=f"a run on another dataset \\({DATA.resolve()}\\); give another --out"):
        run_folder.prepare(begun, config("stages.1.epochs=5"), Path("another/dataset"), manifest("0" * 64))


def test_the_versions_of_a_run_are_listed_in_the_order_of_its_starts(begun: Path) -> None:
    first, second = {"keras": "3.15.1", "numpy": "2.4.6"}, {"keras": "3.16.0", "numpy": "2.4.6"}
    starts = [(first, []), (first, []), (second, ["keras 3.15.1 -> 3.16.0"]), (second, [])]
    for versions, changed in starts:
        assert run_folder.record_versions(begun, versions) == changed
    written = json.loads((begun / run_folder.RUN).read_text())
    assert written["format"] == FORMAT
    assert written["made_with"] == [first, second]
    assert run_folder.read_info(begun).fingerprint == "f" * 64
    run_folder.prepare(begun, config("stages.1.epochs=5"), DATA, manifest())
    assert json.loads((begun / run_folder.RUN).read_text()) == written


def test_a_run_of_another_format_is_neither_read_nor_replaced(begun: Path) -> None:
    """Said before its configuration is read, which may be of another version too."""
    path = begun / run_folder.RUN
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    (begun / run_folder.CONFIG).write_text("unknown: 1")
    assert f"has format {FORMAT + 1}" in refused(begun, config("stages.1.epochs=5"))
    for read in (run_folder.read_info, lambda run: run_folder.record_versions(run, {})):
        with pytest.raises(UserError, match="use the version that wrote it"):
            read(begun)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(tmp_path / "file", config())


def test_what_a_killed_start_left_half_written_is_removed(begun: Path) -> None:
    for name in (".history.jsonl.abcd.tmp", ".result.json.efgh.tmp", ".notes.txt.ijkl.tmp"):
        (begun / name).write_text("half")
    (begun / f".{run_folder.MODEL}.mnop").mkdir()
    (begun / f".{run_folder.MODEL}.mnop" / run_folder.MODEL).write_text("half")
    before = {path.name for path in begun.iterdir() if not path.name.startswith(".")}
    run_folder.prepare(begun, config("stages.1.epochs=5"), DATA, manifest())
    assert {path.name for path in begun.iterdir()} == {*before, ".notes.txt.ijkl.tmp"}


def test_a_request_to_stop_is_forgotten_at_a_start_and_only_in_a_run(begun: Path, tmp_path: Path) -> None:
    (begun / "stop").touch()
    run_folder.prepare(begun, config("stages.1.epochs=5"), DATA, manifest())
    assert not (begun / "stop").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("stop", "mine.txt"):
        (foreign / name).write_text("mine")
    refused(foreign, config())


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.keras", run_folder.RUN, run_folder.RESULT, ".hidden", run_folder.CONFIG]
)
def test_a_folder_with_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("seed: 5  # mine")
    assert "other files than a run" in refused(tmp_path, config())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written .*--out"):
        run_folder.prepare(tmp_path / "file" / "run", config(), DATA, manifest())


# What depends on the dataset


def test_the_image_size_is_the_datasets() -> None:
    assert run_folder.resolve_config(load_config(), manifest(image_size=96)).model.image_size == 96
    same = load_config(overrides=["model.image_size=96"])
    assert run_folder.resolve_config(same, manifest(image_size=96)) == same
    with pytest.raises(UserError, match=r"^model\.image_size 96: .* 64 pixels.*--image-size 96"):
        run_folder.resolve_config(same, manifest(image_size=64))
    with pytest.raises(UserError, match="31 pixels are too small"):
        run_folder.resolve_config(load_config(), manifest(image_size=31))


# Reading


def test_history_and_result(run: Path) -> None:
    rows = [{"epoch": 1, "loss": 0.5, "best": True}, {"epoch": 2, "loss": 0.25, "best": False}]
    run_folder.write_history(run, rows)
    assert run_folder.read_history(run) == rows
    assert len((run / run_folder.HISTORY).read_text().splitlines()) == 2
    (run / run_folder.RESULT).write_text(json.dumps({"workers": 2}))
    assert run_folder.read_result(run) == {"workers": 2}
    with pytest.raises(ValueError, match="JSON"):
        run_folder.write_history(run, [{"loss": float("nan")}])
    assert run_folder.read_history(run) == rows


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    for read in (run_folder.read_config, run_folder.read_info):
        with pytest.raises(UserError, match=f"^{tmp_path / 'missing'}: no such folder"):
            read(tmp_path / "missing")
        with pytest.raises(UserError, match=f"^{tmp_path}: is not the folder of a run"):
            read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"dataset": "d", "fingerprint": "f", "class_names": 3}', "\xff"]
)
def test_damaged_files_are_named(run: Path, text: str) -> None:
    for name in (run_folder.RUN, run_folder.HISTORY, run_folder.RESULT):
        (run / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=run_folder.RUN):
        run_folder.read_info(run)
    if text in ("", "{", "\xff"):
        if text:
            with pytest.raises(UserError, match=run_folder.HISTORY):
                run_folder.read_history(run)
        with pytest.raises(UserError, match=run_folder.RESULT):
            run_folder.read_result(run)
