"""An evaluation's folder: metrics, predictions, figures, and one self-contained HTML page for people."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from cxr_dist.evaluation import figures, page_text
from cxr_dist.evaluation.assessment import UNKNOWN, Origin, assess
from cxr_dist.evaluation.examination.findings import Examination
from cxr_dist.evaluation.figures import CONFUSION, HISTORY, RELIABILITY, RISK, ROC
from cxr_dist.evaluation.predictions import Predictions, is_predictions_file, write_predictions
from tfrecords_builder.common import files
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import display_name
from tfrecords_builder.common.files import write_bytes
from tfrecords_builder.common.page import template_environment

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.parquet", "report.html"
FILES = (PREDICTIONS, CONFUSION, ROC, HISTORY, RELIABILITY, RISK, REPORT, METRICS)
EXAMINATION = "examination.json"
MISTAKES_SHOWN = 20

_OF_EXAMINATION = re.compile(r"examination(\.json|-[a-z]+(-\d+)?\.(svg|png))")

_SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that an evaluation's folder is made of."""

    predictions: Predictions
    history: Sequence[Mapping[str, Any]]
    """The run's, one row per epoch; see `figures.history`. If empty there is no history.png, and the report says so."""
    info: Mapping[str, Any]
    """What the report says of the run: numbers, strings, and one level of groups (a mapping becomes a table of its
    own; what is nested deeper gets dotted names). `split`, if it is train, validation or test, names the images in the
    captions; test alone is compared with the published result."""
    calibrated: Mapping[str, Any] | None = None
    """What `calibration.fit` found on validation images; without it the report says nothing of it."""
    calibration_note: str | None = None
    """A sentence on where `calibrated` is from, or why there is none."""
    examination: Examination | None = None
    """Of the same network; then there are examination.json and its figures too."""
    origin: Origin = UNKNOWN

    @property
    def kind(self) -> str:
        """Of the images: training, validation, test, or nothing."""
        return _SPLIT_NAMES.get(str(self.info.get("split")), "")

    @property
    def selection_metric(self) -> str:
        """The run's `selection.metric`."""
        config = self.info.get("config")
        selection = config.get("selection") if isinstance(config, Mapping) else None
        return str(selection["metric"]) if isinstance(selection, Mapping) else "accuracy"

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: of `assessment.assess`, `calibration_note`, and the `alarms` as sentences."""
        comparable = self.info.get("split") == "test" and not self.info.get("drawn")
        metrics = assess(self.predictions, self.calibrated, comparable=comparable, origin=self.origin)
        metrics["calibration_note"] = self.calibration_note
        if self.examination is not None:
            metrics["alarms"] = [finding.sentence for finding in self.examination.alarms]
        return metrics


def check_output_folder(out: Path) -> None:
    """Refuse, before any work, a place where an evaluation must not be written.

    Beside a complete evaluation other files may lie; an interrupted one is known by its predictions.

    Raises:
        UserError: `out` is a file, or a folder that holds something else.
    """
    if not {"confusion_matrix", "class_names"} <= files.read_json_object(out / METRICS).keys():
        # The metrics are written last, the predictions first: an interrupted evaluation has the one without the other.
        files.check_output_folder(
            out,
            "an evaluation",
            "--out",
            lambda name: (name in FILES and name != METRICS) or _OF_EXAMINATION.fullmatch(name) is not None,
            lambda: is_predictions_file(out / PREDICTIONS),
        )


def write_evaluation(out: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Write metrics.json, predictions.parquet, report.html and its figures as PNG; the metrics.

    Everything is computed before the first file is touched. An earlier evaluation in `out` loses its metrics.json first
    and gets the new one last: a folder with metrics.json is complete and of one piece.

    Raises:
        UserError: `out` holds something else, or cannot be written.
    """
    check_output_folder(out)
    metrics, examination = evaluation.metrics(), evaluation.examination
    drawn = _figures(metrics, evaluation)
    contents = {figure.file: figure.content for figure in drawn}
    page = render_report(metrics, evaluation, drawn)
    if examination is not None:
        contents[EXAMINATION] = examination.to_json().encode()
        contents |= {figure.file: figure.content for figure in examination.figures}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / METRICS).unlink(missing_ok=True)
        write_predictions(out / PREDICTIONS, evaluation.predictions)
        for path in list(out.iterdir()):  # of an earlier evaluation that had them
            is_figure = path.name in (CONFUSION, ROC, HISTORY, RELIABILITY, RISK)
            if _OF_EXAMINATION.fullmatch(path.name) or (is_figure and path.name not in contents):
                path.unlink()
        for name, content in contents.items():
            write_bytes(out / name, content)
        write_bytes(out / REPORT, page.encode())
        write_bytes(out / METRICS, metrics_json(metrics).encode())
    except OSError as error:
        raise UserError(
            f"{out}: cannot write the evaluation ({error.strerror or error}); give another folder"
        ) from error
    return metrics


def metrics_json(metrics: Mapping[str, Any]) -> str:
    """`metrics` as strict JSON. Raises ValueError rather than write NaN, which is not JSON."""
    return json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _figures(metrics: Mapping[str, Any], evaluation: Evaluation) -> list[Figure]:
    predictions, calibrated = evaluation.predictions, metrics["calibration"]
    drawn = [
        figures.confusion_matrix(metrics["confusion_matrix"], predictions.class_names, evaluation.kind),
        figures.roc(predictions, metrics),
    ]
    if evaluation.history:
        drawn.append(figures.history(evaluation.history, metric=evaluation.selection_metric))
    if calibrated is not None:
        drawn += [figures.reliability(calibrated), figures.risk_coverage(predictions, calibrated)]
    return drawn


def render_report(metrics: Mapping[str, Any], evaluation: Evaluation, drawn: Sequence[Figure]) -> str:
    """The report as one HTML page that loads nothing: style and figures are inside."""
    shown = {figure.file: figure for figure in drawn}
    predictions, examination = evaluation.predictions, evaluation.examination
    environment = template_environment("cxr_dist")
    environment.filters |= {
        "display": display_name,
        "percent": page_text.percent,
        "decimal": page_text.decimal,
        "interval": page_text.interval,
        "percent_interval": page_text.percent_interval,
        "signed": page_text.signed,
    }
    return environment.get_template("report.html.j2").render(
        metrics=metrics,
        examination=examination,
        kind=evaluation.kind,
        figures=[shown[name] for name in (CONFUSION, ROC, HISTORY) if name in shown],
        calibration_figures=[shown[name] for name in (RELIABILITY, RISK) if name in shown],
        has_history=HISTORY in shown,
        mistakes=confident_mistakes(predictions),
        errors=int(np.sum(predictions.labels != predictions.predicted)),
        uncertainty_words=page_text.uncertainty_words(metrics["uncertainty"]),
        seen_words=page_text.seen_words(metrics),
        seen_warning=page_text.seen_warning(metrics),
        missing_words=page_text.missing_words(metrics),
        published_words=page_text.published_words(metrics["published"]),
        card=page_text.model_card(evaluation.info),
        tables=page_text.info_tables(evaluation.info),
        files=[PREDICTIONS, METRICS, *shown, *([EXAMINATION] if examination else [])],
        written=datetime.now().astimezone().isoformat(" ", "seconds"),
    )


def confident_mistakes(predictions: Predictions, limit: int = MISTAKES_SHOWN) -> list[dict[str, Any]]:
    """The misclassified images of which the model was surest: path, true, predicted, probability, true_probability.

    The highest probability of the wrong class first, ties by path.
    """
    names, predicted = predictions.class_names, predictions.predicted
    wrong = np.flatnonzero(predictions.labels != predicted)
    ranked = sorted(wrong, key=lambda row: (-predictions.probabilities[row, predicted[row]], predictions.paths[row]))
    return [
        {
            "path": predictions.paths[row],
            "true": names[predictions.labels[row]],
            "predicted": names[predicted[row]],
            "probability": float(predictions.probabilities[row, predicted[row]]),
            "true_probability": float(predictions.probabilities[row, predictions.labels[row]]),
        }
        for row in ranked[:limit]
    ]
