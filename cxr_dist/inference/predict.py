"""Answers for image files, a batch at a time: thousands of files take the memory of one batch."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cxr_dist.data.image_files import read_square
from cxr_dist.inference.classifier import BATCH_SIZE, Answer, Classifier
from cxr_dist.inference.grad_cam import make_explain
from cxr_dist.inference.overlay import overlay_png
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import intended_name, write_bytes
from tfrecords_builder.images.decode import ImageError


@dataclass(frozen=True)
class Outcome:
    """What became of one file: an answer, or why there is none."""

    path: Path
    answer: Answer | None = None
    error: str | None = None
    overlay: Path | None = None
    """The image with the network's attention over it, where that was asked for."""

    def to_json(self) -> str:
        """One line: path, and error or the fields of the answer."""
        said = asdict(self.answer) if self.answer is not None else {"error": self.error}
        drawn = {} if self.overlay is None else {"overlay": str(self.overlay)}
        return json.dumps({"path": str(self.path), **said, **drawn}, allow_nan=False)


class Overlays:
    """Draws where the network looks, for the class that it names, into a folder of its own: NNNNN-NAME.png."""

    _NAME = re.compile(r"\d{5,}-.*\.png", re.DOTALL)
    _LONGEST = 100
    """Letters of an image's name."""

    def __init__(self, folder: Path, classifier: Classifier) -> None:
        """Raises UserError where the folder holds anything else."""
        self._folder, self._classifier, self._number = folder, classifier, 0
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        own = [name for name in names if self._NAME.fullmatch(intended_name(name) or name)]
        if (folder.exists() and not folder.is_dir()) or len(own) < len(names):
            raise UserError(f"--overlay {folder}: holds something other than overlays; give a new folder")
        self._explain = make_explain(classifier.model)

    def draw(self, paths: Sequence[Path], images: npt.NDArray[np.uint8], answers: Sequence[Answer]) -> Iterator[Path]:
        """Write one for each of uint8 [B, S, S], and say where."""
        names = self._classifier.class_names
        targets = np.array([names.index(answer.predicted) for answer in answers], np.int32)
        for path, image, heat in zip(paths, images, self._explain(images, targets).maps, strict=True):
            self._number += 1
            target = self._folder / f"{self._number:05d}-{path.stem[: self._LONGEST]}.png"
            write_bytes(target, overlay_png(image, heat, self._classifier.image_size))
            yield target


def predict_files(
    classifier: Classifier,
    paths: Sequence[Path],
    workers: int,
    batch_size: int = BATCH_SIZE,
    overlays: Overlays | None = None,
) -> Iterator[Outcome]:
    """An outcome for each file, in order, as soon as its batch is done.

    Args:
        workers: Threads that decode.
        batch_size: Images in a step, and in memory.
        overlays: Draws what was read.

    Raises:
        UserError: a file is DICOM, and pydicom is not installed.
    """

    def read(path: Path) -> npt.NDArray[np.uint8] | ImageError:
        try:
            return read_square(path, classifier.image_size)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for first in range(0, len(paths), batch_size):
            part = paths[first : first + batch_size]
            squares = list(pool.map(read, part))
            whole = [square for square in squares if isinstance(square, np.ndarray)]
            answers: list[Answer] = []
            drawn: Iterator[Path | None] = itertools.repeat(None)
            if whole:
                images = np.stack(whole)
                answers = classifier.answers(images)
                if overlays is not None:
                    shown = [path for path, square in zip(part, squares, strict=True) if isinstance(square, np.ndarray)]
                    drawn = overlays.draw(shown, images, answers)
            answered = zip(answers, drawn, strict=False)
            for path, square in zip(part, squares, strict=True):
                if isinstance(square, ImageError):
                    yield Outcome(path, error=square.reason)
                else:
                    answer, overlay = next(answered)
                    yield Outcome(path, answer, overlay=overlay)


def table_head(class_names: Sequence[str]) -> str:
    """The first line of the table for people."""
    return "  ".join([f"{'answer':{_width(class_names)}}", *map(_column, class_names), "path"])


def table_line(outcome: Outcome, class_names: Sequence[str]) -> str:
    """One file's line: what it shows, every probability, and where it is."""
    answer, path = outcome.answer, printable(str(outcome.path))
    if answer is None:
        return f"{'unreadable':{_width(class_names)}}  {path}: {outcome.error}"
    said = "abstains" if answer.abstained else answer.predicted
    values = [f"{value:>{len(_column(name))}.4f}" for name, value in answer.probabilities.items()]
    return "  ".join([f"{said:{_width(class_names)}}", *values, path])


def printable(name: str) -> str:
    """A file's name on one line, without what a terminal would obey."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def _width(class_names: Sequence[str]) -> int:
    return max(len(word) for word in [*class_names, "unreadable"])


def _column(class_name: str) -> str:
    return f"{class_name:>6}"
