"""Every marked block of README and docs runs on phantoms, in its page's order, in one folder for each page."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_dist.cli.main import main
from tests.documentation import PAGES, ROOT, Block, blocks, command_lines, name_of

LEAST_BLOCKS = 40


def marked(page: Path) -> list[Block]:
    return blocks(page.read_text(encoding="utf-8"))


def run_apart(block: Block, folder: Path) -> None:
    """The block as a user runs it: in a shell that ends at the first failure, or in a new interpreter."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    program = programs / "cxr-dist"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxr_dist "$@"\n')
    program.chmod(0o755)
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run([*command, block.text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_here(block: Block, folder: Path) -> None:
    """Commands of this program alone run in this process, which has imported all; the rest as `run_apart`."""
    lines = [shlex.split(line, comments=True) for line in command_lines(block.text)]
    is_plain = not set(block.text) & set("$<>|&;*") and all(words[0] == "cxr-dist" for words in lines)
    if block.language != "sh" or not is_plain:
        run_apart(block, folder)
        return
    for words in lines:
        status: object = 0
        try:
            main(words[1:])
        except SystemExit as end:
            status = end.code
        assert not status, shlex.join(words)


QUICK = [
    page
    if page.name in ("README.md", "quickstart.md", "training.md")
    else pytest.param(page, marks=pytest.mark.nightly)
    for page in PAGES
    if any(block.is_quick for block in marked(page))
]
SLOW = [page for page in PAGES if not all(block.is_quick for block in marked(page))]


@pytest.mark.parametrize("page", QUICK, ids=name_of)
def test_quick_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in marked(page):
        if block.is_quick:
            run_here(block, tmp_path)


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_all_blocks_run(page: Path, tmp_path: Path) -> None:
    for block in marked(page):
        run_apart(block, tmp_path)


def test_much_of_the_documentation_runs() -> None:
    assert sum(len(marked(page)) for page in PAGES) >= LEAST_BLOCKS
    assert {block.language for page in PAGES for block in marked(page)} == {"sh", "python"}


def test_a_block_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("cxr-dist build nowhere dataset\n", "cxr-dist verify nowhere | cat\n"):
        with pytest.raises(AssertionError):
            run_here(Block("sh", text, True), tmp_path)
    with pytest.raises(AssertionError):
        run_here(Block("python", "assert False", True), tmp_path)
    with pytest.raises(ValueError, match="right above a block"):
        blocks("<!-- run -->\n\n```sh\nls\n```\n")
