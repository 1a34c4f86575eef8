"""The labelled images of a folder whose folders name the classes, and what is wrong with such a folder."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from tfrecords_builder.collection.layout import Folder, Layout, Sorted, join, name_of, recognise, sort_files
from tfrecords_builder.collection.masks import match_masks
from tfrecords_builder.collection.scan import Tree, scan
from tfrecords_builder.common.errors import UserError

MAX_LOST = 0.01
"""Share of a class's pictures that may be left out without being asked."""
_SHOWN = 3
"""Folders that a message names, at most."""


class SourceImage(NamedTuple):
    """One labelled image file."""

    path: str
    """Relative to the source folder, with forward slashes."""
    class_name: str
    """The class folder's name, or its label in a table, spaces as underscores."""
    mask: str | None = None
    """Likewise the path of its lung mask, where there is one."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of a source folder: an image, the mask of one, or counted in `not_taken`."""

    images: tuple[SourceImage, ...]
    """Ordered by path."""
    not_taken: tuple[NotTaken, ...] = ()
    notes: tuple[Note, ...] = ()
    split_of: Mapping[str, str] = field(default_factory=dict)
    """The split by path, where folders give one."""


def class_name_of(folder: str) -> str:
    """A class is named as its folder, in Unicode's composed form, with spaces as underscores."""
    return "_".join(unicodedata.normalize("NFC", folder).split())


def class_counts(images: Sequence[SourceImage]) -> dict[str, int]:
    """Images per class, in class order (alphabetical): the position is the label."""
    counts = Counter(image.class_name for image in images)
    return {name: counts[name] for name in sorted(counts)}


def list_source(root: Path, on_error: str = "stop", masks: str = "read") -> Listing:
    """All files below `root`: which are images, which are their masks, and why the others are neither.

    A class folder's images lie in it or in folders below it (`<Class>/*.png`, `<Class>/images/*.png`,
    `<Class>/<patient>/*.png`). The class folders lie in `root`, in the one folder with pictures in it, or in folders
    named as splits; see `layout.recognise`. Lung masks are in folders `masks`, or beside the images, and named as their
    image, with "mask" before or behind it or without. A folder without anything that looks like an image is no class.

    Args:
        root: The folder of the collection.
        on_error: With "skip" a class may lose more than 1 % of its pictures (to other formats, links to nothing), or
            all of them, and a note says so.
        masks: With "ignore" no image has a mask, and all masks are counted as ignored.

    Raises:
        UserError: `root` holds no classes, or a class that would be empty, ambiguous or lose pictures.
    """
    tree = scan_folder(root)
    layout = recognise(tree)
    return list_classes(tree, layout, sort_files(tree, layout), on_error, masks)


def scan_folder(root: Path) -> Tree:
    """The walk over a collection's folder; UserError when it is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds one folder per class")
    return scan(root)


def list_classes(tree: Tree, layout: Layout, files: Sorted, on_error: str, masks: str) -> Listing:
    """`list_source` of a walk whose files are sorted."""
    root = tree.root
    folders = [files.folders[path] for path in sorted(files.folders)]
    if layout.alike:
        raise UserError(
            f"{root}: the folders {some(map(printable, layout.alike))} hold folders of the same names, so it is "
            "unclear which are the classes; give one of them, or name the classes in a table (--labels)"
        )
    _check_links(tree, layout, files)
    _check_empty(root, folders)
    lost = _losses([folder for folder in folders if not folder.images], 0.0)
    notes = []
    classes = [folder for folder in folders if folder.images]
    if on_error == "stop" or not classes:
        skip = ", or leave them out (build --on-error skip)"
        _check_lost(root, lost, ", or remove the folder" + (skip if classes else ""))
        _check_classes(root, classes, files)
        _check_lost(root, _losses(classes, MAX_LOST), skip)
    else:
        _check_classes(root, classes, files)
        notes = [Note(f"no class, as none of its pictures is taken: {words}", warning=True) for words in lost.words]
        notes += [Note(f"left out by --on-error skip: {words}", True) for words in _losses(classes, MAX_LOST).words]
    images, mask_notes = match_folders(folders, masks)
    check_names(root, images)
    split_of = {image.path: split for image in images if (split := layout.split_of(image.path)) is not None}
    notes += [*_layout_notes(layout, classes), *mask_notes, *tree_notes(tree, files)]
    return Listing(tuple(sorted(images, key=lambda image: image.path)), files.not_taken, tuple(notes), split_of)


def match_folders(
    folders: Sequence[Folder], masks: str, class_of: Mapping[str, str] | None = None
) -> tuple[list[SourceImage], list[Note]]:
    """The images of class folders with their masks; what is neither is counted in the folders.

    Args:
        folders: Those of one collection.
        masks: "read" or "ignore".
        class_of: The class by path; an image without one is counted. None: the class is the folder's.
    """
    images: list[SourceImage] = []
    notes: list[Note] = []
    for folder in folders:
        name = class_name_of(folder.name)
        paths, mask_of = match_masks(folder.images, folder.masks)
        if class_of is not None:
            named = [path for path in folder.images if path in class_of]  # an image, whatever its name looks like
            mask_of = {path: mask for path, mask in mask_of.items() if mask not in class_of}
            paths = list(dict.fromkeys([*paths, *named]))
        if masks == "ignore":
            mask_of = {}
        for mask in {*folder.masks, *folder.images}.difference(paths, mask_of.values()):
            folder.count(Reason.MASK_IGNORED if masks == "ignore" else Reason.MASK_UNUSED, mask)
        if class_of is None:
            images += [SourceImage(path, name, mask_of.get(path)) for path in paths]
        else:
            images += [SourceImage(path, class_of[path], mask_of.get(path)) for path in paths if path in class_of]
            without = [path for path in paths if path not in class_of]
            for path in without:
                folder.count(Reason.UNLABELLED, path)
            for mask in {mask_of[path] for path in without if path in mask_of}.difference(
                mask_of[path] for path in paths if path in class_of and path in mask_of
            ):
                folder.count(Reason.MASK_UNUSED, mask)
        if mask_of and len(mask_of) < len(paths):
            of = f" of {name}" if name else ""
            notes.append(Note(f"{len(paths) - len(mask_of):,} of {len(paths):,} images{of} have no mask"))
    return images, notes


def tree_notes(tree: Tree, files: Sorted) -> list[Note]:
    """What is said of folders that hold nothing, and of those that are read under another name."""
    notes = []
    empty = sorted(path for folder in (files.loose, *files.folders.values()) for path in folder.empty_folders)
    if empty:
        notes.append(Note(f"empty folders: {some(map(printable, empty))}"))
    links = sorted(f"{alias.path} -> {alias.target}" for alias in tree.aliases)
    if links:
        notes.append(Note(f"links to folders that are read already are not followed: {some(map(printable, links))}"))
    return notes


def check_names(root: Path, images: Iterable[SourceImage]) -> None:
    """A path must be Unicode, as records hold it."""
    for image in images:
        if image.path.encode(errors="ignore").decode() != image.path:
            raise UserError(f"{root}: the file name {image.path!a} is not Unicode; rename it")


def one_class(name: str) -> str:
    """What two names of classes have in common that differ but for case or Unicode form."""
    return unicodedata.normalize("NFKC", name).casefold()


def _layout_notes(layout: Layout, classes: Sequence[Folder]) -> list[Note]:
    notes = []
    if layout.splits:
        folders = ", ".join(f"{printable(folder)} ({split})" for folder, split in layout.splits.items())
        notes.append(Note(f"folders of a given split: {folders}"))
    elif layout.base:
        notes.append(Note(f"the classes are the folders of {printable(layout.base)}"))
    deeper: dict[str, list[str]] = {}
    for folder in classes:
        known = {folder.path, *(path for path in _folders_of(folder) if name_of(path).casefold() == IMAGES_FOLDER)}
        deeper.setdefault(class_name_of(folder.name), []).extend(
            path for path in folder.images if path.rpartition("/")[0] not in known
        )
    words = [f"{len(paths):,} of {name} ({printable(min(paths))})" for name, paths in deeper.items() if paths]
    if words:
        what = "where these are patients, say so in a table (metadata.csv)"
        notes.append(Note(f"images in folders below their class folder: {some(words)}; {what}"))
    return notes


def _folders_of(folder: Folder) -> set[str]:
    """The folders directly in a class folder that hold images."""
    folders = {path.rpartition("/")[0] for path in folder.images}
    return {path for path in folders if path.rpartition("/")[0] == folder.path}


def _check_links(tree: Tree, layout: Layout, files: Sorted) -> None:
    """No link puts the images of one class into another."""
    bases = {base: f"{base}/" if base else "" for base in layout.bases}

    def class_folder(path: str) -> Folder | None:
        for base, prefix in bases.items():
            if path.startswith(prefix) and path != base:
                return files.folders.get(join(base, path[len(prefix) :].partition("/")[0]))
        return None

    for alias in sorted(tree.aliases, key=lambda alias: alias.path):
        own, target = class_folder(alias.path), class_folder(alias.target)
        if target is not None and target.images and (own is None or own.name != target.name):
            raise UserError(
                f"{tree.root}: '{printable(alias.path)}' is a link to '{printable(alias.target)}', so its images "
                "would be in two classes; remove the link"
            )


def _check_empty(root: Path, folders: Sequence[Folder]) -> None:
    full = {folder.name for folder in folders if folder.images}
    for folder in folders:
        missing = not folder.images and not any(item.reason in LOST for item in folder.not_taken)
        masks = folder.masks and folder.name.casefold() != MASKS_FOLDER
        if missing and folder.name not in full and (folder.is_empty or folder.has_images_folder or masks):
            # It was meant as a class. To leave it out in silence would train a model without it.
            raise UserError(
                f"{root / printable(folder.path)}: this class folder contains no image; add images or remove the folder"
            )


@dataclass(frozen=True, slots=True)
class Losses:
    """Classes that lose pictures, in words, and why they do."""

    words: tuple[str, ...]
    reasons: frozenset[Reason]


def _check_lost(root: Path, lost: Losses, leave: str) -> None:
    if lost.words:
        fixes = ", or ".join(FIXES[reason] for reason in LOST if reason in lost.reasons)
        raise UserError(f"{root}: images would be lost: {some(lost.words)}; {fixes}{leave}")


def _losses(folders: Iterable[Folder], share: float) -> Losses:
    """The folders that lose more than a share of their pictures."""
    words, reasons = [], set()
    for folder in folders:
        lost = [item for item in folder.not_taken if item.reason in LOST]
        files = sum(item.files for item in lost)
        if files > share * (files + len(folder.images)):
            reasons |= {item.reason for item in lost}
            by_reason = [[item for item in lost if item.reason is reason] for reason in LOST]
            kinds = ", ".join(f"{count_words(items)}: {items[0].reason}" for items in by_reason if items)
            words.append(f"{printable(folder.path)} {files:,} of {files + len(folder.images):,} ({kinds})")
    return Losses(tuple(words), frozenset(reasons))


def _check_classes(root: Path, classes: Sequence[Folder], files: Sorted) -> None:
    """Every folder with images is a class, and each another one."""
    if not classes:
        lines = not_taken_lines(files.not_taken)
        raise UserError(
            f"{root}: contains no class folder with images; expected <Class>/*.png, <Class>/images/*.png, "
            "train|val|test/<Class>/*.png, or a table (--labels)" + (f"; it contains: {some(lines)}" if lines else "")
        )
    names: dict[str, str] = {}
    for folder in classes:
        if folder.name.casefold() in (IMAGES_FOLDER, MASKS_FOLDER):
            raise UserError(
                f"{root}: looks like the folder of one class; give the folder above it, or a table of labels (--labels)"
            )
        name = class_name_of(folder.name)
        other = names.setdefault(one_class(name), folder.path)
        if name_of(other) != folder.name:
            alike = "both class" if class_name_of(name_of(other)) == name else "but for case or Unicode form both class"
            raise UserError(f"{root}: folders {other!a} and {folder.path!a} are {alike} '{name}'; rename or merge one")


def some(words: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    texts = list(words)
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
