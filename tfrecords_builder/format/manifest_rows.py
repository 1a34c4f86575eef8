"""The rows of a manifest: one for each source image, as objects and as an Arrow table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

ACCEPTED = "ok"
REJECTED = "rejected"
EXCLUDED = "excluded"

ARROW_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("group", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("patient", pa.string()),
        pa.field("mask", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("mask_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("index", pa.int64()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One source image. What is None is unknown (width, height) or does not apply (no split, no record)."""

    path: str
    """Relative to the source folder, with forward slashes."""
    class_name: str
    label: int
    """Position of the class in the dataset's class names."""
    split: str | None
    """train, validation or test; None when the image is excluded."""
    group: str
    """The path of the first image of its group (near-duplicates, and images of a patient), which may be its own."""
    source: str | None
    """Where the image came from, as the collection says."""
    patient: str | None
    mask: str | None
    """Path of the image's lung mask; None when it has none, or masks were not read."""
    sha256: str | None
    """Hexadecimal, of the source file's bytes; None when it could not be read."""
    mask_sha256: str | None
    """Likewise of the mask."""
    width: int | None
    """Of the source image, in pixels."""
    height: int | None
    status: str
    """ok, rejected (no whole image) or excluded (a whole image that was left out)."""
    reason: str | None
    """Why it was rejected or excluded."""
    shard: str | None
    """Name of the file that holds the record."""
    index: int | None
    """Number of the record in its shard."""
    offset: int | None
    """Byte in the shard at which the record's frame begins."""
    length: int | None
    """Of the record's payload, in bytes."""


class TableRows(Sequence[Row]):
    """The rows of a table, made when the first is asked for: training asks for none, and each is two kilobytes."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        columns = [self.table.column(name).to_pylist() for name in ARROW_SCHEMA.names]
        return tuple(Row(*values) for values in zip(*columns, strict=True))

    def __len__(self) -> int:
        rows: int = self.table.num_rows
        return rows

    def __getitem__(self, place: Any) -> Any:
        return self._rows[place]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return self._rows == (other._rows if isinstance(other, TableRows) else other)

    def __hash__(self) -> int:
        return hash(self._rows)


def table_of(rows: Sequence[Row]) -> pa.Table:
    """`rows` as a table of ARROW_SCHEMA."""
    columns = [[getattr(row, name) for row in rows] for name in ARROW_SCHEMA.names]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, ARROW_SCHEMA, strict=True)], schema=ARROW_SCHEMA)
