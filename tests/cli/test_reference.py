"""The generated pages of the documentation, and the texts that they are made of."""

import argparse
from pathlib import Path

import pytest

from cxr_dist.cli import reference
from cxr_dist.cli.main import build_parser, main
from cxr_dist.cli.train import config_rows
from cxr_dist.config.describe import select
from cxr_dist.config.loading import known_keys
from tfrecords_builder.common.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = list(reference.commands(build_parser()))


@pytest.mark.parametrize("name", reference.pages())
def test_pages_are_what_is_generated(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == reference.pages()[name], "run: make reference"


def test_pages_are_written(tmp_path: Path) -> None:
    reference.main([str(tmp_path / "docs")])
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()} == reference.pages()


def test_help_of_the_generator_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        reference.main(["--help"])
    assert list(tmp_path.iterdir()) == []


def test_pages_are_short_enough_to_read() -> None:
    assert {name: words for name, text in reference.pages().items() if (words := len(text.split())) > 1500} == {}


def test_every_key_has_a_row_and_a_description() -> None:
    rows = config_rows()
    assert {row.key for row in rows if not row.key.startswith("search.")} == {
        key.replace("stages.1.", "stages.N.").replace("stages.2.", "stages.N.") for key in known_keys()
    }
    assert [
        row.key for row in rows if not stands_alone(row.description.removesuffix(".")) or row.description[-1] != "."
    ] == []
    assert all(row.kind and row.default for row in rows)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.prog))
def test_every_command_and_option_has_help(command: argparse.ArgumentParser) -> None:
    texts = {action.dest: reference.help_of(command, action) for action in reference.options_of(command)}
    texts["the command"] = command.description or ""
    assert {name: text for name, text in texts.items() if not stands_alone(text) or text.endswith(".")} == {}


def stands_alone(text: str) -> bool:
    return text == text.strip() and "\n" not in text and len(text.split()) >= 3


def test_rows_say_type_range_and_default() -> None:
    shown = {row.key: (row.kind, row.default) for row in config_rows()}
    assert shown["model.dropout"] == ("number >=0, <1", "0.3")
    assert shown["seed"] == ("integer >=0, <2^31", "0")
    assert shown["xla"] == ("auto, on or off", "auto")
    assert shown["stages.N.epochs"] == ("integer >=0", "3 in stage 1, 4 in stage 2")
    assert shown["stages.N.clip_norm"] == ("number >0", "null")
    assert shown["search.parameters.KEY.choices"] == ("list", "null")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("seed", ["seed"]),
        ("all_reduce", ["all_reduce.algorithm", "all_reduce.bucket_mb"]),
        ("stages.3.momentum", ["stages.N.momentum"]),
        ("search.parameters.model.dropout.log", ["search.parameters.KEY.log"]),
    ],
)
def test_a_key_or_a_section_is_selected(name: str, keys: list[str]) -> None:
    assert [row.key for row in select(config_rows(), name)] == keys


def test_all_keys_are_selected_by_default() -> None:
    assert select(config_rows(), "") == config_rows()
    assert len(select(config_rows(), "stages.2")) == len(select(config_rows(), "stages"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("model.dropot", "model.dropout"), ("search.trails", "search.trials"), ("epoch", "stages.N.epochs")],
)
def test_an_unknown_key_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"^--describe {name}: unknown config key; did you mean {nearest}\?$"):
        select(config_rows(), name)


def test_describe_prints_key_type_default_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "--describe", "stages.2.label_smoothing"])
    head, *body = capsys.readouterr().out.splitlines()
    assert head == "stages.N.label_smoothing: number >=0, <1; default: 0.0"
    assert " ".join(" ".join(body).split()) == select(config_rows(), "stages.N.label_smoothing")[0].description
    main(["config", "--describe"])
    assert capsys.readouterr().out.count("; default: ") == len(config_rows())


def test_help_of_train_names_every_preset_of_training() -> None:
    presets = {path.stem for path in (DOCS.parent / "tune_configs").glob("[!s]*.yaml")} | {"smoke"}
    train = next(command for command in COMMANDS if str(command.prog).endswith(" train"))
    text = next(reference.help_of(train, action) for action in reference.options_of(train) if action.dest == "config")
    assert {name for name in presets if name not in text} == set()
