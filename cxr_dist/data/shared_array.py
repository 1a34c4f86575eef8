"""An array that the processes of a machine share: a file that each of them maps, written by the first."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from tfrecords_builder.common import locks
from tfrecords_builder.common.files import is_temporary, write_whole


def shared_array(
    path: Path, shape: tuple[int, ...], fill: Callable[[npt.NDArray[np.uint8]], None]
) -> npt.NDArray[np.uint8]:
    """The uint8 array of `shape` that lies in `path`, filled now if there is none.

    Its pages are in memory once for all processes that map it. A process that writes to it changes its own copy alone.

    Args:
        path: Its name must stand for the content. The folder is made if need be.
        shape: Not empty.
        fill: Gets the array to fill. Other processes wait until it returns; if it raises, there is no file.

    Raises:
        OSError: The folder cannot be written, or its disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = math.prod(shape)

    def write(file: IO[bytes]) -> None:
        # A mapped page without a block on the disk ends the process.
        os.posix_fallocate(file.fileno(), 0, size)
        array = np.memmap(file, np.uint8, "r+", shape=shape)
        fill(array)
        array.flush()

    lock = locks.acquire(path.with_name(f"{path.name}.lock"), wait_s=locks.FOREVER)
    try:
        if not path.is_file() or path.stat().st_size != size:
            for left in path.parent.iterdir():  # of a process that was stopped: no other writes while this has the lock
                if is_temporary(left.name, {path.name}):
                    left.unlink()
            write_whole(path, write)
    finally:
        if lock is not None:
            os.close(lock)
    return np.memmap(path, np.uint8, "c", shape=shape)
