"""A decoded picture, and what is said of a file that holds none."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfrecords_builder.common.errors import UserError

MAX_PIXELS = 89_478_485
"""A file of a few kilobytes can claim billions; detectors of X-rays have 20 million at most. The limit is Pillow's,
which only warns of it (and raises an error at twice as many), so the warning adds nothing to our error."""


class SmallRange(StrEnum):
    """What became of a picture of more than 8 bits that uses at most a sixteenth of its range; see `gray_levels`."""

    STRETCHED = "stretched"
    KEPT = "kept"
    """A colour picture, of which Pillow gives the upper 8 bits alone."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image of its own size."""

    gray: npt.NDArray[np.uint8]
    """Upright: [H, W]."""
    width: int
    """Of the file's image, in pixels."""
    height: int
    small_range: SmallRange | None = None
    """None for a picture that uses more of its range, or has 8 bits."""


class ImageError(UserError):
    """A file that is no whole image of a format that is read.

    Attributes:
        path: The file.
        reason: What is wrong with it, without the file's name.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        # Both arguments go to the base class: the error then survives pickling between processes.
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; replace or remove the file (a build can skip it: --on-error skip)"


class TooLargeError(ImageError):
    """An image of more pixels than are decoded."""
