"""One walk over a source folder: every file once, with what its name, its first bytes and its links say of it.

What the file is in its collection, which class or which mask, depends on the layout and is decided without the disk
(`layout`). Real folders are read first, and links to folders after them, so that what a link repeats is known by its
real name.
"""

import os
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from tfrecords_builder.collection.file_kinds import (
    IMAGE_SUFFIXES,
    Reason,
    is_document,
    is_hidden,
    is_leftover,
    is_picture,
    is_system_folder,
    is_unnamed_dicom,
    picture_by_content,
    suffix_of,
)
from tfrecords_builder.common.errors import UserError

Entry = os.DirEntry[str]


class File(NamedTuple):
    """A file, or a link to a folder that is not followed. Paths are relative to the source folder, with slashes."""

    path: str
    reason: Reason | None
    """Why it is no image wherever it lies; None for what is named as an image that can be read."""
    identity: tuple[int, int] = (0, 0)
    """Device and inode of an image."""
    link: bool = False
    """Whether an image is a link to one."""
    shown: str | None = None
    """A link with its target."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A folder that is another one of the source folder by a second name; it is not read."""

    path: str
    target: str
    """"." for the source folder."""


@dataclass(frozen=True, slots=True)
class Tree:
    """All that is below a source folder."""

    root: Path
    files: list[File] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Those that were read, but for hidden ones and those of the operating system."""
    empty: list[str] = field(default_factory=list)
    """Those of `folders` that hold nothing but what programs leave."""
    aliases: list[Alias] = field(default_factory=list)


def scan(root: Path) -> Tree:
    """All that is below `root`.

    Raises:
        UserError: A folder cannot be read.
    """
    return _Scan(root).tree


class _Scan:
    def __init__(self, root: Path) -> None:
        self.tree = Tree(root)
        self._real_root = Path(os.path.realpath(root))
        self._path_of: dict[tuple[int, int], str] = {}
        """Of each folder that was read, by device and inode."""
        self._waiting: list[str] = []
        """Links to folders, as a heap: in the order of their paths, so that the same one is always read first."""
        self._read("")
        while self._waiting:
            path = heappop(self._waiting)
            if self._real_root.is_relative_to(os.path.realpath(root / path)):
                self._alias(path, "")  # the source folder, or one that holds it
            else:
                self._read(path)

    def _read(self, start: str) -> None:
        """All that is in a folder."""
        below: list[tuple[str, Reason | None]] = [(start, None)]
        files = self.tree.files
        while below:
            path, aside = below.pop()
            device, entries = self._entries(path, aside)
            prefix = f"{path}/" if path else ""
            for entry in entries:
                name = entry.name
                # Most entries are images: first what they need, and no more.
                image = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not is_hidden(name)
                if image and aside is None and entry.is_file(follow_symlinks=False):
                    files.append(File(prefix + name, None, (device, entry.inode())))
                elif not _is_folder(entry):
                    files.append(_file(entry, prefix + name, aside))
                else:
                    self._folder(entry, prefix + name, aside, below)

    def _folder(self, entry: Entry, path: str, aside: Reason | None, below: list[tuple[str, Reason | None]]) -> None:
        reason = aside or _aside(entry.name)
        if not entry.is_symlink():
            below.append((path, reason))
        elif reason is not None:
            self.tree.files.append(File(path, reason))
        else:
            heappush(self._waiting, path)

    def _entries(self, path: str, aside: Reason | None) -> tuple[int, list[Entry]]:
        """The folder's device, and what is in it; nothing where it is not read."""
        absolute = self.tree.root / path
        try:
            status = absolute.stat()
            entries = list(os.scandir(absolute))
        except OSError as error:
            if aside is not None:
                self.tree.files.append(File(path, aside))
                return 0, []
            raise UserError(
                f"{absolute}: this folder cannot be read ({error.strerror}); permit reading it, or remove the folder"
            ) from error
        if aside is None:
            known = self._path_of.setdefault((status.st_dev, status.st_ino), path)
            if known != path:
                self._alias(path, known)
                return 0, []
            self.tree.folders.append(path)
            if all(is_leftover(entry.name) or is_system_folder(entry.name) for entry in entries):
                self.tree.empty.append(path)
        return status.st_dev, entries

    def _alias(self, path: str, target: str) -> None:
        self.tree.aliases.append(Alias(path, target or "."))
        self.tree.files.append(File(path, Reason.FOLDER_LINK, shown=f"{path} -> {target or '.'}"))


def _aside(name: str) -> Reason | None:
    """The reason why nothing in a folder of this name is looked at; None for any other folder."""
    if is_hidden(name):
        return Reason.HIDDEN
    return Reason.SYSTEM if is_system_folder(name) else None


def _file(entry: Entry, path: str, aside: Reason | None) -> File:
    """An entry that is no folder, and no plain image."""
    name = entry.name
    reason = aside or is_leftover(name) or (Reason.DOCUMENT if is_document(name) else None)
    if reason is not None:
        return File(path, reason)
    try:
        status = entry.stat()
    except OSError:
        return File(path, Reason.BROKEN, shown=f"{path} -> {_target(entry)}")
    if not entry.is_file():
        return File(path, Reason.SPECIAL)
    if suffix_of(name) in IMAGE_SUFFIXES or is_unnamed_dicom(Path(entry.path)):
        return File(path, None, (status.st_dev, status.st_ino), link=entry.is_symlink())
    if is_picture(name):
        return File(path, Reason.FORMAT)
    return File(path, picture_by_content(Path(entry.path)) or Reason.OTHER)


def _is_folder(entry: Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself


def _target(entry: Entry) -> str:
    try:
        return str(Path(entry.path).readlink())
    except OSError:
        return "?"
