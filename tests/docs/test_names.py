"""Options, keys, commands and files that README and docs name exist, and no page is longer than a reader bears."""

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_dist.cli.main import build_parser
from cxr_dist.config.loading import known_keys
from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.tuning.search_space import SearchConfig
from tests.documentation import DOCS, PAGES, README, ROOT, inline_code, name_of, project_commands, shell_lines
from tfrecords_builder.common.errors import UserError

README_WORDS, PAGE_WORDS = 900, 1500
REPOSITORY = ("cluster", "cxr_dist", "docs", "tests", "tfrecords_builder", "tune_configs")

# Options of other programs, by program.
OTHERS = {
    "aws": "--cidr --description --encrypted --file-system-id --filters --group-id --group-name --ip-permissions "
    "--mount-target-id --name --output --port --protocol --query --security-groups --source-group --subnet-id --vpc-id",
    "curl": "--data-binary --fail --header --silent",
    "docker": "--build-arg --detach --env --gpus --name --network --rm --shm-size --volume",
    "kubectl": "--all --follow --for --from-file --ignore-not-found --timeout --watch",
    "pip": "--no-deps --wheel-dir",
    "prometheus": "--config.file --web.listen-address",
    "pytest": "--hypothesis-profile",
    "python -m cxr_dist.bench.plain_keras": "--epochs --out --weights",
    "ray": "--address --dashboard-host --follow --head --metrics-export-port --run-env --runtime-env --working-dir",
    "ruff": "--check --fix",
    "tensorboard": "--host --logdir",
}


def texts() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield name_of(page), page.read_text(encoding="utf-8")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser and of its commands."""
    own = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    return own.union(*(options_of(inner) for inner in subparsers(parser).values()))


OPTIONS = options_of(build_parser()) | {option for options in OTHERS.values() for option in options.split()}


def unknown_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))) - OPTIONS


def unknown_keys(text: str) -> set[str]:
    """Dotted names in backticks that begin as config keys do and are none; a key may be followed by its value."""
    known = {*known_keys(), *(f"search.{key}" for key in SearchConfig.model_fields)}
    known |= {f"stages.{number}.{key}" for number in ("N", 1, 2) for key in StageConfig.model_fields}
    known |= {f"stages.{number}" for number in ("N", 1, 2, 3)}
    sections = {"search", *Config.model_fields}
    named = {code.partition("=")[0] for code in inline_code(text)}
    dotted = {name for name in named if re.fullmatch(r"[a-z_]+(\.\w+)+", name)}
    files = {name for name in dotted if re.search(r"\.(html|json|jsonl|keras|yaml|parquet|py|onnx|png|md|csv)$", name)}
    return {name for name in dotted - files if name.split(".")[0] in sections} - known


def unknown_files(text: str) -> set[str]:
    """Paths of the repository that are not there; a part in capitals stands for any."""
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(REPOSITORY)})/[\w./-]*\w", text)
    return {path for path in paths if not (ROOT / path).exists() and not re.search(r"/[A-Z-]+\.", path)}


@pytest.mark.parametrize(("page", "text"), [*texts()])
def test_options_keys_and_files_exist(page: str, text: str) -> None:
    assert unknown_options(text) == set(), page
    if page.count("/") <= 1:  # pages of design and decisions name modules, which look alike
        assert unknown_keys(text) == set(), page
    assert unknown_files(text) == set(), page


def test_what_does_not_exist_is_seen() -> None:
    assert unknown_options("`--no-such-option`, `--out`") == {"--no-such-option"}
    assert unknown_keys("`stages.1.epoch=5`, `stages.1.epochs=5`, `search.trial`, `run.json`") == {
        "stages.1.epoch",
        "search.trial",
    }
    assert unknown_files("`cluster/nothing.yaml`, `cluster/example.yaml`") == {"cluster/nothing.yaml"}


def test_commands_parse() -> None:
    parser = build_parser()
    commands = subparsers(parser)
    for page, text in texts():
        for code in inline_code(text):
            words = code.split()
            if words[0] == "cxr-dist" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
                assert words[1] in commands, f"{page}: {code}"
        for line in shell_lines(text):
            for arguments in project_commands(line):
                if {"--help", "--version"} & set(arguments):
                    continue
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        parser.parse_args(arguments)
                except UserError as error:
                    pytest.fail(f"{page}: cxr-dist {shlex.join(arguments)}: {error}")


def test_links_of_the_readme_lead_somewhere() -> None:
    """MkDocs looks after the links of the pages."""
    links = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_pages_are_short() -> None:
    words = {page: len(text.split()) for page, text in texts()}
    assert words.pop("README.md") <= README_WORDS
    assert {page: count for page, count in words.items() if count > PAGE_WORDS} == {}


def test_pages_load_nothing_from_elsewhere() -> None:
    for page, text in texts():
        assert not re.findall(r"!\[[^]]*\]\(https?:|<script|<img[^>]*https?:", text), page
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert not re.search(r"https?://", settings)
    assert {path.suffix for path in (DOCS / "images").iterdir()} <= {".png", ".svg"}


def test_every_user_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in Path(DOCS).glob("*.md")}
    assert {name for name in pages if f": {name}" not in settings} == set()
