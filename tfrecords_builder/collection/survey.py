"""Every file of a source folder, once: images and masks to take, all others by reason and suffix.

Real folders are read first, and links to folders after them, so that what a link repeats is known by its real name.
"""

import os
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush
from pathlib import Path

from tfrecords_builder.collection.file_kinds import (
    CSV_NAME,
    IMAGE_SUFFIXES,
    IMAGES_FOLDER,
    MASKS_FOLDER,
    SHEET_SUFFIX,
    NotTaken,
    Reason,
    is_document,
    is_hidden,
    is_leftover,
    is_picture,
    is_system_folder,
    is_unnamed_dicom,
    picture_by_content,
    printable,
    suffix_of,
)
from tfrecords_builder.common.errors import UserError

Entry = os.DirEntry[str]
_ROOT = "."


class _Area(Enum):
    """Which part of a collection a folder is."""

    ROOT = auto()
    IMAGES = auto()
    """A class folder, or the folder `images` in it: its images are taken."""
    DEEPER = auto()
    MASKS = auto()
    HIDDEN = auto()
    SYSTEM = auto()


_ASIDE = {_Area.HIDDEN: Reason.HIDDEN, _Area.SYSTEM: Reason.SYSTEM}


@dataclass(slots=True)
class Folder:
    """What one folder of the source folder holds. Paths are relative to the source folder, with forward slashes."""

    name: str
    """"" for the source folder's own files."""
    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    has_images_folder: bool = False
    is_empty: bool = True
    """Whether it holds nothing but what programs leave."""
    empty_folders: list[str] = field(default_factory=list)
    inodes: list[int] = field(default_factory=list)
    """Of each image; in the order of `images`."""
    links: list[tuple[str, os.stat_result]] = field(default_factory=list)
    """Links to images, and what they lead to."""
    _counts: dict[tuple[Reason, str], tuple[int, str]] = field(default_factory=dict)

    def count(self, reason: Reason, path: str, example: str | None = None) -> None:
        """Count a file that is not taken."""
        key = reason, suffix_of(path.rpartition("/")[2])
        files, first = self._counts.get(key, (0, ""))
        shown = printable(example or path)
        self._counts[key] = files + 1, min(first, shown) if files else shown

    @property
    def not_taken(self) -> list[NotTaken]:
        """All that was counted, ordered by reason and suffix."""
        return [
            NotTaken(printable(self.name), reason, suffix, files, example)
            for (reason, suffix), (files, example) in sorted(self._counts.items())
        ]


@dataclass(frozen=True, slots=True)
class Alias:
    """A folder that is another one of the source folder by a second name; it is not read."""

    path: str
    target: str


class Survey:
    """All that is below `root`.

    Raises:
        UserError: A folder cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loose = Folder("")
        self.folders: dict[str, Folder] = {}
        """By name, of those that are neither hidden nor of the operating system."""
        self.aliases: list[Alias] = []
        self._real_root = Path(os.path.realpath(root))
        self._name_of: dict[tuple[int, int], str] = {}
        """The path of each folder that was read, by device and inode."""
        self._waiting: list[tuple[str, _Area, Folder]] = []
        """Links to folders, as a heap: in the order of their paths, so that the same one is always read first."""
        self._read(_ROOT, _Area.ROOT, self.loose)
        while self._waiting:
            path, area, folder = heappop(self._waiting)
            if self._real_root.is_relative_to(os.path.realpath(self.root / path)):
                self._alias(path, folder, _ROOT)  # the source folder, or one that holds it
            else:
                self._read(path, area, folder)
        for folder in (self.loose, *self.folders.values()):
            self._take_links(folder)

    def _read(self, path: str, area: _Area, folder: Folder) -> None:
        """All that is in a folder; `path` is relative to the source folder."""
        below = [(path, area, folder)]
        while below:
            path, area, folder = below.pop()
            entries = self._entries(path, area, folder)
            folder.has_images_folder |= area is _Area.IMAGES and "/" in path
            prefix = "" if path == _ROOT else f"{path}/"
            taken = {_Area.IMAGES: folder.images, _Area.MASKS: folder.masks}.get(area)
            for entry in entries:
                name = entry.name
                # Most entries are images or masks to take: first what they need, and no more.
                image = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not is_hidden(name)
                if image and taken is not None and entry.is_file(follow_symlinks=False):
                    folder.is_empty = False
                    taken.append(prefix + name)
                    if area is _Area.IMAGES:
                        folder.inodes.append(entry.inode())
                    continue
                if not _is_folder(entry):
                    self._sort_file(entry, prefix + name, area, folder)
                    continue
                inner = prefix + name, _area_of(name, path, area), self._folder_of(name, area, folder)
                if not entry.is_symlink():
                    below.append(inner)
                elif inner[1] in _ASIDE:
                    inner[2].count(_ASIDE[inner[1]], inner[0])
                else:
                    heappush(self._waiting, inner)

    def _entries(self, path: str, area: _Area, folder: Folder) -> list[Entry]:
        """What is in a folder; nothing where it is not read."""
        absolute = self.root / path
        try:
            status = absolute.stat()
            entries = list(os.scandir(absolute))
        except OSError as error:
            if area in _ASIDE:
                folder.count(_ASIDE[area], path)
                return []
            raise UserError(
                f"{absolute}: this folder cannot be read ({error.strerror}); permit reading it, or remove the folder"
            ) from error
        if area in _ASIDE:
            return entries
        known = self._name_of.setdefault((status.st_dev, status.st_ino), path)
        if known != path:
            self._alias(path, folder, known)
            return []
        leftovers = (is_leftover(entry.name) or is_system_folder(entry.name) for entry in entries)
        if all(leftovers) and area is not _Area.ROOT:
            folder.empty_folders.append(path)
        return entries

    def _folder_of(self, name: str, area: _Area, folder: Folder) -> Folder:
        if area is not _Area.ROOT:
            return folder
        if is_hidden(name) or is_system_folder(name):
            return self.loose
        return self.folders.setdefault(name, Folder(name))

    def _alias(self, path: str, folder: Folder, target: str) -> None:
        self.aliases.append(Alias(path, target))
        folder.is_empty = False
        folder.count(Reason.FOLDER_LINK, path, f"{path} -> {target}")

    def _sort_file(self, entry: Entry, path: str, area: _Area, folder: Folder) -> None:
        """An entry that is no folder, and no plain image that is taken."""
        name = entry.name
        reason = _ASIDE.get(area) or is_leftover(name)
        if reason is not None:
            folder.count(reason, path)
            return
        folder.is_empty = False
        if area is _Area.ROOT and (name == CSV_NAME or name.endswith(SHEET_SUFFIX)):
            folder.count(Reason.SHEET, path)
        elif is_document(name):
            folder.count(Reason.DOCUMENT, path)
        elif area is _Area.MASKS:
            if suffix_of(name) in IMAGE_SUFFIXES:
                folder.masks.append(path)  # reading it says what is wrong with it
            else:
                folder.count(Reason.MASK_UNUSED if is_picture(name) else Reason.OTHER, path)
        else:
            self._sort_picture(entry, path, area, folder)

    def _sort_picture(self, entry: Entry, path: str, area: _Area, folder: Folder) -> None:
        status = _status(entry)
        if status is None:
            if area is _Area.ROOT and not suffix_of(path):
                folder = self._folder_of(path, area, folder)  # most likely a class folder
            folder.is_empty = False
            folder.count(Reason.BROKEN, path, f"{path} -> {_target(entry)}")
            return
        regular = entry.is_file()
        reason = _picture_reason(entry, regular)
        if reason is None:
            folder.count(Reason.OTHER, path)
        elif area is _Area.ROOT and reason is not Reason.SPECIAL:
            folder.count(Reason.LOOSE, path)
        elif reason is Reason.NESTED and area is _Area.IMAGES:
            folder.links.append((path, status))
        else:
            folder.count(reason, path)

    def _take_links(self, folder: Folder) -> None:
        """Links to images: one is taken unless its image is, of the same class."""
        if not folder.links:
            return
        paths = dict(zip(folder.inodes, folder.images, strict=True))
        for path, status in sorted(folder.links):
            known = paths.get(status.st_ino)
            if known is not None and (self.root / known).samefile(self.root / path):
                folder.count(Reason.FILE_LINK, path, f"{path} -> {known}")
            else:
                folder.images.append(path)
                folder.inodes.append(status.st_ino)
                paths[status.st_ino] = path


def _area_of(name: str, path: str, area: _Area) -> _Area:
    """The area of the folder `name` in the folder `path` of an area."""
    if area in _ASIDE:
        return area
    if is_hidden(name):
        return _Area.HIDDEN
    if is_system_folder(name):
        return _Area.SYSTEM
    if area is _Area.MASKS or name.casefold() == MASKS_FOLDER:
        return _Area.MASKS
    if area is _Area.ROOT:
        return _Area.IMAGES
    if area is _Area.IMAGES and "/" not in path and name.casefold() == IMAGES_FOLDER:
        return _Area.IMAGES
    return _Area.DEEPER


def _picture_reason(entry: Entry, regular: bool) -> Reason | None:
    """Why a picture is not taken, NESTED for one that would be elsewhere; None for what is no picture."""
    suffix = suffix_of(entry.name)
    if not regular:
        return Reason.SPECIAL
    if suffix in IMAGE_SUFFIXES or is_unnamed_dicom(Path(entry.path)):
        return Reason.NESTED
    return Reason.FORMAT if is_picture(entry.name) else picture_by_content(Path(entry.path))


def _is_folder(entry: Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself


def _status(entry: Entry) -> os.stat_result | None:
    """Of the file, or of what a link leads to; None when that is nothing."""
    try:
        return entry.stat()
    except OSError:
        return None


def _target(entry: Entry) -> str:
    try:
        return str(Path(entry.path).readlink())
    except OSError:
        return "?"
