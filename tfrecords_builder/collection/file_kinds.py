"""What a file of a source folder is: told by its name and, where that says nothing, by its first bytes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path

from tfrecords_builder.common.files import head_of

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})
IMAGE_SUFFIXES = DICOM_SUFFIXES | {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp"}
"""Of the files that are read as images, in lower case."""
# Folders of the database that are not classes, and that lie beside the images inside a class.
IMAGES_FOLDER = "images"
MASKS_FOLDER = "masks"
CSV_NAME = "metadata.csv"
SHEET_SUFFIX = ".metadata.xlsx"

_PICTURES = frozenset({
    ".avif", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".mha", ".mhd", ".nii", ".nrrd", ".pbm", ".pgm",
    ".pnm", ".ppm",
})  # fmt: skip
_DOCUMENTS = frozenset({
    ".bib", ".csv", ".doc", ".docx", ".htm", ".html", ".ipynb", ".json", ".jsonl", ".log", ".md", ".odt",
    ".ods", ".pdf", ".py", ".rst", ".rtf", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
})  # fmt: skip
_DOCUMENT_NAMES = frozenset({"citation", "copying", "dicomdir", "license", "licence", "makefile", "readme"})
_SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"})
_SYSTEM_FOLDERS = frozenset({"$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information"})
_READABLE_HEADS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_OTHER_HEADS = (b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  ")
_HEAD_BYTES = 132
_SUFFIX = re.compile(r"\.(?=[^.]*[a-z])[a-z0-9]{1,8}")
"""A suffix is short and has a letter: DICOM files named by number would have as many suffixes as files."""


class Reason(StrEnum):
    """Why a file is not taken. The value completes "12 .tif: ..."."""

    HIDDEN = "hidden files"
    SYSTEM = "files of the operating system"
    SHEET = "metadata of the images"
    DOCUMENT = "documents"
    MASK_IGNORED = "masks, which were to be ignored"
    FOLDER_LINK = "links to folders that are read already"
    OTHER = "files of unknown kind"
    MASK_UNUSED = "masks of no image, or of several"
    LOOSE = "images outside of the class folders"
    FILE_LINK = "links to images that are taken already"
    FORMAT = "images in another format"
    UNNAMED = "images without the suffix of their format"
    UNLABELLED = "images without a label in the table"
    BESIDE = "images beside the folders of the splits"
    BROKEN = "links to nothing"
    SPECIAL = "neither files nor folders"
    EXCLUDED = "left out by --exclude"


EXPECTED = (
    Reason.HIDDEN, Reason.SYSTEM, Reason.SHEET, Reason.DOCUMENT, Reason.MASK_IGNORED, Reason.FOLDER_LINK
)  # fmt: skip
"""What lies in a collection without being missed: counted in one line."""
LOST = (Reason.FORMAT, Reason.UNNAMED, Reason.BESIDE, Reason.BROKEN, Reason.SPECIAL)
"""What looks like an image of its class and is not taken."""
FIXES = {
    Reason.FORMAT: "convert images of another format to PNG, TIFF or DICOM",
    Reason.UNNAMED: "give images the suffix of their format",
    Reason.BESIDE: "move the folder away from those of the splits",
    Reason.BROKEN: "fetch what links lead to (git annex get, dvc pull)",
    Reason.SPECIAL: "remove what is neither file nor folder",
}


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Files of the source folder that are neither images nor masks of the dataset."""

    folder: str
    """The folder in the source folder that they are in; "" for the source folder itself."""
    reason: Reason
    suffix: str
    """In lower case, with its dot; "" for none."""
    files: int
    example: str
    """The first of them, by path; a link with its target."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence about a collection."""

    text: str
    warning: bool = False
    """Whether it can make a dataset worse than its owner thinks."""


def suffix_of(name: str) -> str:
    """What follows the last dot, in lower case, with the dot; "" where that is no suffix."""
    stem, dot, end = name.rpartition(".")
    suffix = f"{dot}{end.lower()}"
    if stem.lower().endswith(".nii") and suffix == ".gz":
        return ".nii"
    return suffix if stem and _SUFFIX.fullmatch(suffix) else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden on Unix."""
    return name.startswith(".")


def is_system_folder(name: str) -> bool:
    """Whether an operating system or a file server makes such a folder."""
    return name.casefold() in _SYSTEM_FOLDERS


def is_leftover(name: str) -> Reason | None:
    """The reason, for a file that programs leave and nobody put there; None for any other."""
    if is_hidden(name):
        return Reason.HIDDEN
    return Reason.SYSTEM if name.casefold() in _SYSTEM_FILES or name.startswith("~$") else None


def is_document(name: str) -> bool:
    """Whether a file is for people or for programs other than this."""
    return suffix_of(name) in _DOCUMENTS or name.casefold() in _DOCUMENT_NAMES


def is_picture(name: str) -> bool:
    """Whether a file is named as an image, of whatever format."""
    suffix = suffix_of(name)
    return suffix in IMAGE_SUFFIXES or suffix in _PICTURES


def may_be_dicom(name: str) -> bool:
    """Whether a file that is taken as an image is DICOM by its suffix, or for want of one."""
    suffix = suffix_of(name)
    return not suffix or suffix in DICOM_SUFFIXES


def is_unnamed_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes and has no suffix, as archives export it: it is read all the same."""
    return not suffix_of(path.name) and head_of(path, _HEAD_BYTES)[128:] == b"DICM"


def picture_by_content(path: Path) -> Reason | None:
    """Whether a file begins as an image does: UNNAMED for formats that are read, FORMAT for others, None for none."""
    head = head_of(path, _HEAD_BYTES)
    bitmap = head.startswith(b"BM") and head[6:10] == bytes(4)
    webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    if head.startswith(_READABLE_HEADS) or bitmap or webp or head[128:] == b"DICM":
        return Reason.UNNAMED
    return Reason.FORMAT if head.startswith(_OTHER_HEADS) else None


def printable(path: str) -> str:
    """A path as it can be printed and written as UTF-8, whatever bytes its name has."""
    text = path.encode(errors="backslashreplace").decode()
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def count_words(items: Iterable[NotTaken]) -> str:
    """The files by suffix, the commonest first: "12 .tif, 3 .dcm, 1 without suffix"."""
    counts: dict[str, int] = {}
    for item in items:
        counts[item.suffix] = counts.get(item.suffix, 0) + item.files
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{files:,} {suffix or 'without suffix'}" for suffix, files in ordered)


def not_taken_lines(not_taken: Sequence[NotTaken]) -> list[str]:
    """For people: a line for each folder and reason, and one for all that is expected in a collection."""
    lines = []
    missed = sorted(
        (item for item in not_taken if item.reason not in EXPECTED), key=lambda item: (item.folder, item.reason)
    )
    for (folder, reason), group in groupby(missed, key=lambda item: (item.folder, item.reason)):
        items = list(group)
        where = f"{folder}: " if folder else ""
        lines.append(f"not taken: {where}{count_words(items)}: {reason} ({min(item.example for item in items)})")
    expected = {
        reason: sum(item.files for item in not_taken if item.reason == reason)
        for reason in EXPECTED
        if any(item.reason == reason for item in not_taken)
    }
    if expected:
        words = ", ".join(f"{reason}: {files:,}" for reason, files in expected.items())
        lines.append(f"other files: {sum(expected.values()):,} ({words})")
    return lines
