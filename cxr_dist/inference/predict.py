"""Predictions for image files, a batch at a time: thousands of files take the memory of one batch."""

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
from cxr_dist.inference.classifier import BATCH_SIZE, Classifier, Prediction
from cxr_dist.inference.grad_cam import make_explain, overlay_png
from tfrecords_builder.common.files import check_output_folder, write_bytes
from tfrecords_builder.images.decoded import ImageError
from tfrecords_builder.images.resizing import Square, squares


@dataclass(frozen=True)
class Outcome:
    """A file's prediction, or why there is none."""

    path: Path
    prediction: Prediction | None = None
    error: str | None = None
    overlay: Path | None = None
    """The image with the network's attention over it, where that was asked for."""

    def to_json(self) -> str:
        """One line: path, and error or the fields of the prediction."""
        result = asdict(self.prediction) if self.prediction is not None else {"error": self.error}
        drawn = {} if self.overlay is None else {"overlay": str(self.overlay)}
        return json.dumps({"path": str(self.path), **result, **drawn}, allow_nan=False)


class Overlays:
    """Draws where the network looks, for the class that it names, into a folder of its own: NNNNN-NAME.png."""

    _NAME = re.compile(r"\d{5,}-.*\.png", re.DOTALL)
    _LONGEST = 100
    """Letters of an image's name."""

    def __init__(self, folder: Path, classifier: Classifier) -> None:
        """Raises UserError where the folder holds anything else."""
        self._folder, self._classifier, self._number = folder, classifier, 0
        check_output_folder(folder, "overlays", "--overlay", lambda name: bool(self._NAME.fullmatch(name)))
        self._explain = make_explain(classifier.model)

    def draw(
        self, paths: Sequence[Path], images: npt.NDArray[np.uint8], predictions: Sequence[Prediction]
    ) -> Iterator[Path]:
        """Write one for each of uint8 [B, S, S], and say where."""
        names = self._classifier.class_names
        targets = np.array([names.index(prediction.predicted) for prediction in predictions], np.int32)
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
            predictions: list[Prediction] = []
            drawn: Iterator[Path | None] = itertools.repeat(None)
            if whole:
                images = np.stack(whole)
                predictions = classifier.predict(images)
                if overlays is not None:
                    shown = [path for path, square in zip(part, squares, strict=True) if isinstance(square, np.ndarray)]
                    drawn = overlays.draw(shown, images, predictions)
            results = zip(predictions, drawn, strict=False)
            for path, square in zip(part, squares, strict=True):
                if isinstance(square, ImageError):
                    yield Outcome(path, error=square.reason)
                else:
                    prediction, overlay = next(results)
                    yield Outcome(path, prediction, overlay=overlay)


def predict_arrays(classifier: Classifier, images: Sequence[npt.NDArray[np.uint8]]) -> list[Prediction]:
    """A prediction for each of the gray images, uint8 [H, W], which are resized as those of files are.

    Raises:
        ValueError: one has another shape or dtype.
    """
    predictions: list[Prediction] = []
    for first in range(0, len(images), BATCH_SIZE):
        part = images[first : first + BATCH_SIZE]
        if strange := [image for image in part if image.ndim != 2 or image.dtype != np.uint8 or not image.size]:
            raise ValueError(f"an image of {strange[0].dtype} {strange[0].shape}, not uint8 [H, W]")
        resized = [squares([image], [Square(classifier.image_size)])[0][0] for image in part]
        predictions += classifier.predict(np.stack(resized))
    return predictions


def table_head(class_names: Sequence[str]) -> str:
    """The first line of the table for people."""
    return "  ".join([f"{'predicted':{_width(class_names)}}", *map(_column, class_names), "path"])


def table_line(outcome: Outcome, class_names: Sequence[str]) -> str:
    """One file's line: what it shows, every probability, and where it is."""
    prediction, path = outcome.prediction, printable(str(outcome.path))
    if prediction is None:
        return f"{'unreadable':{_width(class_names)}}  {path}: {outcome.error}"
    word = "abstains" if prediction.abstained else prediction.predicted
    values = [f"{value:>{len(_column(name))}.4f}" for name, value in prediction.probabilities.items()]
    why = f": {prediction.reason}" if prediction.reason else ""
    return "  ".join([f"{word:{_width(class_names)}}", *values, f"{path}{why}"])


def printable(name: str) -> str:
    """A file's name on one line, without what a terminal would obey."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def _width(class_names: Sequence[str]) -> int:
    return max(len(word) for word in [*class_names, "unreadable"])


def _column(class_name: str) -> str:
    return f"{class_name:>6}"
