"""Two runs, or evaluations of runs, on the same images: what is not evaluated yet is predicted, and nothing written."""

import json
from pathlib import Path
from typing import Any

from cxr_dist.evaluation.compare import Images, check_same_images, compare
from cxr_dist.evaluation.evaluate import images_of, predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.evaluation.predictions import Predictions, read_predictions
from cxr_dist.evaluation.report import METRICS, PREDICTIONS
from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.common.errors import UserError, reading


def compare_folders(first: Path, second: Path, devices: int | None = None) -> dict[str, Any]:
    """The second less the first.

    Args:
        first, second: The folder of an evaluation, or of a finished run, which is taken on its test split.
        devices: As `evaluate_run`.

    Returns:
        As `compare`.

    Raises:
        UserError: a folder is neither, or the images, their labels or the classes differ.
    """
    folders = (first, second)
    check_same_images(*(_images(folder) for folder in folders))  # predicting takes minutes
    return compare(*(_predictions(folder, devices) for folder in folders))


def seen_share(folder: Path) -> float:
    """The share of images that the model of an evaluation has seen, 0 to 1; 0 for a run, and where it is not known.

    Raises:
        UserError: the evaluation is damaged.
    """
    path = folder / METRICS
    if not path.is_file():
        return 0.0
    with reading(path, "evaluate again"):
        seen = json.loads(path.read_text(encoding="utf-8"))["seen"]
        return float(seen["share"]) if seen else 0.0


def _images(folder: Path) -> Images:
    """Of an evaluation, or of the test split of a run."""
    evaluated = _evaluated(folder)
    if evaluated is None:
        return images_of(EvaluationSpec(folder, folder))
    return Images(evaluated.paths, evaluated.labels, evaluated.class_names)


def _predictions(folder: Path, devices: int | None) -> Predictions:
    """Of an evaluation, or of a run on the test split."""
    evaluated = _evaluated(folder)
    if evaluated is not None:
        return evaluated
    with progress_bar(f"predict {folder.name}") as progress:
        return predict_run(EvaluationSpec(folder, folder), devices, progress)


def _evaluated(folder: Path) -> Predictions | None:
    """What an evaluation's folder holds; None for another folder."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give the folder of a run, a search or an evaluation")
    if not (folder / PREDICTIONS).is_file():
        return None
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: the evaluation is not complete; run cxr-dist evaluate again")
    return read_predictions(folder / PREDICTIONS)
