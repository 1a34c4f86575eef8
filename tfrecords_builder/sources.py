"""Find the labelled images of a folder: the database's own layout, or one folder per class."""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder.errors import UserError
from tfrecords_builder.splits import SPLITS

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
# Folders of the database that are not classes, and that lie beside the images inside a class.
IMAGES_FOLDER = "images"
MASKS_FOLDER = "masks"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One labelled image file."""

    path: str
    """Relative to the source folder, with forward slashes."""
    class_name: str
    """The class folder's name, spaces as underscores."""
    mask: str | None = None
    """Likewise the path of its lung mask, where there is one."""


def class_name_of(folder: str) -> str:
    """A class is named as its folder, with spaces as underscores."""
    return "_".join(folder.split())


def find_images(root: Path) -> list[SourceImage]:
    """All images below `root`, ordered by path.

    Both `<Class>/images/*.png` (the database's layout) and `<Class>/*.png` are understood, class by class; a class
    that has both kinds keeps both. Lung masks are the files of the images' names in `<Class>/masks`. Hidden files
    and folders are ignored, and so is a folder that holds other files only (documents, say).

    Raises:
        UserError: `root` is missing, holds no class folder with images, is itself a class folder, or
            holds an empty class folder, two folders that would be the same class, or a name that is not
            Unicode.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds one folder per class")
    images: list[SourceImage] = []
    folders: dict[str, str] = {}
    for folder in sorted(root / entry.name for entry in _visible(root) if entry.is_dir()):
        found = _images_of_class(folder)
        if not found:
            if not _visible(folder) or (folder / IMAGES_FOLDER).is_dir():
                # It was meant as a class. To leave it out in silence would train a model without it.
                raise UserError(f"{folder}: this class folder holds no image; add images or remove the folder")
            continue
        if folder.name in (IMAGES_FOLDER, MASKS_FOLDER):
            raise UserError(f"{root}: looks like the folder of one class; give the folder above it")
        name = class_name_of(folder.name)
        if name in folders:
            raise UserError(
                f"{root}: folders '{folders[name]}' and '{folder.name}' are both class '{name}'; rename or merge one"
            )
        folders[name] = folder.name
        masks = _masks_of_class(folder)
        images += [SourceImage(path, name, masks.get(_stem(path))) for path in found]
    if not images:
        raise UserError(
            f"{root}: holds no class folder with images; expected <Class>/images/*.png or <Class>/*.png (or .jpg)"
        )
    for image in images:
        if not _is_unicode(image.path):
            raise UserError(f"{root}: the file name {image.path!a} is not Unicode; rename it")
    return sorted(images, key=lambda image: image.path)


def read_split_file(path: Path, known: Collection[str]) -> tuple[dict[str, str], str]:
    """The split of each image by path, and the file's SHA-256, from a CSV with the columns path and split.

    Args:
        path: The file. Lines of further columns are fine.
        known: The paths of all source images.

    Raises:
        UserError: The file cannot be read, lacks a column, or has a line that names no image of the source, no split,
            or an image a second time.
    """
    try:
        data = path.read_bytes()
        lines = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a CSV file as --split-file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV file in UTF-8 ({error}); mend it") from error
    split_of: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        image, split = line.get("path"), line.get("split")
        if image is None or split is None:
            raise UserError(f"{path}: needs the columns path and split in its first line, and both in line {number}")
        if image not in known:
            raise UserError(f"{path}: line {number}: '{image}' is no image of the source; remove the line")
        if split not in SPLITS:
            raise UserError(f"{path}: line {number}: split '{split}' is none of {', '.join(SPLITS)}")
        if split_of.setdefault(image, split) != split:
            raise UserError(f"{path}: line {number}: '{image}' is in two splits; keep one line")
    return split_of, hashlib.sha256(data).hexdigest()


def class_counts(images: list[SourceImage]) -> dict[str, int]:
    """Images per class, in class order (alphabetical): the position is the label."""
    counts = Counter(image.class_name for image in images)
    return {name: counts[name] for name in sorted(counts)}


def _images_of_class(folder: Path) -> list[str]:
    """Relative to the source folder."""
    inner = folder / IMAGES_FOLDER
    holders = [folder, inner] if inner.is_dir() else [folder]
    return [path for holder in holders for path, entry in _image_entries(holder, folder.parent) if entry.is_file()]


def _masks_of_class(folder: Path) -> dict[str, str]:
    """By name without suffix; relative to the source folder."""
    masks = folder / MASKS_FOLDER
    if not masks.is_dir():
        return {}
    return {_stem(path): path for path in sorted(path for path, _ in _image_entries(masks, folder.parent))}


def _image_entries(folder: Path, root: Path) -> "list[tuple[str, os.DirEntry[str]]]":
    """What is named as an image is, with its path relative to `root`."""
    prefix = folder.relative_to(root).as_posix()
    return [
        (f"{prefix}/{entry.name}", entry)
        for entry in _visible(folder)
        if f".{entry.name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
    ]


def _stem(path: str) -> str:
    """The file's name without suffix. Not by `Path`, which takes most of the time of a listing."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _visible(folder: Path) -> "list[os.DirEntry[str]]":
    """Entries, which know what they are without another question to the file system."""
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except PermissionError as error:
        raise UserError(f"{folder}: no permission to read this folder; grant it or remove the folder") from error


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
