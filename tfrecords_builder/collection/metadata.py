"""What is known of an image beside its pixels: where it came from, whose it is, and what else a table says.

The COVID-19 Radiography Database has a sheet for each class beside the class folders (`COVID.metadata.xlsx`, with the
columns FILE NAME and URL): the address is the source. Any other collection can say the same in one `metadata.csv`
beside its class folders, with the column path and source, or patient, or both.
"""

import hashlib
import json
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path, PurePosixPath

from tfrecords_builder.collection.file_kinds import CSV_NAME, SHEET_SUFFIX, Note, printable
from tfrecords_builder.collection.find import SourceImage, class_name_of
from tfrecords_builder.collection.layout import join
from tfrecords_builder.collection.tables import Table, path_finder, plain_value, read_table, split_name, without_suffix
from tfrecords_builder.common.errors import UserError

WELL_COVERED = 0.9
"""Share of the lines that name an image, and of the images that have a line, below which there is a warning."""
_SPELLINGS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of one image; None where nothing is said."""

    source: str | None = None
    """Where the image came from: an address, a hospital, another collection."""
    patient: str | None = None
    """As `normalized_patient` writes it."""


@dataclass(frozen=True, slots=True)
class TableLine:
    """What a table says of one image."""

    metadata: Metadata = Metadata()
    label: str | None = None
    split: str | None = None
    extra: tuple[str | None, ...] = ()
    """What is in the columns that only the manifest keeps."""


@dataclass(frozen=True, slots=True)
class Lines:
    """What tables say of the images of a collection."""

    lines: Mapping[str, TableLine] = field(default_factory=dict)
    """By path."""
    extra_names: tuple[str, ...] = ()
    """The columns of `TableLine.extra`."""
    strangers: tuple[tuple[str, TableLine], ...] = ()
    """Paths that are no image, with what is said of them."""
    notes: tuple[Note, ...] = ()
    has_labels: bool = False
    has_split: bool = False

    @property
    def metadata(self) -> dict[str, Metadata]:
        """Patient and source by path."""
        return {path: line.metadata for path, line in self.lines.items()}

    @property
    def extra(self) -> dict[str, dict[str, str]]:
        """What the manifest keeps: by column, then by path; columns without any value are left out."""
        columns: dict[str, dict[str, str]] = {}
        for place, name in enumerate(self.extra_names):
            values = {path: value for path, line in self.lines.items() if (value := line.extra[place]) is not None}
            if values:
                columns[name] = values
        return columns


def normalized_patient(text: str) -> str | None:
    """A patient's identifier in the one spelling that is compared; None where the text names no patient.

    Spaces around it and repeated ones, case, and Unicode form (NFKC) make no difference. "12.0" is "12": pandas
    writes a column of numbers with gaps so. Empty text, "nan", "none", "null", "n/a", "na", "unknown" and "-" name
    nobody.
    """
    return plain_value(unicodedata.normalize("NFKC", text).casefold())


def read_metadata(root: Path, found: Sequence[SourceImage]) -> dict[str, Metadata]:
    """The metadata of `examine_metadata`, with its errors."""
    return examine_metadata(root, found)[0]


def examine_metadata(root: Path, found: Sequence[SourceImage]) -> tuple[dict[str, Metadata], list[Note]]:
    """What the sheets in `root` say, by path, and how well they fit the images.

    Images of which the sheets say nothing are left out.

    Raises:
        UserError: A sheet cannot be read, lacks a column, contradicts itself, or `metadata.csv` names no image.
    """
    tables = find_tables(root, ("",))
    if not tables:
        return read_sheets(root, found)
    lines = read_lines(root, [image.path for image in found], tables)
    return lines.metadata, [*lines.notes, *unread_sheets(root)]


def find_tables(root: Path, folders: Sequence[str]) -> list[tuple[str, Table]]:
    """Each `metadata.csv` in these folders of `root`, with the folder."""
    files = {folder: root / folder / CSV_NAME for folder in folders}
    return [(folder, read_table(file)) for folder, file in files.items() if file.is_file()]


def read_lines(root: Path, paths: Sequence[str], tables: Sequence[tuple[str, Table]]) -> Lines:
    """What tables say of the images `paths`.

    Args:
        root: The collection's folder.
        paths: Of the images, relative to `root`.
        tables: Each with the folder of `root` that its paths are relative to.

    Raises:
        UserError: A table lacks a column, contradicts itself, or none of its lines names an image.
    """
    known: dict[str, TableLine] = {}
    strangers: list[tuple[str, TableLine]] = []
    notes: list[Note] = []
    spelt: list[Note] = []
    names = tuple(dict.fromkeys(name for _, table in tables for name in table.others))
    find = path_finder(paths)
    for folder, table in tables:
        table.need("path", ("patient", "source", "label", "split"))
        missed: list[str] = []
        spellings: dict[str, set[str]] = defaultdict(set)
        places = [table.others.get(name) for name in names]
        for number, row in table.rows:
            text = table.value(row, "path").strip()
            line = _line(table, number, row, places)
            path = find(join(folder, text)) or find(text)
            if path is None:
                missed.append(f"line {number}: '{table.value(row, 'path')}'")
                strangers.append((join(folder, text), line))
                continue
            if line.metadata.patient is not None:
                spellings[line.metadata.patient].add(table.value(row, "patient"))
            if known.setdefault(path, line) != line:
                raise UserError(
                    f"{table.file}: line {number}: '{path}' occurs twice, with different values; keep one line"
                )
        if missed and len(missed) == len(table.rows):
            raise UserError(
                f"{table.file}: none of its {len(missed):,} lines names an image ({missed[0]}); paths are relative to "
                f"{root / folder}" + (f", such as '{min(paths)}'" if paths else "")
            )
        notes += _line_notes(table.file.name, len(table.rows), missed)
        spelt += _spelling_notes(table.file.name, spellings)
    notes += [*_coverage_notes(tables, known, len(paths)), *spelt]
    notes += [note for _, table in tables for note in _column_notes(table)]
    meanings = {meaning for _, table in tables for meaning in table.places}
    return Lines(known, names, tuple(strangers), tuple(notes), "label" in meanings, "split" in meanings)


def unread_sheets(root: Path) -> list[Note]:
    """That the database's own sheets are not read, as there is a `metadata.csv`; nothing without such sheets."""
    sheets = len(list(root.glob(f"*{SHEET_SUFFIX}")))
    return [Note(f"{CSV_NAME} is read, and so {sheets} *{SHEET_SUFFIX} are not", warning=True)] if sheets else []


def read_sheets(root: Path, found: Sequence[SourceImage]) -> tuple[dict[str, Metadata], list[Note]]:
    """What the database's own sheets in `root` say, as `examine_metadata`."""
    by_name = {(image.class_name, PurePosixPath(image.path).stem.casefold()): image.path for image in found}
    images = Counter(image.class_name for image in found)
    known, notes = {}, []
    for sheet in sorted(root.glob(f"*{SHEET_SUFFIX}")):
        class_name = class_name_of(sheet.name.removesuffix(SHEET_SUFFIX))
        lines, strangers, named = 0, [], set()
        for name, source in _from_sheet(sheet):
            # The sheets write NORMAL-1 where the file is Normal-1.png, and some names with their suffix.
            path = by_name.get((class_name, without_suffix(PurePosixPath(name).name).strip().casefold()))
            lines += 1
            if path is None:
                strangers.append(name)
            else:
                known[path] = Metadata(source=source)
                named.add(path)
        notes += _line_notes(sheet.name, lines, strangers)
        if len(named) < images[class_name]:
            notes.append(_coverage(sheet.name, len(named), images[class_name], f"images of {class_name} have a line"))
    return known, notes


def metadata_digest(
    metadata: Mapping[str, Metadata], extra: Mapping[str, Mapping[str, str]] | None = None
) -> str | None:
    """SHA-256 of all that is known; None when nothing is."""
    if not metadata and not extra:
        return None
    content: list[object] = [*sorted((path, *astuple(value)) for path, value in metadata.items())]
    if extra:
        content.append({name: sorted(values.items()) for name, values in sorted(extra.items())})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _line(table: Table, number: int, row: Sequence[str], places: Sequence[int | None]) -> TableLine:
    """A row; `places` are the columns of what the manifest alone keeps."""
    return TableLine(
        Metadata(table.value(row, "source").strip() or None, normalized_patient(table.value(row, "patient"))),
        plain_value(table.value(row, "label")),
        split_name(table.value(row, "split"), f"{table.file}: line {number}"),
        tuple((row[place].strip() or None) if place is not None and place < len(row) else None for place in places),
    )


def _coverage_notes(tables: Sequence[tuple[str, Table]], known: Mapping[str, TableLine], images: int) -> list[Note]:
    notes = []
    for name in ("patient", "source"):
        columns = [table for _, table in tables if name in table.places]
        covered = sum(getattr(line.metadata, name) is not None for line in known.values())
        if columns and covered < images:
            notes.append(_coverage(columns[0].file.name, covered, images, f"images have a {name}"))
    return notes


def _spelling_notes(file: str, spellings: Mapping[str, set[str]]) -> list[Note]:
    several = [sorted(texts) for texts in spellings.values() if len(texts) > 1]
    if not several:
        return []
    shown = ", ".join(f"'{printable(text)}'" for text in several[0][:_SPELLINGS_SHOWN])
    what = f"{len(several):,} patients are spelt in several ways, each taken as one patient ({shown})"
    return [Note(f"{file}: {what}")]


def _column_notes(table: Table) -> list[Note]:
    """The columns that only the manifest keeps; a warning for one that is named almost as one that is read."""
    misspelt = table.misspelt()
    names = [
        printable(name) + (f" (rename it to {misspelt[name]}?)" if name in misspelt else "") for name in table.others
    ]
    text = f"{table.file.name}: columns that the manifest alone keeps: {', '.join(names)}"
    return [Note(text, warning=bool(misspelt))] if names else []


def _line_notes(file: str, lines: int, strangers: Sequence[str]) -> list[Note]:
    if not strangers:
        return []
    return [_coverage(file, lines - len(strangers), lines, f"lines name an image ({printable(strangers[0])} does not)")]


def _coverage(file: str, covered: int, count: int, words: str) -> Note:
    return Note(f"{file}: {covered:,} of {count:,} {words}", warning=covered < WELL_COVERED * count)


def _from_sheet(sheet: Path) -> Iterator[tuple[str, str]]:
    """File name and address of each line that has both."""
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(sheet, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, InvalidFileException) as error:
        raise UserError(f"{sheet}: cannot be read as a sheet ({error}); fix or remove it") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        header = [str(value or "").strip().casefold() for value in next(rows, ())]
        if "file name" not in header or "url" not in header:
            raise UserError(f"{sheet}: needs the columns FILE NAME and URL in its first line; fix or remove it")
        name, url = header.index("file name"), header.index("url")
        for row in rows:
            if len(row) > max(name, url) and row[name] and row[url]:
                yield str(row[name]), str(row[url]).strip()
    finally:
        book.close()
