"""An evaluation's folder: metrics, predictions, figures, and one self-contained HTML page for people."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxr_dist.evaluation import captions, figures
from cxr_dist.evaluation.assessment import UNKNOWN, Origin, assess
from cxr_dist.evaluation.calibration import scaled
from cxr_dist.evaluation.examination.findings import Examination
from cxr_dist.evaluation.predictions import Predictions, is_predictions_file, write_predictions
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.figure_style import display_name, svg_bytes
from tfrecords_builder.common.files import intended_name, write_bytes
from tfrecords_builder.common.page import template_environment

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.parquet", "report.html"
CONFUSION, ROC, HISTORY = "confusion_matrix.png", "roc.png", "history.png"
RELIABILITY, RISK = "reliability.png", "risk_coverage.png"
FILES = (PREDICTIONS, CONFUSION, ROC, HISTORY, RELIABILITY, RISK, REPORT, METRICS)
EXAMINATION = "examination.json"
MISTAKES_SHOWN = 20

_OF_EXAMINATION = re.compile(r"examination(\.json|-[a-z]+(-\d+)?\.(svg|png))")

_SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


def check_output_folder(out: Path) -> None:
    """Refuse, before any work, a place where an evaluation must not be written.

    Good are: a path that does not exist, an empty folder, an evaluation (whole, or one that was interrupted).

    Raises:
        UserError: `out` is a file, or a folder that holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for the evaluation")
    entries = [entry.name for entry in out.iterdir()]
    if not entries or _is_metrics_file(out / METRICS):
        return
    # The metrics are written last, the predictions first: an interrupted evaluation has the one without the other.
    ours = all(_is_ours(intended_name(name) or name) for name in entries)
    written = [name for name in entries if intended_name(name) is None]
    if ours and METRICS not in entries and (not written or is_predictions_file(out / PREDICTIONS)):
        return
    raise UserError(f"{out}: holds something other than an evaluation; give an empty or new folder")


def write_evaluation(
    out: Path,
    predictions: Predictions,
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
    best_epoch: int | None = None,
    calibrated: Mapping[str, Any] | None = None,
    examination: Examination | None = None,
    calibration_note: str | None = None,
    origin: Origin = UNKNOWN,
) -> dict[str, Any]:
    """Write metrics.json, predictions.parquet, report.html and its figures as PNG.

    Everything is computed before the first file is touched. An earlier evaluation in `out` loses its
    metrics.json first and gets the new one last: a folder with metrics.json is complete and of one piece.

    Args:
        out: created if need be; see `check_output_folder`.
        predictions: of the evaluated images.
        history: the run's history, one row per epoch (see `figures.history_figure`); if empty, there is no
            history.png and the report says so.
        info: what the report tells of the run: numbers, strings, and one level of groups (a mapping becomes a
            table of its own; what is nested deeper gets dotted names). `split`, if it is train, validation or
            test, names the images in the captions; test alone is held against the published result.
        best_epoch: the epoch whose weights were evaluated, counted from 1 through all stages; by default the
            one of the highest validation accuracy.
        calibrated: what `calibration.fit` found on validation images; without it the report says nothing of it.
        examination: of the same network; then there are examination.json and its figures too.
        calibration_note: a sentence on where `calibrated` is from, or why there is none.
        origin: which of the images the run has seen, and how many patients are named.

    Returns:
        The metrics, as `assessment.assess` gives them, `calibration_note`, and with an examination its `alarms` as
        sentences.

    Raises:
        UserError: `out` holds something else, or cannot be written.
    """
    check_output_folder(out)
    comparable = info.get("split") == "test" and not info.get("drawn")
    metrics = assess(predictions, calibrated, comparable=comparable, origin=origin)
    metrics["calibration_note"] = calibration_note
    if examination is not None:
        metrics["alarms"] = [finding.sentence for finding in examination.alarms]
    drawings = _drawings(metrics, predictions, history, _kind_of_images(info), best_epoch)
    images = {drawing.file: figures.png_bytes(drawing.figure) for drawing in drawings}
    page = render_report(metrics, predictions, info, drawings, examination)
    examined = _examination_files(examination)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / METRICS).unlink(missing_ok=True)
        write_predictions(out / PREDICTIONS, predictions)
        for name in {CONFUSION, ROC, HISTORY, RELIABILITY, RISK} - images.keys():
            (out / name).unlink(missing_ok=True)  # of an earlier evaluation that had it
        for old in [path for path in out.iterdir() if _OF_EXAMINATION.fullmatch(path.name)]:
            old.unlink()
        for name, content in (images | examined).items():
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


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure of the report, with what it shows."""

    file: str
    title: str
    caption: str
    figure: Figure

    @property
    def shown(self) -> dict[str, str]:
        """As the page has it: vectors, and the caption as text alternative."""
        data = base64.b64encode(svg_bytes(self.figure)).decode()
        alt = f"{self.title}. {self.caption}"
        return {"file": self.file, "title": self.title, "caption": self.caption, "alt": alt, "data": data}


def _drawings(
    metrics: Mapping[str, Any],
    predictions: Predictions,
    history: Sequence[Mapping[str, Any]],
    kind: str,
    best_epoch: int | None,
) -> list[Drawing]:
    confusion = figures.confusion_matrix_figure(metrics["confusion_matrix"], predictions.class_names)
    drawings = [
        Drawing(CONFUSION, "Confusion matrix", captions.confusion_caption(metrics, kind), confusion),
        Drawing(ROC, "ROC curves", captions.roc_caption(metrics, predictions), figures.roc_figure(predictions)),
    ]
    if history:
        figure = figures.history_figure(history, best_epoch)
        drawings.append(Drawing(HISTORY, "Training history", captions.history_caption(history, best_epoch), figure))
    calibrated = metrics["calibration"]
    if calibrated is not None:
        bins, answers = calibrated["reliability"], calibrated["answers"]
        figure = figures.reliability_figure(bins["before"], bins["after"])
        drawings.append(Drawing(RELIABILITY, "Reliability", captions.reliability_caption(calibrated), figure))
        figure = figures.risk_coverage_figure(
            scaled(predictions, calibrated["temperature"]),
            calibrated["target_risk"],
            answers["coverage"] if calibrated["abstain_threshold"] is not None else None,
        )
        drawings.append(Drawing(RISK, "Risk and coverage", captions.risk_caption(calibrated), figure))
    return drawings


def render_report(
    metrics: Mapping[str, Any],
    predictions: Predictions,
    info: Mapping[str, Any],
    drawings: Sequence[Drawing],
    examination: Examination | None = None,
) -> str:
    """The report as one HTML page that loads nothing: style and figures are inside."""
    shown = {drawing.file: drawing.shown for drawing in drawings}
    environment = template_environment("cxr_dist")
    environment.filters |= {
        "display": display_name,
        "percent": captions.percent,
        "decimal": captions.decimal,
        "interval": captions.interval,
        "percent_interval": captions.percent_interval,
        "signed": captions.signed,
    }
    errors = int(np.sum(predictions.labels != predictions.predicted))
    return environment.get_template("report.html.j2").render(
        metrics=metrics,
        examination=examination,
        kind=_kind_of_images(info),
        figures=[shown[name] for name in (CONFUSION, ROC, HISTORY) if name in shown],
        calibration_figures=[shown[name] for name in (RELIABILITY, RISK) if name in shown],
        has_history=HISTORY in shown,
        mistakes=confident_mistakes(predictions),
        errors=errors,
        uncertainty_words=captions.uncertainty_words(metrics["uncertainty"]),
        seen_words=captions.seen_words(metrics),
        seen_warning=captions.seen_warning(metrics),
        missing_words=captions.missing_words(metrics),
        published_words=captions.published_words(metrics["published"]),
        card=captions.model_card(info),
        tables=captions.info_tables(info),
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


def _examination_files(examination: Examination | None) -> dict[str, bytes]:
    if examination is None:
        return {}
    return {EXAMINATION: examination.to_json().encode()} | {panel.file: panel.content for panel in examination.panels}


def _is_ours(name: str) -> bool:
    return name in FILES or _OF_EXAMINATION.fullmatch(name) is not None


def _is_metrics_file(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "confusion_matrix" in content and "class_names" in content


def _kind_of_images(info: Mapping[str, Any]) -> str:
    return _SPLIT_NAMES.get(str(info["split"]), "") if "split" in info else ""
