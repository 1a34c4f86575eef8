"""What is known of an image beside its pixels: where it came from, and whose it is.

The COVID-19 Radiography Database has a sheet for each class beside the class folders (`COVID.metadata.xlsx`, with the
columns FILE NAME and URL): the address is the source. Any other collection can say the same in one `metadata.csv`
beside its class folders, with the column path and source, or patient, or both.
"""

import csv
import difflib
import hashlib
import io
import json
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

from tfrecords_builder.collection.file_kinds import CSV_NAME, IMAGE_SUFFIXES, SHEET_SUFFIX, Note, printable
from tfrecords_builder.collection.find import SourceImage, class_name_of
from tfrecords_builder.common.errors import UserError

PATH_COLUMNS = ("path", "file_name", "filename", "image")
PATIENT_COLUMNS = ("patient", "patient_id", "patientid")
SOURCE_COLUMNS = ("source", "url")
"""Names of the columns of `metadata.csv`, without regard to case; of several that are there, the first is read."""
WELL_COVERED = 0.9
"""Share of the lines that name an image, and of the images that have a line, below which there is a warning."""

_DELIMITERS = ",;\t"
_NO_PATIENT = frozenset({"", "-", "<na>", "n/a", "na", "nan", "none", "null", "unknown"})
_WHOLE_FLOAT = re.compile(r"([0-9]+)\.0+")
_SPELLINGS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of one image; None where nothing is said."""

    source: str | None = None
    """Where the image came from: an address, a hospital, another collection."""
    patient: str | None = None
    """As `normalized_patient` writes it."""


def normalized_patient(text: str) -> str | None:
    """A patient's identifier in the one spelling that is compared; None where the text names no patient.

    Spaces around it and repeated ones, case, and Unicode form (NFKC) make no difference. "12.0" is "12": pandas
    writes a column of numbers with gaps so. Empty text, "nan", "none", "null", "n/a", "na", "unknown" and "-" name
    nobody.
    """
    patient = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    whole = _WHOLE_FLOAT.fullmatch(patient)
    return None if patient in _NO_PATIENT else whole[1] if whole else patient


def read_metadata(root: Path, found: Sequence[SourceImage]) -> dict[str, Metadata]:
    """The metadata of `examine_metadata`, with its errors."""
    return examine_metadata(root, found)[0]


def examine_metadata(root: Path, found: Sequence[SourceImage]) -> tuple[dict[str, Metadata], list[Note]]:
    """What the sheets in `root` say, by path, and how well they fit the images.

    Images of which the sheets say nothing are left out.

    Raises:
        UserError: A sheet cannot be read, lacks a column, contradicts itself, or `metadata.csv` names no image.
    """
    sheets = sorted(root.glob(f"*{SHEET_SUFFIX}"))
    file = root / CSV_NAME
    if file.is_file():
        known, notes = _from_csv(file, found)
        if sheets:
            notes.append(Note(f"{CSV_NAME} is read, and so {len(sheets)} *{SHEET_SUFFIX} are not", warning=True))
        return known, notes
    by_name = {(image.class_name, PurePosixPath(image.path).stem.casefold()): image.path for image in found}
    images = Counter(image.class_name for image in found)
    known, notes = {}, []
    for sheet in sheets:
        class_name = class_name_of(sheet.name.removesuffix(SHEET_SUFFIX))
        lines, strangers, named = 0, [], set()
        for name, source in _from_sheet(sheet):
            # The sheets write NORMAL-1 where the file is Normal-1.png, and some names with their suffix.
            path = by_name.get((class_name, _without_suffix(PurePosixPath(name).name).strip().casefold()))
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


def metadata_digest(metadata: dict[str, Metadata]) -> str | None:
    """SHA-256 of all that is known; None when nothing is."""
    if not metadata:
        return None
    content = sorted((path, *astuple(value)) for path, value in metadata.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _from_csv(file: Path, found: Sequence[SourceImage]) -> tuple[dict[str, Metadata], list[Note]]:
    header, rows = _read_csv(file)
    columns, unused = _columns(file, header)
    find = _finder(found)
    known: dict[str, Metadata] = {}
    strangers: list[str] = []
    spellings: dict[str, set[str]] = defaultdict(set)
    for number, row in rows:
        value = {name: row[place] if place < len(row) else "" for name, place in columns.items()}
        path = find(value["path"].strip())
        if path is None:
            strangers.append(f"line {number}: '{value['path']}'")
            continue
        patient = normalized_patient(value.get("patient", ""))
        if patient is not None:
            spellings[patient].add(value["patient"])
        metadata = Metadata(value.get("source", "").strip() or None, patient)
        if known.setdefault(path, metadata) != metadata:
            raise UserError(f"{file}: line {number}: '{path}' occurs twice, with different values; keep one line")
    if strangers and not known:
        raise UserError(
            f"{file}: none of its {len(strangers):,} lines names an image ({strangers[0]}); paths are relative to "
            f"{file.parent}, such as '{found[0].path}'"
        )
    notes = _line_notes(file.name, len(rows), strangers)
    for name in ("patient", "source"):
        covered = sum(getattr(metadata, name) is not None for metadata in known.values())
        if name in columns and covered < len(found):
            notes.append(_coverage(file.name, covered, len(found), f"images have a {name}"))
    several = [sorted(texts) for texts in spellings.values() if len(texts) > 1]
    if several:
        shown = ", ".join(f"'{printable(text)}'" for text in several[0][:_SPELLINGS_SHOWN])
        what = f"{len(several):,} patients are spelt in several ways, each taken as one patient ({shown})"
        notes.append(Note(f"{file.name}: {what}"))
    if unused:
        text = f"{file.name}: columns that are not read: {', '.join(map(printable, unused))}"
        notes.append(Note(text, warning=any(name.endswith("?)") for name in unused)))
    return known, notes


def _read_csv(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The fields of the first line, and those of all others that are not empty, with the numbers of their lines."""
    try:
        # Line ends of Windows and of old Macs become those of Unix.
        text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=None).read()
        first = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first.count)
        lines = csv.reader(io.StringIO(text), strict=True, delimiter=delimiter)
        header = next(lines, [])
        rows = [(lines.line_num, row) for row in lines if any(field.strip() for field in row)]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fix or remove it") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is not a CSV file in UTF-8 ({error}); fix or remove it") from error
    for number, row in rows:
        if any(field.strip() for field in row[len(header) :]):
            raise UserError(
                f"{file}: line {number} has {len(row)} fields where the first line has {len(header)}; quote fields "
                f"that hold '{delimiter}'"
            )
    return header, rows


def _columns(file: Path, header: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The places of path, patient and source, and the names of the columns that are not read."""
    names = [re.sub(r"[\s_-]+", "_", name.strip().casefold()) for name in header]
    columns = {}
    for meaning, known in (("path", PATH_COLUMNS), ("patient", PATIENT_COLUMNS), ("source", SOURCE_COLUMNS)):
        present = [name for name in known if name in names]
        if present:
            columns[meaning] = names.index(present[0])
    used = set(columns.values())
    unused = [
        name.strip() + _nearest(names[place], columns)
        for place, name in enumerate(header)
        if place not in used and name.strip()
    ]
    if "path" not in columns or len(columns) < 2:
        read = [header[place].strip() for place in sorted(used)]
        raise UserError(
            f"{file}: needs the column path (or {', '.join(PATH_COLUMNS[1:])}), and patient or source (or "
            f"{', '.join((*PATIENT_COLUMNS[1:], *SOURCE_COLUMNS[1:]))}); its columns are "
            f"{', '.join([*read, *unused]) or 'none'}"
        )
    return columns, unused


def _nearest(name: str, columns: Mapping[str, int]) -> str:
    """Advice for a column that is named almost as one that is missing."""
    missing = [meaning for meaning in ("path", "patient", "source") if meaning not in columns]
    near = difflib.get_close_matches(name, missing, 1, 0.7)
    return f" (rename it to {near[0]}?)" if near else ""


def _finder(found: Sequence[SourceImage]) -> Callable[[str], str | None]:
    """Gives the image that a text names: its path, or so much of the path's end that it is no other image.

    Backslashes, case, Unicode form, folders above the source folder and a missing suffix make no difference.
    """
    exact = {image.path for image in found}
    by_name: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
    for path in exact:
        parts = _parts(path)
        for name in {parts[-1], _without_suffix(parts[-1])}:
            by_name[name].append(([*parts[:-1], name], path))

    def find(text: str) -> str | None:
        if text in exact:
            return text
        parts = _parts(text)
        if not parts:
            return None
        paths = []
        for own, path in by_name.get(parts[-1], ()):
            length = min(len(own), len(parts))
            if own[-length:] == parts[-length:]:
                paths.append(path)
        return paths[0] if len(paths) == 1 else None

    return find


def _parts(path: str) -> list[str]:
    text = unicodedata.normalize("NFC", path.replace("\\", "/")).casefold()
    return [part for part in text.split("/") if part not in ("", ".")]


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name


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
