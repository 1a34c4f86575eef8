"""A whole collection before any of its images is read: images with labels, what is known of them, a given split.

Labels come from folders, or from a table: one that is given, or `metadata.csv` in place (the convention of Hugging
Face's image folders) where folders name no classes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tfrecords_builder.collection.file_kinds import FIXES, LOST, Note, NotTaken, Reason, printable, suffix_of
from tfrecords_builder.collection.find import (
    MAX_LOST,
    SourceImage,
    check_names,
    class_name_of,
    list_classes,
    match_folders,
    one_class,
    scan_folder,
    some,
    tree_notes,
)
from tfrecords_builder.collection.layout import Layout, Sorted, name_of, recognise, sort_files
from tfrecords_builder.collection.metadata import (
    Lines,
    Metadata,
    find_tables,
    read_lines,
    read_sheets,
    unread_sheets,
)
from tfrecords_builder.collection.scan import Tree
from tfrecords_builder.collection.tables import Table, path_finder, read_table
from tfrecords_builder.common.errors import UserError

_MISSING = "named in the table, without one file of that name"
_FIND = "add the files, or remove their lines"


@dataclass(frozen=True, slots=True)
class Collection:
    """Every file of a source folder, and what is known of its images."""

    images: tuple[SourceImage, ...]
    """Ordered by path."""
    not_taken: tuple[NotTaken, ...] = ()
    notes: tuple[Note, ...] = ()
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    """By path, of the images of which something is said."""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What only the manifest keeps, by column and path."""
    split_of: Mapping[str, str] | None = None
    """The given split by path; None without one."""


def find_images(root: Path) -> list[SourceImage]:
    """The images of `read_collection`, with its errors."""
    return list(read_collection(root).images)


def read_collection(root: Path, on_error: str = "stop", masks: str = "read", labels: Path | None = None) -> Collection:
    """All files of a collection, with labels from its folders or from a table.

    Args:
        root: The folder of the collection.
        on_error: "skip" lets a class lose more than 1 % of its pictures; see `find.list_source`.
        masks: "read" or "ignore".
        labels: A table with the columns path and label, in place of folders; see `tables.read_table`.

    Raises:
        UserError: the folder or a table holds something that the user must mend; see `list_source` and `read_lines`.
    """
    tree = scan_folder(root)
    layout = recognise(tree)
    files = sort_files(tree, layout)
    if labels is not None:
        tables = [(_folder_in(root, labels), read_table(labels))]
        tables[0][1].need("path", ("label",))
    else:
        tables = _tables_in_place(tree, layout, files)
    labelled = any("label" in table.places for _, table in tables)
    if labels is not None or (labelled and len(_class_folders(files)) < 2):
        return _by_table(tree, layout, tables, on_error, masks)
    listing = list_classes(tree, layout, files, on_error, masks)
    split_of = listing.split_of or None
    if not tables:
        metadata, notes = read_sheets(root / layout.base, listing.images)
        return Collection(listing.images, listing.not_taken, (*listing.notes, *notes), metadata, {}, split_of)
    lines = read_lines(root, [image.path for image in listing.images], tables)
    _check_labels(tables, lines, listing.images)
    return Collection(
        listing.images,
        listing.not_taken,
        (*listing.notes, *lines.notes, *unread_sheets(root / layout.base)),
        lines.metadata,
        lines.extra,
        _split_in(lines) or split_of,
    )


def list_unlabelled(root: Path) -> tuple[list[str], dict[str, Metadata]]:
    """Every image in a folder, however deep, whatever its class and wherever its label: no mask, nothing else.

    Returns:
        The paths, relative to `root`, in order; by path, what each `metadata.csv` in place says.

    Raises:
        UserError: the folder holds no image, or something in it cannot be read.
    """
    tree = scan_folder(root)
    layout = recognise(tree)
    tables = _tables_in_place(tree, layout, sort_files(tree, layout))
    paths = sorted(sort_files(tree, replace(layout, whole=True)).folders[""].images)
    if not paths:
        raise UserError(f"{root}: holds no image; give a folder of images, or a dataset")
    return paths, read_lines(root, paths, tables).metadata if tables else {}


def _class_folders(files: Sorted) -> set[str]:
    return {
        path
        for path, folder in files.folders.items()
        if folder.images or any(item.reason in LOST for item in folder.not_taken)
    }


def _tables_in_place(tree: Tree, layout: Layout, files: Sorted) -> list[tuple[str, Table]]:
    """Each `metadata.csv` beside the class folders, in the folders of the splits, or in the only class folder."""
    classes = sorted(_class_folders(files))
    alone = [classes] if len(classes) == 1 else []
    for folders in ([""], [layout.base], list(layout.splits), *alone):
        if tables := find_tables(tree.root, folders):
            return tables
    return []


def _by_table(tree: Tree, layout: Layout, tables: Sequence[tuple[str, Table]], on_error: str, masks: str) -> Collection:
    """A collection whose classes are the labels of tables; its images may lie anywhere."""
    root = tree.root
    files_of_tables = {_path_in(root, table.file) for _, table in tables}
    whole = replace(layout, whole=True)
    files = sort_files(tree, whole, frozenset(path for path in files_of_tables if path is not None))
    folder = files.folders[""]
    lines = read_lines(root, folder.images, tables)
    names = ", ".join(printable(table.file.name) for _, table in tables[:1])
    class_of = {path: class_name_of(line.label) for path, line in lines.lines.items() if line.label is not None}
    _check_one_spelling(names, class_of.values())
    lost = _lost_lines(tree, lines, Counter(class_of.values()))
    if lost and (on_error == "stop" or not class_of):
        words, fixes = some([text for text, _ in lost]), dict.fromkeys(fix for _, of in lost for fix in of)
        skip = ", or leave them out (build --on-error skip)" if class_of else ""
        raise UserError(f"{names}: images would be lost: {words}; {', or '.join(fixes)}{skip}")
    images, mask_notes = match_folders([folder], masks, class_of)
    check_names(root, images)
    if not images:
        raise UserError(f"{names}: gives no image a label; fill in the column label")
    notes = [Note(f"the classes are the labels of {names}"), *mask_notes]
    notes += [Note(f"left out by --on-error skip: {words}", warning=True) for words, _ in lost]
    without = sum(item.files for item in folder.not_taken if item.reason is Reason.UNLABELLED)
    if without:
        notes.append(Note(f"{without:,} of {without + len(images):,} images have no label in {names}", warning=True))
    split_of = {image.path: split for image in images if (split := layout.split_of(image.path)) is not None}
    paths = {image.path for image in images}
    kept = replace(lines, lines={path: line for path, line in lines.lines.items() if path in paths})
    return Collection(
        tuple(sorted(images, key=lambda image: image.path)),
        files.not_taken,
        (*notes, *lines.notes, *tree_notes(tree, files)),
        kept.metadata,
        kept.extra,
        _split_in(kept) or split_of or None,
    )


def _split_in(lines: Lines) -> dict[str, str] | None:
    """The split that tables give; None where they give none."""
    given = {path: line.split for path, line in lines.lines.items() if line.split is not None}
    return given or None


def _check_labels(tables: Sequence[tuple[str, Table]], lines: Lines, images: Sequence[SourceImage]) -> None:
    """Labels of a table beside class folders say what the folders say."""
    if not lines.has_labels:
        return
    for image in images:
        line = lines.lines.get(image.path)
        if line is None or line.label is None or one_class(class_name_of(line.label)) == one_class(image.class_name):
            continue
        file = tables[0][1].file
        raise UserError(
            f"{file}: gives '{image.path}' the label '{line.label}', but its folder is class '{image.class_name}'; "
            f"give --labels {file} to take the classes from the table, or rename the column"
        )


def _check_one_spelling(file: str, names: Iterable[str]) -> None:
    known: dict[str, str] = {}
    for name in sorted(set(names)):
        other = known.setdefault(one_class(name), name)
        if other != name:
            raise UserError(f"{file}: labels {other!a} and {name!a} differ but for case or Unicode form; make them one")


def _lost_lines(tree: Tree, lines: Lines, taken: Counter[str]) -> list[tuple[str, list[str]]]:
    """The classes of which more than MAX_LOST of the lines name no image: in words, and how to mend it."""
    others = {file.path: file.reason for file in tree.files if file.reason in LOST}
    find = path_finder(others)
    lost: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    fixes: dict[str, dict[str, None]] = defaultdict(dict)
    for path, line in lines.strangers:
        if line.label is None:
            continue
        found = find(path) or find(name_of(path))
        reason = others[found] if found else None
        name = class_name_of(line.label)
        lost[name][suffix_of(name_of(found or path.replace("\\", "/"))), reason or _MISSING] += 1
        fixes[name][FIXES[reason] if reason else _FIND] = None
    words = []
    for name, counts in sorted(lost.items()):
        files = counts.total()
        if files > MAX_LOST * (files + taken[name]):
            kinds = ", ".join(
                f"{count:,} {suffix or 'without suffix'}: {why}" for (suffix, why), count in counts.items()
            )
            words.append((f"{name} {files:,} of {files + taken[name]:,} ({kinds})", list(fixes[name])))
    return words


def _path_in(root: Path, file: Path) -> str | None:
    """A file's path in the source folder; None for one that lies elsewhere."""
    try:
        return file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return None


def _folder_in(root: Path, file: Path) -> str:
    """The folder of the source folder that a table's paths are relative to."""
    path = _path_in(root, file)
    return "" if path is None else path.rpartition("/")[0]
