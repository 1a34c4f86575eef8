"""A folder of phantoms in the database's own layout, drawn by several processes, whole or absent."""

import math
import shutil
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_dist.phantoms.drawing import draw_phantom
from cxr_dist.phantoms.signs import CLASS_FOLDERS
from tfrecords_builder.collection.file_kinds import IMAGES_FOLDER, MASKS_FOLDER
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import check_output_folder
from tfrecords_builder.common.pool import Pool, default_workers

SMALLEST_SIZE = 32
LARGEST_SIZE = 4096
IMAGES_PER_WORKER = 100
"""Fewer are drawn sooner than another process starts."""


def write_phantoms(
    folder: Path,
    per_class: int = 250,
    size: int = 299,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write `<Class>/images/<Class>-<n>.png` and `<Class>/masks/<Class>-<n>.png`, n from 1, for each class.

    Both are 8-bit gray, `size` pixels a side; a mask is 255 inside the lungs. Phantom n of a class depends on (seed,
    class, n, size) alone. All are drawn under a hidden name beside `folder` and renamed at the end, so a run that is
    killed leaves no `folder`. By default it takes a process per core, fewer for few images; `progress` is called with
    (images written, images in all).

    Returns:
        Images per class folder.

    Raises:
        UserError: `folder` holds something or cannot be written, or a number is out of its range.
    """
    _check(per_class, size, seed, workers)
    _check_free(folder)
    unfinished = folder.absolute().parent / f".{folder.name}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        for class_name in CLASS_FOLDERS:
            for part in (IMAGES_FOLDER, MASKS_FOLDER):
                (unfinished / class_name / part).mkdir(parents=True)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); give a folder that you can write to"
        ) from error
    try:
        tasks = [
            _Phantom(unfinished, class_name, number, size, seed)
            for number in range(1, per_class + 1)
            for class_name in CLASS_FOLDERS
        ]
        with Pool(workers or min(default_workers(), math.ceil(len(tasks) / IMAGES_PER_WORKER))) as pool:
            for done, _ in enumerate(pool.map(_write, tasks), start=1):
                if progress is not None:
                    progress(done, len(tasks))
        _check_free(folder)
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return dict.fromkeys(CLASS_FOLDERS, per_class)


def phantom_rng(class_name: str, number: int, seed: int) -> np.random.Generator:
    """The generator from which phantom `number` of a class is drawn."""
    return np.random.default_rng([seed, zlib.crc32(class_name.encode()), number])


@dataclass(frozen=True, slots=True)
class _Phantom:
    """One phantom to draw, and the folder that it goes into."""

    root: Path
    class_name: str
    number: int
    size: int
    seed: int

    def __str__(self) -> str:
        return f"the phantom {self.class_name}-{self.number}"


def _write(phantom: _Phantom) -> None:
    name = phantom.class_name
    image, mask = draw_phantom(name, phantom.size, phantom_rng(name, phantom.number, phantom.seed))
    for part, pixels in ((IMAGES_FOLDER, image), (MASKS_FOLDER, mask)):
        Image.fromarray(pixels).save(phantom.root / name / part / f"{name}-{phantom.number}.png")


def _check_free(folder: Path) -> None:
    check_output_folder(folder, "phantoms", "DIR", lambda _: False)


def _check(per_class: int, size: int, seed: int, workers: int | None) -> None:
    if per_class < 1:
        raise UserError(f"per_class: must be at least 1, not {per_class}")
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise UserError(f"size: must be {SMALLEST_SIZE} to {LARGEST_SIZE} pixels, not {size}")
    if seed < 0:
        raise UserError(f"seed: must not be negative, not {seed}")
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
