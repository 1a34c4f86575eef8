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

from cxr_dist import figures
from cxr_dist.assessment import assess
from cxr_dist.calibration import scaled
from cxr_dist.examine.result import Examination
from cxr_dist.metrics import (
    Predictions,
    is_predictions_file,
    roc_curves,
    write_predictions,
)
from tfrecords_builder.errors import UserError
from tfrecords_builder.files import intended_name, write_bytes
from tfrecords_builder.page import template_environment

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.parquet", "report.html"
CONFUSION, ROC, HISTORY = "confusion_matrix.png", "roc.png", "history.png"
RELIABILITY, RISK = "reliability.png", "risk_coverage.png"
FILES = (PREDICTIONS, CONFUSION, ROC, HISTORY, RELIABILITY, RISK, REPORT, METRICS)
EXAMINATION = "examination.json"
MISTAKES_SHOWN = 20

_OF_EXAMINATION = re.compile(r"examination(\.json|-[a-z]+(-\d+)?\.(svg|png))")

_SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}
_NOTHING = "–"  # noqa: RUF001


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
            test, names the images in the captions.
        best_epoch: the epoch whose weights were evaluated, counted from 1 through all stages; by default the
            one of the highest validation accuracy.
        calibrated: what `calibration.fit` found on validation images; without it the report says nothing of it.
        examination: of the same network; then there are examination.json and its figures too.

    Returns:
        The metrics, as `assessment.assess` gives them, and with an examination its `alarms` as sentences.

    Raises:
        UserError: `out` holds something else, or cannot be written.
    """
    check_output_folder(out)
    metrics = assess(predictions, calibrated)
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
        data = base64.b64encode(figures.svg_bytes(self.figure)).decode()
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
        Drawing(CONFUSION, "Confusion matrix", confusion_caption(metrics, kind), confusion),
        Drawing(ROC, "ROC curves", roc_caption(metrics, predictions), figures.roc_figure(predictions)),
    ]
    if history:
        figure = figures.history_figure(history, best_epoch)
        drawings.append(Drawing(HISTORY, "Training history", history_caption(history, best_epoch), figure))
    calibrated = metrics["calibration"]
    if calibrated is not None:
        bins, answers = calibrated["reliability"], calibrated["answers"]
        figure = figures.reliability_figure(bins["before"], bins["after"])
        drawings.append(Drawing(RELIABILITY, "Reliability", reliability_caption(calibrated), figure))
        figure = figures.risk_coverage_figure(
            scaled(predictions, calibrated["temperature"]),
            calibrated["target_risk"],
            answers["coverage"] if calibrated["abstain_threshold"] is not None else None,
        )
        drawings.append(Drawing(RISK, "Risk and coverage", risk_caption(calibrated), figure))
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
        "display": figures.display_name,
        "percent": _percent,
        "decimal": _decimal,
        "interval": _interval,
        "percent_interval": _percent_interval,
        "signed": _signed,
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
        uncertainty_words=uncertainty_words(metrics["uncertainty"]),
        published_words=published_words(metrics["published"]),
        card=model_card(info),
        tables=info_tables(info),
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


def confusion_caption(metrics: Mapping[str, Any], kind: str) -> str:
    """How many images lie on the diagonal, and the most frequent confusion (ties: the first in label order)."""
    counts = np.array(metrics["confusion_matrix"])
    names = [figures.display_name(name) for name in metrics["class_names"]]
    hits, total = int(np.trace(counts)), int(counts.sum())
    text = f"{hits:,} of {_count(total, kind)} lie on the diagonal ({_percent(hits / total)})"
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"{text}: no image was misclassified."
    true, predicted = np.unravel_index(np.argmax(wrong), wrong.shape)
    most, of = int(wrong[true, predicted]), int(counts[true].sum())
    # In a tie no confusion is the most frequent one.
    phrase = "the most frequent confusion is" if np.sum(wrong == most) == 1 else "among the most frequent confusions is"
    return f"{text}; {phrase} {names[true]} taken for {names[predicted]} ({most:,} of {of:,})."


def roc_caption(metrics: Mapping[str, Any], predictions: Predictions) -> str:
    """The best and the least separated class, and which classes have no curve."""
    aucs = {name: metrics["per_class"][name]["auc"] for name in roc_curves(predictions)}
    if not aucs:
        return "No class has a ROC curve, because all images are of one class."
    best, worst = max(aucs, key=aucs.__getitem__), min(aucs, key=aucs.__getitem__)
    text = f"One class against the rest, macro-averaged AUC {metrics['auc_macro_ovr']:.3f}"
    if f"{aucs[best]:.3f}" == f"{aucs[worst]:.3f}":
        text += f"; every class has an AUC of {aucs[best]:.3f}"
    else:
        text += f"; {figures.display_name(best)} is separated best (AUC {aucs[best]:.3f})"
        text += f" and {figures.display_name(worst)} least (AUC {aucs[worst]:.3f})"
    absent = [figures.display_name(name) for name in predictions.class_names if name not in aucs]
    return f"{text}; there is no curve for {', '.join(absent)}, which has no images." if absent else f"{text}."


def history_caption(history: Sequence[Mapping[str, Any]], best_epoch: int | None = None) -> str:
    """The epochs of each stage, and the best one by validation."""
    spans = figures.stage_spans(history)
    parts = [f"{_count(end - start + 1, '', 'epoch')} of {_stage_words(stage)}" for stage, start, end in spans]
    text = f"Accuracy and loss by epoch: {', then '.join(parts)}"
    best = figures.best_epoch_of(history) if best_epoch is None else best_epoch
    if best is None:
        return f"{text}; no epoch was validated."
    accuracy = history[best - 1].get("val_accuracy")
    value = "" if accuracy is None else f", with a validation accuracy of {_percent(accuracy)}"
    return f"{text}; the best epoch is {best}{value}."


def reliability_caption(calibrated: Mapping[str, Any]) -> str:
    """How far the answers' probabilities are from the share of right answers, before and after scaling."""
    before, after = (calibrated[when]["calibration_error"] for when in ("before", "after"))
    temperature = calibrated["temperature"]
    leaning = "too sure" if temperature > 1 else "not sure enough"
    return (
        f"On validation the network's probabilities were {leaning}: dividing its logits by {temperature:.3g} fits "
        f"best. On these images the expected calibration error is {before:.3f} before and {after:.3f} after, the log "
        f"loss {calibrated['before']['log_loss']:.3f} and {calibrated['after']['log_loss']:.3f}, the Brier score "
        f"{calibrated['before']['brier']:.3f} and {calibrated['after']['brier']:.3f}."
    )


def risk_caption(calibrated: Mapping[str, Any]) -> str:
    """What the threshold that was chosen on validation does to these images."""
    risk, threshold, answers = calibrated["target_risk"], calibrated["abstain_threshold"], calibrated["answers"]
    wanted = f"at most {_percent(risk)} wrong answers, with 95% confidence"
    if threshold is None:
        return f"No probability on validation was high enough for {wanted}: this model should always abstain."
    text = f"For {wanted}, the model answers from a probability of {threshold:.3f} on, as chosen on validation. "
    if not answers["answered"]:
        return f"{text}On these images it never does."
    wrong = _percent(1 - answers["accuracy"])
    return f"{text}On these images it answers {_percent(answers['coverage'])}, of which {wrong} are wrong."


def uncertainty_words(uncertainty: Mapping[str, Any]) -> str:
    """What the intervals are, and over what they were drawn."""
    unit, units = uncertainty["unit"], uncertainty["units"]
    of = (
        "images, as it is not known which belong together"
        if unit == "image"
        else ("groups of images (copies of one, or one patient's, stay together)")
    )
    return (
        f"In brackets: {uncertainty['level']:.0%} intervals, from {uncertainty['resamples']:,} bootstrap resamples of "
        f"{units:,} {of}. They say what other images of the same kind would change, not what other hospitals would."
    )


def published_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the difference to the published result means anything."""
    if not rows:
        return ""
    names = {"accuracy": "accuracy", "f1_macro": "macro F1"}
    parts = [
        f"{names[row['metric']]} is {abs(row['difference']):.3f} "
        + ("higher" if row["difference"] > 0 else "lower")
        + (", which is within noise" if row["verdict"] == "within noise" else ", which is more than noise")
        for row in rows
        if row["verdict"] is not None
    ]
    return f"Against the published result, {'; '.join(parts)}." if parts else ""


def model_card(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What whoever gets the model must know (after Mitchell et al. 2019), from what the run tells of itself."""
    training = info.get("training")
    training = training if isinstance(training, Mapping) else {}
    parameters, seconds = training.get("parameters"), training.get("seconds")
    size = f" with {parameters:,} parameters" if isinstance(parameters, int) else ""
    rows = [
        ("Model", f"ResNet50{size}; takes gray pixels, gives one probability a class."),
        ("Data", f"Evaluated on {info.get('images', 'images that were not named')}."),
        (
            "Intended use",
            "Research and teaching: how such classifiers are trained and judged. Not for diagnosis, triage or any "
            "decision about a patient.",
        ),
        (
            "Limits",
            "Trained on one collection, in which class and source may coincide; different images of one patient may be "
            "in different splits where the collection does not name patients; answers anything, also what is no X-ray.",
        ),
    ]
    if isinstance(seconds, Mapping) and isinstance(seconds.get("total"), (int, float)):
        where = f"{training.get('replicas', 1)} x {training.get('device', 'device')}"
        rows.append(
            ("Training cost", f"{seconds['total'] / 60:,.1f} minutes on {where}, in {training.get('precision')}.")
        )
    return rows


def info_tables(info: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """`info` as tables of text, (title, rows of name and value).

    What is not nested comes first, without a title; then one table per group.
    """
    flat = {key: value for key, value in info.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in info.items() if isinstance(value, Mapping) and value}
    tables = [("", [(_words(key), _value(value, separators=True)) for key, value in flat.items()])] if flat else []
    tables += [
        (_words(title), [(key, _value(value)) for key, value in _flattened(group)]) for title, group in groups.items()
    ]
    return tables


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


def _stage_words(stage: str) -> str:
    name, _, what = figures.stage_label(stage).partition(": ")
    return f"{name} ({what})" if what else name


def _count(number: int, kind: str, noun: str = "image") -> str:
    return " ".join(word for word in (f"{number:,}", kind, noun if number == 1 else f"{noun}s") if word)


def _flattened(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            rows += _flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: Any, separators: bool = False) -> str:
    if value is None or (isinstance(value, (str, Mapping, Sequence)) and not value):
        return _NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # A seed or a port in the configuration is a name, not a quantity: no separators there.
        return f"{value:,}" if separators else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item, separators) for item in value)
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(pair: Sequence[float | None] | None) -> str:
    if pair is None or pair[0] is None or pair[1] is None:
        return ""
    return f"[{pair[0]:.3f}, {pair[1]:.3f}]"


def _percent_interval(pair: Sequence[float | None] | None) -> str:
    if pair is None or pair[0] is None or pair[1] is None:
        return ""
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def _signed(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:+.3f}".replace("-", "\u2212")


def _decimal(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:.3f}"
