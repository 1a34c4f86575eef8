"""The README and the pages of `docs/` as tests read them: their text, their blocks of commands, and what is marked.

A block under the line `<!-- run -->` is run by every `make test`, one under `<!-- run nightly -->` by `make test-all`.
All blocks of a page run in the page's order in one folder, and none of the first kind needs one of the second.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
GENERATED = ("cli.md", "cli-data.md", "cli-bench.md", "configuration.md", "configuration-search.md")
"""Pages that a command writes from the parsers and the configuration."""
PAGES = [README, *(path for path in sorted(DOCS.rglob("*.md")) if path.name not in GENERATED)]
"""All that people have written."""

_BLOCK = re.compile(r"^<!-- (run(?: nightly)?) -->\n```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SH = re.compile(r"^ *```sh[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A block that is marked as runnable."""

    language: str
    """sh or python."""
    text: str
    is_quick: bool
    """Whether every `make test` runs it."""


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """The marked blocks of a page, in order.

    Raises:
        ValueError: a mark is not followed by a block at once.
    """
    found = [Block(language, content, mark == "run") for mark, language, content in _BLOCK.findall(text)]
    if len(found) != len(re.findall(r"<!-- run", text)):
        raise ValueError("a mark <!-- run --> or <!-- run nightly --> must stand right above a block")
    return found


def shell_lines(text: str) -> list[str]:
    """The commands of a page's sh blocks: comments left out, continued lines joined."""
    return [line for block in _SH.findall(text) for line in command_lines(block)]


def command_lines(block: str) -> list[str]:
    """The lines of one block, likewise."""
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def inline_code(text: str) -> list[str]:
    """What stands in backticks outside of blocks."""
    return _CODE.findall(re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def simple_commands(line: str) -> Iterator[list[str]]:
    """A shell line's commands, each as its words, without redirections' targets told apart."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|()<>"):
            if words:
                yield words
            words = []
        else:
            words.append(token)


def project_commands(line: str) -> Iterator[list[str]]:
    """The arguments of each `cxr-dist` that a line runs: as it is, in a container, or in quotes (`ray exec`)."""
    for words in simple_commands(line):
        for position, word in enumerate(words):
            starts = position == 0 or words[position - 1] == "--" or words[position - 1].startswith("cxr-dist:")
            if starts and Path(word).name == "cxr-dist":
                yield words[position + 1 :]
            elif re.search(r"(^|/)cxr-dist \w", word):
                yield from project_commands(word)
