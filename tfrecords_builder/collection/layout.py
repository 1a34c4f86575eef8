"""Which folders of a source folder are classes, and what each file is by where it lies. Pure: reads no file.

`recognise` finds the folder that holds the class folders: the source folder itself, one that wraps it, or the folders
of a given split (train, val, test). `sort_files` then gives every file of a walk exactly one fate: an image of a
folder, a mask, or one more of a reason.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tfrecords_builder.collection.file_kinds import (
    CSV_NAME,
    IMAGE_SUFFIXES,
    IMAGES_FOLDER,
    MASKS_FOLDER,
    SHEET_SUFFIX,
    NotTaken,
    Reason,
    is_hidden,
    is_picture,
    is_system_folder,
    printable,
    suffix_of,
)
from tfrecords_builder.collection.scan import File, Tree
from tfrecords_builder.splitting.splits import MIN_IMAGES_PER_CLASS

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
"""What people call the splits, without regard to case."""
_PICTURES = frozenset({None, Reason.FORMAT, Reason.UNNAMED, Reason.BROKEN, Reason.SPECIAL})
"""Reasons of files that show that a folder is meant to hold images."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the class folders of a collection are."""

    base: str = ""
    """The folder that holds them, or the folders of the splits; "" for the source folder."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """The split by the path of its folder; empty without a given split."""
    whole: bool = False
    """Whether classes come from a table, so that an image may lie anywhere."""
    alike: tuple[str, ...] = ()
    """Folders that hold folders of the same names, of which one cannot tell which are the classes."""

    @property
    def bases(self) -> tuple[str, ...]:
        """The folders that hold class folders."""
        return tuple(self.splits) or (self.base,)

    def split_of(self, path: str) -> str | None:
        """The split whose folder a file is in."""
        return next((split for folder, split in self.splits.items() if path.startswith(f"{folder}/")), None)


def recognise(tree: Tree) -> Layout:
    """The layout of a collection, by the names of its folders and where in them pictures are.

    A folder wraps a collection if it is the only one with pictures, and holds none itself. An empty folder beside it
    may be meant as a class, so then nothing is taken for a wrapper.
    """
    pictures = _Pictures(tree)
    base = path = ""
    while True:
        inner = pictures.folders_in(path)
        named = {folder: SPLIT_NAMES.get(name_of(folder).casefold()) for folder in inner}
        splits = {folder: split for folder, split in named.items() if split is not None}
        if len(set(splits.values())) > 1:
            return Layout(path, dict(sorted(splits.items(), key=lambda item: item[0])))
        if len(inner) > 1:
            base = path
            return Layout(base, alike=pictures.alike(inner))
        if len(inner) != 1 or pictures.is_class(inner[0]) or pictures.has_empty_folder(path):
            return Layout("")
        path = inner[0]


class _Pictures:
    """How many pictures there are in each folder, whether the program can read them or not."""

    def __init__(self, tree: Tree) -> None:
        self.direct: Counter[str] = Counter()
        self.below: Counter[str] = Counter()
        self._inner: dict[str, set[str]] = defaultdict(set)
        self._empty = {folder.rpartition("/")[0] for folder in tree.empty if folder}
        for file in tree.files:
            if file.reason in _PICTURES:
                self.direct[file.path.rpartition("/")[0]] += 1
            if file.reason is Reason.BROKEN and not suffix_of(name_of(file.path)):
                self._inner[file.path.rpartition("/")[0]].add(file.path)  # most likely a folder
        for folder, count in self.direct.items():
            if not has_masks(folder):
                self._add(folder, count)

    def _add(self, folder: str, count: int) -> None:
        while True:
            self.below[folder] += count
            if not folder:
                return
            above = folder.rpartition("/")[0]
            self._inner[above].add(folder)
            folder = above

    def folders_in(self, folder: str) -> list[str]:
        """The folders in a folder that hold pictures, however deep."""
        return sorted(self._inner.get(folder, ()))

    def is_class(self, folder: str) -> bool:
        """Whether a folder holds pictures itself, or in a folder `images`."""
        images = [inner for inner in self.folders_in(folder) if name_of(inner).casefold() == IMAGES_FOLDER]
        return any(self.direct[path] for path in (folder, *images)) or not self.folders_in(folder)

    def has_empty_folder(self, folder: str) -> bool:
        return folder in self._empty

    def alike(self, folders: list[str]) -> tuple[str, ...]:
        """`folders`, if each holds two folders or more of the same names and as many pictures as classes have."""
        if any(self.is_class(folder) for folder in folders):
            return ()
        names = [
            {name_of(path).casefold() for path in self.folders_in(folder) if self.below[path] >= MIN_IMAGES_PER_CLASS}
            for folder in folders
        ]
        return tuple(folders) if len(set.intersection(*names)) > 1 else ()


@dataclass(slots=True)
class Folder:
    """What a class folder holds. Paths are relative to the source folder, with forward slashes."""

    path: str
    """"" for what is in no class folder."""
    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    has_images_folder: bool = False
    is_empty: bool = True
    """Whether it holds nothing but what programs leave."""
    empty_folders: list[str] = field(default_factory=list)
    _counts: dict[tuple[Reason, str], tuple[int, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Without the folders above it."""
        return name_of(self.path)

    def count(self, reason: Reason, path: str, example: str | None = None) -> None:
        """Count a file that is not taken."""
        key = reason, suffix_of(name_of(path))
        files, first = self._counts.get(key, (0, ""))
        shown = printable(example or path)
        self._counts[key] = files + 1, min(first, shown) if files else shown

    @property
    def not_taken(self) -> list[NotTaken]:
        """All that was counted, ordered by reason and suffix."""
        return [
            NotTaken(printable(self.path), reason, suffix, files, example)
            for (reason, suffix), (files, example) in sorted(self._counts.items())
        ]


@dataclass(frozen=True, slots=True)
class Sorted:
    """Every file of a tree, in the folder that it counts for."""

    loose: Folder
    """What is in no class folder."""
    folders: Mapping[str, Folder]
    """The class folders by path, and folders of pictures beside those of the splits."""

    @property
    def not_taken(self) -> tuple[NotTaken, ...]:
        """Ordered by folder."""
        folders = [self.loose, *(self.folders[path] for path in sorted(self.folders))]
        return tuple(item for folder in folders for item in folder.not_taken)


def sort_files(tree: Tree, layout: Layout, sheets: frozenset[str] = frozenset()) -> Sorted:
    """Every file of `tree` as an image, a mask or a count of the folder that it belongs to.

    Args:
        tree: The walk.
        layout: Where the class folders are.
        sheets: Paths of tables that are read, beside those that have a known name where the class folders are.
    """
    sorter = _Sorter(layout)
    for path in tree.folders:
        sorter.add_folder(path)
    for path in tree.empty:
        if path:
            sorter.place_of(path)[0].empty_folders.append(path)
    links: list[File] = []
    for file in tree.files:
        if file.path in sheets:
            sorter.loose.count(Reason.SHEET, file.path)
        elif file.link and sorter.place_of(file.path.rpartition("/")[0])[1] is None:
            links.append(file)
        else:
            sorter.add(file)
    for file in sorted(links):
        sorter.add_link(file)
    return Sorted(sorter.loose, sorter.folders)


_MASK = Reason.MASK_UNUSED
Place = tuple[Folder, Reason | None]
"""The folder that a file counts for, and why an image there is none of its class; None where it is one."""


class _Sorter:
    def __init__(self, layout: Layout) -> None:
        self.loose = Folder("")
        self.folders: dict[str, Folder] = {}
        self._layout = layout
        self._places: dict[str, Place] = {}
        self._taken: dict[tuple[str, tuple[int, int]], str] = {}

    def add_folder(self, path: str) -> None:
        """Know a folder, be it without files."""
        folder, reason = self.place_of(path)
        if reason is None and path != folder.path and name_of(path).casefold() == IMAGES_FOLDER:
            folder.has_images_folder = True

    def place_of(self, directory: str) -> Place:
        """Where the files of a folder belong."""
        place = self._places.get(directory)
        if place is None:
            place = self._places[directory] = self._find_place(directory)
        return place

    def _find_place(self, directory: str) -> Place:
        layout = self._layout
        if layout.whole:
            return self._folder(""), _MASK if has_masks(directory) else None
        for base in layout.bases:
            if directory == base:
                return self.loose, Reason.LOOSE
            if name := _below(directory, base):
                return self._folder(join(base, name)), _MASK if has_masks(directory[len(base) :]) else None
        if layout.splits and (name := _below(directory, layout.base)) and not has_masks(directory):
            return self._folder(join(layout.base, name)), Reason.BESIDE
        return self.loose, _MASK if has_masks(directory) else Reason.LOOSE

    def _folder(self, path: str) -> Folder:
        name = name_of(path)
        if name and (is_hidden(name) or is_system_folder(name)):
            return self.loose
        return self.folders.setdefault(path, Folder(path))

    def add(self, file: File) -> None:
        """Anything but a link to an image."""
        directory, _, name = file.path.rpartition("/")
        folder, elsewhere = self.place_of(directory)
        reason = file.reason
        if reason in (Reason.HIDDEN, Reason.SYSTEM):
            folder.count(reason, file.path)
            return
        if elsewhere is Reason.LOOSE and not self._layout.whole and _is_like_folder(file, directory, self._layout):
            folder = self._folder(file.path)
        folder.is_empty = False
        if reason is None or (elsewhere is _MASK and suffix_of(name) in IMAGE_SUFFIXES and reason in _PICTURES):
            self._add_image(file, folder, elsewhere)
        elif reason is Reason.DOCUMENT and self._is_sheet(directory, name):
            folder.count(Reason.SHEET, file.path)
        elif reason in _PICTURES and reason not in (Reason.BROKEN, Reason.SPECIAL) and elsewhere is not None:
            folder.count(elsewhere, file.path, file.shown)
        elif reason in _PICTURES and elsewhere is _MASK:
            folder.count(_MASK if is_picture(name) else Reason.OTHER, file.path, file.shown)
        else:
            folder.count(reason or Reason.OTHER, file.path, file.shown)

    def _add_image(self, file: File, folder: Folder, elsewhere: Reason | None) -> None:
        if elsewhere is None:
            folder.images.append(file.path)
            self._taken.setdefault((folder.path, file.identity), file.path)
        elif elsewhere is _MASK and folder is not self.loose:
            folder.masks.append(file.path)  # reading it says what is wrong with it
        else:
            folder.count(elsewhere, file.path, file.shown)

    def add_link(self, file: File) -> None:
        """A link to an image is taken unless its image is, of the same class folder."""
        folder, _ = self.place_of(file.path.rpartition("/")[0])
        folder.is_empty = False
        known = self._taken.setdefault((folder.path, file.identity), file.path)
        if known == file.path:
            folder.images.append(file.path)
        else:
            folder.count(Reason.FILE_LINK, file.path, f"{file.path} -> {known}")

    def _is_sheet(self, directory: str, name: str) -> bool:
        known = name == CSV_NAME or name.endswith(SHEET_SUFFIX)
        return known and directory in ("", self._layout.base, *self._layout.splits)


def _is_like_folder(file: File, directory: str, layout: Layout) -> bool:
    """Whether it is most likely a class folder: a link to nothing or to another folder, where classes are."""
    link = file.reason is Reason.BROKEN and not suffix_of(name_of(file.path))
    return directory in layout.bases and (link or file.reason is Reason.FOLDER_LINK)


def name_of(path: str) -> str:
    """A path's last part."""
    return path.rpartition("/")[2]


def join(folder: str, name: str) -> str:
    """The path of `name` in a folder."""
    return f"{folder}/{name}" if folder else name


def has_masks(path: str) -> bool:
    """Whether a folder is one of masks, or in one."""
    return MASKS_FOLDER in path.casefold() and MASKS_FOLDER in path.casefold().split("/")


def _below(path: str, base: str) -> str | None:
    """The first folder of a path below `base`; None for a path that is not below it."""
    if base:
        if not path.startswith(f"{base}/"):
            return None
        path = path[len(base) + 1 :]
    return path.partition("/")[0] or None
