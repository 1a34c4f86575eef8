"""Find the labelled images of a folder: the database's own layout, or one folder per class."""

import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tfrecords_builder.collection.file_kinds import (
    FIXES,
    IMAGES_FOLDER,
    LOST,
    MASKS_FOLDER,
    Note,
    NotTaken,
    Reason,
    count_words,
    not_taken_lines,
    printable,
)
from tfrecords_builder.collection.survey import Folder, Survey
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.splitting.splits import SPLITS

MAX_LOST = 0.01
"""Share of a class's pictures that may be left out without being asked."""
_SHOWN = 3
"""Folders that a message names, at most."""
_MASK_WORDS = r"(?:lungs?[_. -]?)?(?:masks?|seg(?:mentation)?)"
_MASK_NAME = re.compile(rf"{_MASK_WORDS}[_. -]+(?P<after>.+)|(?P<before>.+?)[_. -]+{_MASK_WORDS}")
"""Of a mask that is named after its image: x_mask, mask-x, x_lung_mask, x_seg."""


class SourceImage(NamedTuple):
    """One labelled image file."""

    path: str
    """Relative to the source folder, with forward slashes."""
    class_name: str
    """The class folder's name, spaces as underscores."""
    mask: str | None = None
    """Likewise the path of its lung mask, where there is one."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of a source folder: an image, the mask of one, or counted in `not_taken`."""

    images: tuple[SourceImage, ...]
    """Ordered by path."""
    not_taken: tuple[NotTaken, ...] = ()
    notes: tuple[Note, ...] = ()


def class_name_of(folder: str) -> str:
    """A class is named as its folder, in Unicode's composed form, with spaces as underscores."""
    return "_".join(unicodedata.normalize("NFC", folder).split())


def find_images(root: Path) -> list[SourceImage]:
    """The images of `list_source`, with its errors."""
    return list(list_source(root).images)


def list_source(root: Path, on_error: str = "stop", masks: str = "read") -> Listing:
    """All files below `root`: which are images, which are their masks, and why the others are neither.

    Both `<Class>/images/*.png` (the database's layout) and `<Class>/*.png` are read, class by class, or both.
    Lung masks are in `<Class>/masks`, or beside the images, and named as their image, with "mask" before or behind
    it or without. A folder without anything that looks like an image (of documents, say) is no class.

    Args:
        root: The folder that holds one folder per class.
        on_error: With "skip" a class may lose more than 1 % of its pictures (to other formats, deeper folders, links
            to nothing), but not all.
        masks: With "ignore" no image has a mask, and all masks are counted as ignored.

    Raises:
        UserError: `root` holds no classes, or a class that would be empty, ambiguous or lose pictures.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds one folder per class")
    survey = Survey(root)
    folders = [survey.folders[name] for name in sorted(survey.folders)]
    _check_links(survey)
    _check_empty(root, folders)
    _check_none_lost(root, folders)
    classes = [folder for folder in folders if folder.images]
    _check_classes(root, classes, survey)
    if on_error == "stop":
        _check_few_lost(root, classes)
    images: list[SourceImage] = []
    notes: list[Note] = []
    for folder in folders:
        name = class_name_of(folder.name)
        paths, mask_of = match_masks(folder.images, folder.masks)
        if masks == "ignore":
            mask_of = {}
        images += [SourceImage(path, name, mask_of.get(path)) for path in paths]
        for mask in {*folder.masks, *folder.images}.difference(paths, mask_of.values()):
            folder.count(Reason.MASK_IGNORED if masks == "ignore" else Reason.MASK_UNUSED, mask)
        if mask_of and len(mask_of) < len(paths):
            notes.append(Note(f"{len(paths) - len(mask_of):,} of {len(paths):,} images of {name} have no mask"))
    for image in images:
        if image.path.encode(errors="ignore").decode() != image.path:
            raise UserError(f"{root}: the file name {image.path!a} is not Unicode; rename it")
    empty = sorted(path for folder in folders for path in folder.empty_folders)
    if empty:
        notes.append(Note(f"empty folders: {_some(map(printable, empty))}"))
    links = sorted(f"{alias.path} -> {alias.target}" for alias in survey.aliases)
    if links:
        notes.append(Note(f"links to folders that are read already are not followed: {_some(map(printable, links))}"))
    not_taken = [item for folder in (survey.loose, *folders) for item in folder.not_taken]
    return Listing(tuple(sorted(images, key=lambda image: image.path)), tuple(not_taken), tuple(notes))


def match_masks(images: Sequence[str], masks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The images of a class that are no masks, and the mask of each that has one, by path.

    A mask belongs to the image of its name. Without one, it belongs to the image whose name it has without regard to
    case and without the word "mask", if no other mask does. So does a file among the images, if the image is there.
    """
    maybe = [path for path in images if "mask" in (name := path.lower()) or "seg" in name]  # most collections: none
    if not masks and not maybe:
        return list(images), {}
    stems = {path: _stem(path) for path in images}
    mask_of_stem: dict[str, str] = {}
    for mask in sorted(masks):
        mask_of_stem.setdefault(_stem(mask), mask)
    mask_of = {path: mask_of_stem[stem] for path, stem in stems.items() if stem in mask_of_stem}
    if len(mask_of) == len(stems) and not maybe:
        return list(images), mask_of
    named = Counter(stem.casefold() for stem in stems.values())
    drawn = {path for path in maybe if _without_mask_word(stems[path]) in named}
    others: dict[str, list[str]] = {}
    for mask in sorted({*masks, *drawn} - set(mask_of.values())):
        name = _stem(mask).casefold()
        key = name if name in named and mask not in drawn else _without_mask_word(name)
        others.setdefault(key or name, []).append(mask)
    taken = [path for path in images if path not in drawn]
    for path in taken:
        name = stems[path].casefold()
        if path not in mask_of and named[name] == 1 and len(others.get(name, ())) == 1:
            mask_of[path] = others[name][0]
    return taken, {path: mask_of[path] for path in taken if path in mask_of}


def read_split_file(path: Path, known: Collection[str]) -> tuple[dict[str, str], str]:
    """The split of each image by path, and the file's SHA-256, from a CSV with the columns path and split.

    Raises:
        UserError: The file cannot be read, lacks a column, or has a line that names no image of `known`, no split,
            or an image a second time.
    """
    try:
        data = path.read_bytes()
        lines = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a CSV file as --split-file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file in UTF-8 ({error}); fix it") from error
    split_of: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        image, split = line.get("path"), line.get("split")
        if image is None or split is None:
            raise UserError(f"{path}: needs the columns path and split in its first line, and both in line {number}")
        if image not in known:
            raise UserError(f"{path}: line {number}: '{image}' is not an image of the source; remove the line")
        if split not in SPLITS:
            raise UserError(f"{path}: line {number}: split '{split}' is not one of {', '.join(SPLITS)}")
        if split_of.setdefault(image, split) != split:
            raise UserError(f"{path}: line {number}: '{image}' is in two splits; keep one line")
    return split_of, hashlib.sha256(data).hexdigest()


def class_counts(images: Sequence[SourceImage]) -> dict[str, int]:
    """Images per class, in class order (alphabetical): the position is the label."""
    counts = Counter(image.class_name for image in images)
    return {name: counts[name] for name in sorted(counts)}


def _check_links(survey: Survey) -> None:
    """No link puts the images of one class into another."""
    for alias in sorted(survey.aliases, key=lambda alias: alias.path):
        target = survey.folders.get(alias.target.partition("/")[0])
        if target is not None and target.images and alias.path.partition("/")[0] != target.name:
            raise UserError(
                f"{survey.root}: '{printable(alias.path)}' is a link to '{printable(alias.target)}', so its images "
                "would be in two classes; remove the link"
            )


def _check_empty(root: Path, folders: Iterable[Folder]) -> None:
    for folder in folders:
        missing = not folder.images and not any(item.reason in LOST for item in folder.not_taken)
        masks = folder.masks and folder.name.casefold() != MASKS_FOLDER
        if missing and (folder.is_empty or folder.has_images_folder or masks):
            # It was meant as a class. To leave it out in silence would train a model without it.
            raise UserError(
                f"{root / printable(folder.name)}: this class folder contains no image; add images or remove the folder"
            )


def _check_none_lost(root: Path, folders: Sequence[Folder]) -> None:
    """No folder of pictures vanishes as a class because none of them is taken."""
    words, reasons = _losses([folder for folder in folders if not folder.images], 0.0)
    if not words:
        return
    fixes = [FIXES[reason] for reason in LOST if reason in reasons]
    if Reason.NESTED in reasons and not any(folder.images for folder in folders):
        alone = printable(folders[0].name)
        fixes.append(f"give {root / alone}" if len(folders) == 1 else "give a folder that holds one folder per class")
    fixes.append("remove the folder")
    raise UserError(f"{root}: images would be lost: {_some(words)}; {', or '.join(fixes)}")


def _check_few_lost(root: Path, classes: Sequence[Folder]) -> None:
    """No class loses more than MAX_LOST of its pictures."""
    words, reasons = _losses(classes, MAX_LOST)
    if words:
        fixes = ", or ".join(FIXES[reason] for reason in LOST if reason in reasons)
        raise UserError(
            f"{root}: images would be lost: {_some(words)}; {fixes}, or leave them out (build --on-error skip)"
        )


def _losses(folders: Iterable[Folder], share: float) -> tuple[list[str], set[Reason]]:
    """The folders that lose more than a share of their pictures, in words, and the reasons."""
    words, reasons = [], set()
    for folder in folders:
        lost = [item for item in folder.not_taken if item.reason in LOST]
        files = sum(item.files for item in lost)
        if files > share * (files + len(folder.images)):
            reasons |= {item.reason for item in lost}
            by_reason = [[item for item in lost if item.reason is reason] for reason in LOST]
            kinds = ", ".join(f"{count_words(items)}: {items[0].reason}" for items in by_reason if items)
            words.append(f"{printable(folder.name)} {files:,} of {files + len(folder.images):,} ({kinds})")
    return words, reasons


def _check_classes(root: Path, classes: Sequence[Folder], survey: Survey) -> None:
    """Every folder with images is a class, and each another one."""
    if not classes:
        seen = [item for folder in (survey.loose, *survey.folders.values()) for item in folder.not_taken]
        lines = not_taken_lines(seen)
        raise UserError(
            f"{root}: contains no class folder with images; expected <Class>/images/*.png or <Class>/*.png (or .jpg)"
            + (f"; it contains: {_some(lines)}" if lines else "")
        )
    names: dict[str, str] = {}
    for folder in classes:
        if folder.name.casefold() in (IMAGES_FOLDER, MASKS_FOLDER):
            raise UserError(f"{root}: looks like the folder of one class; give the folder above it")
        name = class_name_of(folder.name)
        other = names.setdefault(unicodedata.normalize("NFKC", name).casefold(), folder.name)
        if other != folder.name:
            alike = "both class" if class_name_of(other) == name else "but for case or Unicode form both class"
            raise UserError(f"{root}: folders {other!a} and {folder.name!a} are {alike} '{name}'; rename or merge one")


def _without_mask_word(stem: str) -> str | None:
    """The name of a mask's image, without regard to case; None for what is not named so."""
    match = _MASK_NAME.fullmatch(stem.casefold())
    return (match["before"] or match["after"]) if match else None


def _some(words: Iterable[str]) -> str:
    texts = list(words)
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _stem(path: str) -> str:
    """The file's name without suffix. Not by `Path`, which takes most of the time of a listing."""
    return path.rpartition("/")[2].rpartition(".")[0]
