"""A page of Markdown from what `bench --json` printed on one machine: each figure beside the command that gave it."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cxr_dist.distributed.devices import hardware
from cxr_dist.runs.versions import made_with
from tfrecords_builder.common.errors import UserError, reading
from tfrecords_builder.common.files import write_text
from tfrecords_builder.common.pool import default_workers

MARKER = "<!-- Made by `cxr-dist bench page`. -->"
"""First line of every page, by which a page is told from a file that somebody wrote."""
_GB = 1e9


@dataclass(frozen=True)
class Measurement:
    """One benchmark as `--json` prints it."""

    command: str
    """The shell line, without folders of the machine."""
    date: str
    """Day of the end of the benchmark, UTC, as YYYY-MM-DD."""
    machine: Mapping[str, str]
    """Hardware and versions, by name."""
    figures: Any
    """All numbers, for scripts."""
    table: Sequence[str]
    """The lines that the benchmark prints without `--json`."""

    @classmethod
    def of(cls, arguments: Sequence[str], figures: object, table: Sequence[str]) -> "Measurement":
        """What this machine has just measured with `cxr-dist` and `arguments`."""
        return cls(_shell_line(arguments), datetime.now(UTC).date().isoformat(), _machine(), figures, table)

    @classmethod
    def read(cls, path: Path) -> "Measurement":
        """Raises UserError unless the file holds what `bench --json` prints."""
        with reading(path, "give what `cxr-dist bench BENCHMARK --json` printed"):
            tree = json.loads(path.read_bytes())
            return cls(**{name: tree[name] for name in ("command", "date", "machine", "figures", "table")})

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def write_page(results: Sequence[Path], out: Path) -> None:
    """Write the page of the `results` of one machine to `out`.

    Raises:
        UserError: a file holds no result, the results are of several machines, or `out` is no such page.
    """
    if out.exists() and not out.read_bytes().startswith(MARKER.encode()):
        raise UserError(f"{out}: is not a page of `bench page`; give another --out")
    measured = [Measurement.read(path) for path in results]
    for path, result in zip(results, measured, strict=True):
        if result.machine != measured[0].machine:
            raise UserError(f"{path}: has another machine or other versions than {results[0]}; make a page for each")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(_lines(measured)) + "\n")


def _lines(measured: Sequence[Measurement]) -> list[str]:
    machine, dates = measured[0].machine, sorted({result.date for result in measured})
    lines = [
        MARKER,
        f"# {machine.get('processor', 'Benchmarks')}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine.items())]
    for result in measured:
        lines += ["", f"## {_title(result.command)}", "", f"Measured on {result.date} by:", ""]
        lines += ["```sh", result.command, "```", "", "```text", *result.table, "```"]
    return lines


def _title(command: str) -> str:
    """The words of a shell line before its first option: `bench step`."""
    return " ".join(command.split()[1:3])


def _shell_line(arguments: Sequence[str]) -> str:
    # A page is published: it must not tell where somebody keeps X-rays.
    shown = (re.sub(r"(^|=)/.*/", r"\1", argument) for argument in arguments if argument != "--json")
    return shlex.join(["cxr-dist", *shown])


def _machine() -> dict[str, str]:
    has_gpu = bool(list(Path("/dev").glob("nvidia[0-9]*")))
    if has_gpu:  # that TensorFlow can use; else it need not be imported
        import tensorflow as tf

        has_gpu = bool(tf.config.list_physical_devices("GPU"))
    named = hardware("GPU" if has_gpu else "CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    named |= {"cores": str(default_workers()), "memory": f"{memory / _GB:.0f} GB"}
    return named | made_with({}, "ray")
