"""The rows of a manifest: one for each source image, as objects and as an Arrow table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_type_hints

import pyarrow as pa

ACCEPTED = "ok"
REJECTED = "rejected"
EXCLUDED = "excluded"


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


_ARROW_TYPES = {str: pa.string(), int: pa.int64()}
_INT32 = ("label", "width", "height")


def _arrow_field(name: str, kind: Any) -> pa.Field:
    value, *none = get_args(kind) or (kind,)
    return pa.field(name, pa.int32() if name in _INT32 else _ARROW_TYPES[value], nullable=bool(none))


ARROW_SCHEMA = pa.schema([_arrow_field(name, kind) for name, kind in get_type_hints(Row).items()])
"""A column for each field of `Row`."""


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


_OF_TABLE = "_of_table"


def with_extra(table: pa.Table, extra: Mapping[str, Sequence[str | None]]) -> pa.Table:
    """`table` with further columns of text; one that is named as a column of ARROW_SCHEMA gets `_of_table` behind."""
    for name, values in extra.items():
        column = f"{name}{_OF_TABLE}" if name in ARROW_SCHEMA.names else name
        table = table.append_column(pa.field(column, pa.string()), pa.array(values, pa.string()))
    return table


def extra_of(table: pa.Table) -> tuple[pa.Table, dict[str, tuple[str | None, ...]]]:
    """The table of ARROW_SCHEMA in one of `with_extra`, and the further columns; ValueError for any other table."""
    count = len(ARROW_SCHEMA.names)
    own = table.select(list(range(count))) if table.num_columns >= count else table
    further = table.column_names[count:]
    if not own.schema.equals(ARROW_SCHEMA) or any(table.schema.field(name).type != pa.string() for name in further):
        raise ValueError("unexpected columns")
    names = {f"{name}{_OF_TABLE}": name for name in ARROW_SCHEMA.names}
    return own, {names.get(name, name): tuple(table.column(name).to_pylist()) for name in further}
