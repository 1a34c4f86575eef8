"""Answers for image files, a batch at a time: thousands of files take the memory of one batch."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cxr_dist.classifier import BATCH_SIZE, Answer, Classifier
from cxr_dist.inputs import read_square
from tfrecords_builder.images import ImageError


@dataclass(frozen=True)
class Outcome:
    """What became of one file: an answer, or why there is none."""

    path: Path
    answer: Answer | None = None
    error: str | None = None

    def to_json(self) -> str:
        """One line: path, and error or the fields of the answer."""
        said = asdict(self.answer) if self.answer is not None else {"error": self.error}
        return json.dumps({"path": str(self.path), **said}, allow_nan=False)


def predict_files(
    classifier: Classifier, paths: Sequence[Path], workers: int, batch_size: int = BATCH_SIZE
) -> Iterator[Outcome]:
    """An outcome for each file, in order, as soon as its batch is done.

    Args:
        workers: Threads that decode.
        batch_size: Images in a step, and in memory.

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
            answers = iter(classifier.answers(np.stack(whole)) if whole else [])
            for path, square in zip(part, squares, strict=True):
                if isinstance(square, ImageError):
                    yield Outcome(path, error=square.reason)
                else:
                    yield Outcome(path, next(answers))


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
