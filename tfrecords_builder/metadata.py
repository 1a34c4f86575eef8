"""What is known of an image beside its pixels: where it came from, and whose it is.

The COVID-19 Radiography Database has a sheet for each class beside the class folders (`COVID.metadata.xlsx`, with the
columns FILE NAME and URL): the address is the source. Any other collection can say the same in one `metadata.csv`
beside its class folders, with the column path and source, or patient, or both.
"""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

from tfrecords_builder.errors import UserError
from tfrecords_builder.sources import SourceImage, class_name_of

SHEET_SUFFIX = ".metadata.xlsx"
CSV_NAME = "metadata.csv"


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of one image; None where nothing is said."""

    source: str | None = None
    """Where the image came from: an address, a hospital, another collection."""
    patient: str | None = None


def read_metadata(root: Path, found: Sequence[SourceImage]) -> dict[str, Metadata]:
    """What the sheets in `root` say, by path; images of which they say nothing are left out.

    Raises:
        UserError: A sheet cannot be read, or lacks a column.
    """
    file = root / CSV_NAME
    if file.is_file():
        return _from_csv(file, found)
    by_name = {(image.class_name, PurePosixPath(image.path).stem.casefold()): image.path for image in found}
    known: dict[str, Metadata] = {}
    for sheet in sorted(root.glob(f"*{SHEET_SUFFIX}")):
        class_name = class_name_of(sheet.name.removesuffix(SHEET_SUFFIX))
        for name, source in _from_sheet(sheet):
            # The sheets write NORMAL-1 where the file is Normal-1.png, and some names with their suffix.
            path = by_name.get((class_name, PurePosixPath(name).name.removesuffix(".png").strip().casefold()))
            if path is not None:
                known[path] = Metadata(source=source)
    return known


def metadata_digest(metadata: dict[str, Metadata]) -> str | None:
    """SHA-256 of all that is known; None when nothing is."""
    if not metadata:
        return None
    content = sorted((path, *astuple(value)) for path, value in metadata.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _from_csv(file: Path, found: Sequence[SourceImage]) -> dict[str, Metadata]:
    try:
        lines = csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig")), strict=True)
        rows = list(lines)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); mend or remove it") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no CSV file in UTF-8 ({error}); mend or remove it") from error
    columns = set(lines.fieldnames or ())
    if "path" not in columns or not columns & {"source", "patient"}:
        raise UserError(f"{file}: needs the column path, and source or patient, in its first line")
    paths = {image.path for image in found}
    known: dict[str, Metadata] = {}
    for number, row in enumerate(rows, start=2):
        path = row["path"]
        if path not in paths:
            raise UserError(f"{file}: line {number}: '{path}' is no image of the source; remove the line")
        if path in known:
            raise UserError(f"{file}: line {number}: '{path}' is there a second time; keep one line")
        known[path] = Metadata(row.get("source") or None, row.get("patient") or None)
    return known


def _from_sheet(sheet: Path) -> Iterator[tuple[str, str]]:
    """File name and address of each line that has both."""
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(sheet, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, InvalidFileException) as error:
        raise UserError(f"{sheet}: cannot be read as a sheet ({error}); mend or remove it") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        header = [str(value or "").strip().casefold() for value in next(rows, ())]
        if "file name" not in header or "url" not in header:
            raise UserError(f"{sheet}: needs the columns FILE NAME and URL in its first line; mend or remove it")
        name, url = header.index("file name"), header.index("url")
        for row in rows:
            if len(row) > max(name, url) and row[name] and row[url]:
                yield str(row[name]), str(row[url]).strip()
    finally:
        book.close()
