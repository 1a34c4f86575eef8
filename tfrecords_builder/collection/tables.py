"""Tables that people write about images: CSV, TSV and Parquet, whatever program wrote them."""

import csv
import difflib
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tfrecords_builder.collection.file_kinds import IMAGE_SUFFIXES
from tfrecords_builder.collection.layout import SPLIT_NAMES
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.splitting.splits import SPLITS

COLUMNS = {
    "path": ("path", "file_name", "filename", "image"),
    "label": ("label", "class", "class_name"),
    "patient": ("patient", "patient_id", "patientid"),
    "source": ("source", "url"),
    "split": ("split",),
}
"""What each column that is read may be called, without regard to case; of several that are there, the first is read."""
_DELIMITERS = ",;\t"
_WHOLE_FLOAT = re.compile(r"([0-9]+)\.0+")
_NOTHING = frozenset({"", "-", "<na>", "n/a", "na", "nan", "none", "null", "unknown"})
_LIKE_NAMES = 0.7


@dataclass(frozen=True, slots=True)
class Table:
    """The text of a table, row by row."""

    file: Path
    header: Sequence[str]
    rows: Sequence[tuple[int, Sequence[str]]]
    """With the number of its line; rows without any text are left out."""
    places: Mapping[str, int]
    """The column of each meaning of COLUMNS that is there."""

    def value(self, row: Sequence[str], meaning: str) -> str:
        """A field, "" where the table or the row has none."""
        place = self.places.get(meaning)
        return row[place] if place is not None and place < len(row) else ""

    @property
    def others(self) -> dict[str, int]:
        """The columns that are not read, by name as it is written."""
        used = set(self.places.values())
        return {name.strip(): place for place, name in enumerate(self.header) if place not in used and name.strip()}

    def misspelt(self) -> dict[str, str]:
        """Of the columns that are not read, those named almost as one that is missing, with its name."""
        missing = [meaning for meaning in COLUMNS if meaning not in self.places]
        near = {name: difflib.get_close_matches(_plain(name), missing, 1, _LIKE_NAMES) for name in self.others}
        return {name: names[0] for name, names in near.items() if names}

    def need(self, meaning: str, also: Sequence[str]) -> None:
        """Refuse a table without the column `meaning`, or without all of `also`."""
        if meaning in self.places and any(name in self.places for name in also):
            return
        misspelt = self.misspelt()
        found = [self.header[place].strip() for place in sorted(self.places.values())]
        found += [name + (f" (rename it to {misspelt[name]}?)" if name in misspelt else "") for name in self.others]
        others = [other for name in also for other in COLUMNS[name][1:]]
        raise UserError(
            f"{self.file}: needs the column {meaning} (or {', '.join(COLUMNS[meaning][1:])}), and {' or '.join(also)}"
            + (f" (or {', '.join(others)})" if others else "")
            + f"; its columns are {', '.join(found) or 'none'}"
        )


def read_table(file: Path) -> Table:
    """A table of CSV, TSV or semicolons in UTF-8 (with or without BOM, any line ends), or of Parquet.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fix or remove it") from error
    header, rows = _from_parquet(file, content) if content[:4] == b"PAR1" else _from_text(file, content)
    names = [_plain(name) for name in header]
    places = {}
    for meaning, known in COLUMNS.items():
        present = [name for name in known if name in names]
        if present:
            places[meaning] = names.index(present[0])
    return Table(file, header, rows, places)


def _from_text(file: Path, content: bytes) -> tuple[list[str], list[tuple[int, list[str]]]]:
    # By the standard library: Arrow's reader refuses rows of unequal length, which spreadsheets write.
    try:
        # Line ends of Windows and of old Macs become those of Unix.
        text = io.StringIO(content.decode("utf-8-sig"), newline=None).read()
        first = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first.count)
        lines = csv.reader(io.StringIO(text), strict=True, delimiter=delimiter)
        header = next(lines, [])
        rows = [(lines.line_num, row) for row in lines if any(field.strip() for field in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is not a CSV file in UTF-8 ({error}); fix or remove it") from error
    for number, row in rows:
        if any(field.strip() for field in row[len(header) :]):
            raise UserError(
                f"{file}: line {number} has {len(row)} fields where the first line has {len(header)}; quote fields "
                f"that hold '{delimiter}'"
            )
    return header, rows


def _from_parquet(file: Path, content: bytes) -> tuple[list[str], list[tuple[int, list[str]]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
        columns = [_texts(column) for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: is not a Parquet file that can be read ({one_line(error)}); fix it") from error
    rows = [(number, list(row)) for number, row in enumerate(zip(*columns, strict=True), start=1)]
    return table.column_names, rows


def _texts(column: "pa.ChunkedArray") -> list[str]:  # type: ignore[name-defined]  # noqa: F821
    import pyarrow as pa

    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [""] * len(column)  # pictures and lists are no text
    return ["" if value is None else str(value) for value in column.cast(pa.string()).to_pylist()]


def plain_value(text: str) -> str | None:
    """A label, or any other value: without spaces around it, "1.0" as "1"; None where it says nothing.

    pandas writes a column of whole numbers with gaps as floats.
    """
    value = " ".join(text.split())
    whole = _WHOLE_FLOAT.fullmatch(value)
    return None if value.casefold() in _NOTHING else whole[1] if whole else value


def split_name(text: str, where: str) -> str | None:
    """The split that a text names; None for empty text, UserError for any other."""
    value = plain_value(text)
    if value is None:
        return None
    split = SPLIT_NAMES.get(value.casefold())
    if split is None:
        raise UserError(f"{where}: split '{value}' is not one of {', '.join(SPLITS)}; mend it, or rename the column")
    return split


def path_finder(paths: Collection[str]) -> Callable[[str], str | None]:
    """Gives the image that a text names: its path, or so much of the path's end that it is no other image.

    Backslashes, case, Unicode form, folders above the source folder and a missing suffix make no difference. The time
    of a look-up does not depend on the number of images, even where all have one name in folders of their own.
    """
    exact = set(paths)
    whole: dict[str, str] = {}
    ends: dict[str, str] = {}
    """Of each path the whole, and each end, as `_parts` writes them; "" for what several have."""

    def index() -> None:
        for path in exact:
            *folders, name = _parts(path)
            for last in {name, without_suffix(name)}:
                parts = [*folders, last]
                for start in range(len(parts)):
                    for known in (ends, whole) if not start else (ends,):
                        end = "/".join(parts[start:])
                        known[end] = path if known.get(end, path) == path else ""

    def find(text: str) -> str | None:
        if text in exact:
            return text
        if not ends:
            index()
        parts = _parts(text)
        found = {ends.get("/".join(parts))} | {whole.get("/".join(parts[start:])) for start in range(1, len(parts))}
        found.discard(None)
        path = found.pop() if len(found) == 1 else None
        return path or None

    return find


def without_suffix(name: str) -> str:
    """The name of an image file without its suffix."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name


def _parts(path: str) -> list[str]:
    text = unicodedata.normalize("NFC", path.replace("\\", "/")).casefold()
    return [part for part in text.split("/") if part not in ("", ".")]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def read_split_file(path: Path, known: Collection[str]) -> tuple[dict[str, str], str]:
    """The split of each image by path, and the file's SHA-256, from a table with the columns path and split.

    Raises:
        UserError: The file cannot be read, lacks a column, or has a line that names no image of `known`, no split,
            or an image a second time.
    """
    table = read_table(path)
    table.need("path", ("split",))
    find = path_finder(known)
    split_of: dict[str, str] = {}
    for number, row in table.rows:
        text = table.value(row, "path").strip()
        image = find(text)
        if image is None:
            raise UserError(f"{path}: line {number}: '{text}' is not an image of the source; remove the line")
        split = split_name(table.value(row, "split"), f"{path}: line {number}")
        if split is None:
            raise UserError(f"{path}: line {number} names no split; give {', '.join(SPLITS)}, or remove the line")
        if split_of.setdefault(image, split) != split:
            raise UserError(f"{path}: line {number}: '{image}' is in two splits; keep one line")
    return split_of, hashlib.sha256(path.read_bytes()).hexdigest()
