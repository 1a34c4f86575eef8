"""What the functions return: the essential numbers and paths, and a table of them for a notebook."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfrecords_builder.build import BuildSummary
    from tfrecords_builder.common.places import Place


@dataclass(frozen=True)
class Dataset:
    """A dataset that is complete."""

    path: "Place"
    """Its folder, or its address."""
    class_names: tuple[str, ...]
    image_size: int
    """Side of the stored images in pixels."""
    counts: Mapping[str, Mapping[str, int]]
    """Images by split (train, validation, test), then by class."""
    summary: "BuildSummary" = field(repr=False)
    """All that the build found: files that were left out and why, near-duplicates, patients, seconds."""

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        rows = [(name, *(self.counts[split][name] for split in self.counts)) for name in self.class_names]
        return html_table(f"Dataset {self.path}, {self.image_size} pixels", ("class", *self.counts), rows)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    validation_accuracy: float
    """Of the epoch whose weights the run keeps, 0 to 1."""
    stage: int
    """Of that epoch."""
    epoch: int
    """Number of that epoch in its stage, from 1."""
    seconds: float
    """Of the whole run, over all its starts."""
    result: Mapping[str, Any] = field(repr=False)
    """The content of result.json."""

    def __fspath__(self) -> str:
        return str(self.path)

    def history(self) -> list[dict[str, Any]]:
        """The rows of history.jsonl, one for each epoch: stage, epoch, loss, accuracy, val_loss, val_accuracy, ..."""
        from cxr_dist.runs.run_folder import read_history

        return read_history(self.path)

    def _repr_html_(self) -> str:
        row = (f"{self.validation_accuracy:.4f}", self.stage, self.epoch, f"{self.seconds:.0f}")
        return html_table(f"Run {self.path}", ("validation accuracy", "stage", "epoch", "seconds"), [row])


@dataclass(frozen=True)
class Search:
    """A search whose trials have all ended."""

    path: Path
    """The experiment's folder. `evaluate`, `compare` and `load` take its best trial."""
    trial: int
    """Number of the best trial."""
    run: Path
    """The run of the best trial."""
    validation_accuracy: float
    """Of the best trial, 0 to 1."""
    values: Mapping[str, Any]
    """What the best trial sets, by dotted config key."""
    page: Path
    """An HTML page about all trials."""

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        rows = [("validation accuracy", f"{self.validation_accuracy:.4f}"), *self.values.items()]
        return html_table(f"Search {self.path}: trial {self.trial} is the best", ("key", "value"), rows)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run."""

    path: Path
    report: Path
    """A self-contained HTML page."""
    images: int
    accuracy: float
    """0 to 1; so are the next two."""
    f1_macro: float
    auc_macro: float | None
    """Area under the ROC curve, one class against the rest; None where a class has no images."""
    alarms: tuple[str, ...]
    """What the examination found to be wrong, as sentences."""
    metrics: Mapping[str, Any] = field(repr=False)
    """The content of metrics.json."""

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        """The table of classes, and the report to unfold."""
        names = ("precision", "recall", "f1", "support")
        rows = [(name, *(_shown(row[key]) for key in names)) for name, row in self.metrics["per_class"].items()]
        title = f"Accuracy {self.accuracy:.4f}, macro F1 {self.f1_macro:.4f}, {self.images:,} images"
        alarms = "".join(f"<p><strong>Alarm:</strong> {escape(text)}</p>" for text in self.alarms)
        page = escape(self.report.read_text(encoding="utf-8")) if self.report.is_file() else ""
        frame = f'<iframe sandbox="" style="width: 100%; height: 40em; border: 0" srcdoc="{page}"></iframe>'
        shown = f"<details><summary>{escape(str(self.report))}</summary>{frame}</details>"
        return html_table(title, ("class", *names), rows) + alarms + shown


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same images."""

    first: Path
    second: Path
    images: int
    metrics: Mapping[str, Mapping[str, float | None]]
    """By name: first, second, difference (second - first), and its interval from low to high."""
    p_value: float
    """Of McNemar's exact test, two-sided."""
    warnings: tuple[str, ...]
    result: Mapping[str, Any] = field(repr=False)
    """All of this, as `cxr-dist compare --json` prints it."""

    @property
    def names(self) -> tuple[str, str]:
        """Headings of the two columns: the last parts of the two paths that differ, or first and second."""
        pairs = zip(reversed(self.first.parts), reversed(self.second.parts), strict=False)
        return next((pair for pair in pairs if pair[0] != pair[1]), ("first", "second"))

    def _repr_html_(self) -> str:
        keys = ("first", "second", "difference", "low", "high")
        rows = [(name, *(_shown(row[key]) for key in keys)) for name, row in self.metrics.items()]
        notes = "".join(f"<p>{escape(text)}</p>" for text in self.warnings)
        title = f"{self.first} and {self.second}, {self.images:,} images"
        return html_table(title, ("metric", *self.names, *keys[2:]), rows) + notes


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in HTML."""
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption>{body}</table>"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"  # noqa: RUF001
