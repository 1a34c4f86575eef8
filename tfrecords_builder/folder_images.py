"""The images of a folder as they are compared with those of another collection; labels play no part."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tfrecords_builder.collection.collect import list_unlabelled
from tfrecords_builder.collection.file_kinds import may_be_dicom
from tfrecords_builder.collection.metadata import Metadata
from tfrecords_builder.collection.patient_codes import PatientKey, patient_key
from tfrecords_builder.common.pool import Pool, default_workers
from tfrecords_builder.images import dicom
from tfrecords_builder.images.decode import decode_gray, quiet_decoding, read_bytes
from tfrecords_builder.images.decoded import ImageError
from tfrecords_builder.images.thumbnails import thumbnails_of
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE, Thumbnails

_FILES_PER_TASK = 32


@dataclass(frozen=True, eq=False)
class FolderImages:
    """The N whole images of a folder."""

    paths: list[str]
    """[N]: relative to the folder, in order."""
    sha256: list[str]
    """[N]: hexadecimal, of the file."""
    patients: list[str | None]
    """[N]: as the folder's tables say, or of DICOM files a code."""
    thumbnails: Thumbnails
    """uint8 [N, 64, 64]."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of each file that is no whole image."""


def read_folder(folder: Path, progress: Callable[[int, int], None] | None = None) -> FolderImages:
    """Read every image of a folder, in a process per core.

    Args:
        folder: The images lie in it however deep; a `metadata.csv` where `build` reads one may name patients.
        progress: Called with (files read, files in all).

    Raises:
        UserError: the folder holds no image, or a folder or table in it cannot be read.
    """
    paths, metadata = list_unlabelled(folder)
    key = patient_key() if any(may_be_dicom(path.rpartition("/")[2]) for path in paths) else None
    tasks = [
        _Task(folder, paths[start : start + _FILES_PER_TASK], key) for start in range(0, len(paths), _FILES_PER_TASK)
    ]
    read: list[_File] = []
    with Pool(max(1, min(default_workers(), len(tasks)))) as pool:
        for files in pool.map(_read, tasks):
            read += files
            if progress is not None:
                progress(len(read), len(paths))
    whole = [(path, file) for path, file in zip(paths, read, strict=True) if file.reason is None]
    known = [metadata.get(path, Metadata()).patient for path, _ in whole]
    return FolderImages(
        [path for path, _ in whole],
        [file.sha256 for _, file in whole],
        [name or file.patient for name, (_, file) in zip(known, whole, strict=True)],
        _stacked([file.thumbnail for _, file in whole]),
        [(path, file.reason) for path, file in zip(paths, read, strict=True) if file.reason is not None],
    )


class _Task(NamedTuple):
    folder: Path
    paths: Sequence[str]
    key: PatientKey | None

    def __str__(self) -> str:
        return f"the images {self.folder / self.paths[0]} to {self.folder / self.paths[-1]}"


class _File(NamedTuple):
    sha256: str = ""
    patient: str | None = None
    thumbnail: bytes = b""
    reason: str | None = None


def _read(task: _Task) -> list[_File]:
    with quiet_decoding():
        return [_read_file(task.folder / path, task.key) for path in task.paths]


def _read_file(path: Path, key: PatientKey | None) -> _File:
    try:
        data = read_bytes(path)
        gray = decode_gray(data, path).gray
    except ImageError as error:
        return _File(reason=error.reason)
    patient = key.code(dicom.patient_id(data)) if key and dicom.is_dicom(data[: dicom.HEAD]) else None
    return _File(hashlib.sha256(data).hexdigest(), patient, thumbnails_of([gray]).tobytes())


def _stacked(thumbnails: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
