"""The figures of an evaluation, each drawn and captioned by one function. Pure: numbers in, no pyplot, no display.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and no meaning hangs on colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import auc

from cxr_dist.evaluation import calibration
from cxr_dist.evaluation.history import best_epoch_of, column, stage_label, stage_spans
from cxr_dist.evaluation.metrics import mean_roc_curve, roc_curves
from cxr_dist.evaluation.page_text import count, percent
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.runs.ranking import WORDS
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import (
    BLUE,
    COLOURS,
    DASHES,
    GRAY,
    RULE,
    STYLE,
    VERMILLION,
    display_name,
    grid,
    wrapped,
)

CONFUSION, ROC, HISTORY = "confusion_matrix.png", "roc.png", "history.png"
RELIABILITY, RISK = "reliability.png", "risk_coverage.png"

# Above this, one-vs-rest curves are told apart only in the upper left corner.
_ZOOM_FROM_AUC = 0.95


def confusion_matrix(confusion: npt.ArrayLike, class_names: Sequence[str], kind: str = "") -> Figure:
    """Counts, with the percentage of the true class below each; the shade is that percentage.

    Args:
        confusion: [C, C] counts; rows are true classes, columns predicted ones. A class without images has
            no percentages.
        class_names: C names in label order.
        kind: Of the images, for the caption: training, validation or test.
    """
    counts, size = np.asarray(confusion).astype(np.int64), len(class_names)
    if counts.shape != (size, size):
        raise ValueError(f"confusion must be [{size}, {size}] for {size} classes, not {list(counts.shape)}")
    hits, total = int(np.trace(counts)), int(counts.sum())
    caption = f"The predicted class is correct for {hits:,} of {count(total, kind)} ({percent(hits / total)})"
    wrong = counts - np.diag(np.diag(counts))
    if wrong.any():
        true, predicted = divmod(int(np.argmax(wrong)), size)
        most = int(wrong[true, predicted])
        # In a tie no confusion is the most frequent one.
        phrase = "the most frequent error" if np.sum(wrong == most) == 1 else "among the most frequent errors"
        caption += (
            f"; {phrase} is {display_name(class_names[true])} predicted as {display_name(class_names[predicted])} "
            f"({most:,} of {int(counts[true].sum()):,})."
        )
    else:
        caption += ": no image was misclassified."
    return Figure(CONFUSION, "Confusion matrix", caption, _draw_confusion(counts, class_names))


def _draw_confusion(counts: npt.NDArray[np.int64], class_names: Sequence[str]) -> Drawing:
    size = len(class_names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    # Few classes leave room for wide cells, whose names stand upright in two or three lines.
    cell = 1.2 if size <= 5 else 0.82
    columns = [wrapped(name, 12 if size <= 5 else _wrap_width(name)) for name in class_names]
    rows = [
        f"{wrapped(name, _wrap_width(name))}\n(n = {total:,})"
        for name, total in zip(class_names, totals[:, 0], strict=True)
    ]
    upright = max(len(line) for label in columns for line in label.split("\n")) <= (14 if size <= 5 else 7)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(cell * size + 2.0, cell * size + (1.0 if upright else 2.0)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(size), columns)
        axes.set_yticks(range(size), rows)
        axes.tick_params(length=0)
        if not upright:
            # Across, not aslant: names of several lines keep to their own column.
            axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel("Predicted class")
        axes.set_ylabel("True class")
        axes.spines[:].set(visible=True, color=RULE, linewidth=0.8)
        for edge in range(1, size):
            axes.axhline(edge - 0.5, color=RULE, linewidth=0.8)
            axes.axvline(edge - 0.5, color=RULE, linewidth=0.8)
        for row, column in np.ndindex(counts.shape):
            # White on the dark half of the map: a contrast of at least 4.5 to 1 on either side.
            style: dict[str, Any] = {
                "xy": (column, row),
                "ha": "center",
                "textcoords": "offset points",
                "color": "white" if shares[row, column] > 0.55 else "black",
            }
            share = f"{100 * shares[row, column]:.1f}%" if totals[row, 0] else "–"  # noqa: RUF001
            axes.annotate(f"{counts[row, column]:,}", xytext=(0, 1), va="bottom", size=13, **style)
            axes.annotate(share, xytext=(0, -3), va="top", size=10, **style)
    return figure


def roc(predictions: Predictions, metrics: Mapping[str, Any]) -> Figure:
    """One-vs-rest ROC curve of every class, their mean at equal false positive rate, and the chance line.

    A good classifier's curves are repeated in an inset of the upper left corner. A class whose curve does not
    exist (no image inside it, or none outside) is named in the legend without one.

    Args:
        predictions: Of the evaluated images.
        metrics: Of `metrics.evaluate_predictions` on the same.
    """
    curves = roc_curves(predictions)
    aucs = {name: metrics["per_class"][name]["auc"] for name in curves}
    if aucs:
        best, worst = max(aucs, key=aucs.__getitem__), min(aucs, key=aucs.__getitem__)
        caption = f"One-vs-rest ROC curves; the macro-averaged AUC is {metrics['auc_macro_ovr']:.3f}"
        if f"{aucs[best]:.3f}" == f"{aucs[worst]:.3f}":
            caption += f"; every class has an AUC of {aucs[best]:.3f}"
        else:
            caption += f"; {display_name(best)} has the highest AUC ({aucs[best]:.3f})"
            caption += f" and {display_name(worst)} the lowest ({aucs[worst]:.3f})"
        absent = [display_name(name) for name in predictions.class_names if name not in aucs]
        caption += f"; there is no curve for {', '.join(absent)}, which has no images." if absent else "."
    else:
        caption = "There are no ROC curves, because all images are of one class."
    return Figure(ROC, "ROC curves", caption, _draw_roc(predictions, curves))


def _draw_roc(
    predictions: Predictions, curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
) -> Drawing:
    outside = len(predictions.class_names) > 5 or max(map(len, predictions.class_names)) > 24
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(9.0 if outside else 6.0, 5.6), layout="constrained")
        axes = figure.add_subplot()
        for index, name in enumerate(predictions.class_names):
            colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
            if name in curves:
                label = f"{wrapped(name, 34)} (AUC {auc(*curves[name]):.3f})"
                axes.plot(*curves[name], color=colour, linestyle=dashes, label=label)
            else:
                reason = "no images" if not (predictions.labels == index).any() else "no other images"
                axes.plot([], [], linestyle="none", label=f"{wrapped(name, 34)} ({reason})")
        if curves:
            mean = mean_roc_curve(list(curves.values()))
            axes.plot(*mean, color="black", linewidth=2.2, linestyle=":", label=f"macro average (AUC {auc(*mean):.3f})")
            if auc(*mean) >= _ZOOM_FROM_AUC:
                _zoom_into_corner(axes)
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1.0, linestyle=(0, (2, 3)), label="chance (AUC 0.500)")
        # Room at the borders: a good curve runs along them.
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("False positive rate (1 − specificity)")  # noqa: RUF001
        axes.set_ylabel("True positive rate (sensitivity)")
        if outside:
            axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), borderaxespad=0)
        else:
            axes.legend(loc="lower right")
    return figure


def reliability(calibrated: Mapping[str, Any]) -> Figure:
    """Accuracy by confidence before and after temperature scaling, and the number of images in each bin.

    Args:
        calibrated: `calibration` of `assessment.assess`.
    """
    before, after, temperature = calibrated["before"], calibrated["after"], calibrated["temperature"]
    caption = (
        f"On the validation images the model was {'over' if temperature > 1 else 'under'}confident; the fitted "
        f"temperature is {temperature:.3g}. On these images, scaling changes the expected calibration error "
        f"from {before['calibration_error']:.3f} to {after['calibration_error']:.3f}, the log loss from "
        f"{before['log_loss']:.3f} to {after['log_loss']:.3f}, and the Brier score from {before['brier']:.3f} to "
        f"{after['brier']:.3f}.{_in_sample_words(calibrated)}"
    )
    bins = calibrated["reliability"]
    return Figure(RELIABILITY, "Reliability diagram", caption, _draw_reliability(bins["before"], bins["after"]))


def _draw_reliability(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Drawing:
    series = [
        ("before temperature scaling", before, VERMILLION, "s", "--"),
        ("after temperature scaling", after, BLUE, "o", "-"),
    ]
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(6.0, 6.2), layout="constrained")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1.0, linestyle=(0, (2, 3)), label="perfect calibration")
        for number, (label, bins, colour, marker, dashes) in enumerate(series):
            points = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
            axes.plot(*points, color=colour, marker=marker, markersize=5, linestyle=dashes, label=label)
            width = (bins[0]["high"] - bins[0]["low"]) / (len(series) + 0.4)
            left = [row["low"] + width * (number + 0.2) for row in bins]
            counts.bar(left, [row["images"] for row in bins], width, align="edge", color=colour)
        axes.set(xlim=(0, 1.01), ylim=(-0.02, 1.02), ylabel="Accuracy")
        figure.legend(loc="outside upper center", ncols=2)  # few images in a bin take its curve anywhere
        counts.set(xlabel="Confidence (probability of the predicted class)", ylabel="Images", yscale="log")
    return figure


def risk_coverage(predictions: Predictions, calibrated: Mapping[str, Any]) -> Figure:
    """The error rate by the share of images that get a prediction, the most confident first.

    Args:
        predictions: Of the evaluated images, with the probabilities as the network gives them.
        calibrated: `calibration` of `assessment.assess`.
    """
    risk, threshold, at_threshold = (calibrated[key] for key in ("target_risk", "abstain_threshold", "at_threshold"))
    scaled = calibration.scaled(predictions, calibrated["temperature"])
    if threshold is None:
        caption = (
            f"No threshold keeps the error rate on validation images at {percent(risk)}: the model always abstains."
        )
        return Figure(RISK, "Risk-coverage curve", caption, _draw_risk(scaled, risk, None))
    caption = (
        f"For a target error rate of {percent(risk)}, the model abstains below a probability of {threshold:.3f}. "
        "This threshold was chosen on validation images. "
    )
    if calibrated.get("selected_the_model", True):
        caption += (
            "The validation images also selected the model, so the bound behind the threshold (95% confidence) is "
            "optimistic: on new images the error rate may be higher. "
        )
    caption += _in_sample_words(calibrated).lstrip() + " " if calibrated["in_sample"] else ""
    if at_threshold["predicted"]:
        error_rate = percent(1 - at_threshold["accuracy"])
        caption += (
            f"On these images the coverage is {percent(at_threshold['coverage'])} and the error rate {error_rate}."
        )
    else:
        caption += "On these images the model always abstains."
    return Figure(RISK, "Risk-coverage curve", caption, _draw_risk(scaled, risk, at_threshold["coverage"]))


def _in_sample_words(calibrated: Mapping[str, Any]) -> str:
    """A warning where the images are, at least in part, those that the calibration was fitted on."""
    number = calibrated["in_sample"]
    if number is None:
        return " Whether the temperature was fitted on any of these images is unknown."
    if not number:
        return ""
    return f" Temperature and threshold were fitted on {number:,} of these images, so these results are optimistic."


def _draw_risk(predictions: Predictions, risk: float, coverage: float | None) -> Drawing:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*calibration.risk_coverage(predictions), color=BLUE, drawstyle="steps-post", label="error rate")
        axes.axhline(risk, color=VERMILLION, linestyle="--", linewidth=1.4, label=f"target error rate ({risk:.0%})")
        if coverage is not None:
            label = f"threshold from validation (coverage {coverage:.0%})"
            axes.axvline(coverage, color="black", linestyle=":", linewidth=1.8, label=label)
        axes.set(
            xlim=(0, 1.01),
            xlabel="Coverage: share of images with a prediction",
            ylabel="Error rate of these predictions",
        )
        axes.set_ylim(0, None)
        axes.legend(loc="upper left")
    return figure


def history(rows: Sequence[Mapping[str, Any]], best_epoch: int | None = None, metric: str = "accuracy") -> Figure:
    """Accuracy and loss by epoch, training and validation, with the boundary between stages marked.

    Args:
        rows: One per epoch, in order, with stage, loss, accuracy, val_loss, val_accuracy (a missing or null value
            leaves a gap). Epochs are counted through all stages, from 1: the rows' own `epoch` is not used.
        best_epoch: The epoch to mark, counted likewise; `best_epoch_of(rows)` if None.
        metric: The `selection.metric` of the run.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("history is empty: there is nothing to plot")
    spans, best = stage_spans(rows), best_epoch_of(rows) if best_epoch is None else best_epoch
    stages = []
    for stage, start, end in spans:
        name, _, what = stage_label(stage).partition(": ")
        stages.append(f"{count(end - start + 1, noun='epoch')} of {name}" + (f" ({what})" if what else ""))
    caption = f"Accuracy and loss by epoch: {', then '.join(stages)}; "
    if best is None:
        caption += "no epoch was validated."
    else:
        accuracy = rows[best - 1].get("val_accuracy")
        value = "" if accuracy is None else f", with a validation accuracy of {percent(accuracy)}"
        chosen = "" if metric == "accuracy" else f" by {WORDS[metric]}"
        caption += f"the best epoch{chosen} is {best}{value}."
    return Figure(HISTORY, "Training history", caption, _draw_history(rows, spans, best))


def _draw_history(
    history: Sequence[Mapping[str, Any]], spans: Sequence[tuple[str, int, int]], best: int | None
) -> Drawing:
    epochs = np.arange(1, len(history) + 1)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.0, 6.4), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, key, title in zip(panels, ("accuracy", "loss"), ("Accuracy", "Loss"), strict=True):
            training, validation = column(history, key), column(history, f"val_{key}")
            axes.plot(epochs, training, color=BLUE, marker="o", markersize=4.5, label="training")
            axes.plot(
                epochs, validation, color=VERMILLION, marker="s", markersize=4.5, linestyle="--", label="validation"
            )
            if best is not None and math.isfinite(validation[best - 1]):
                ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 1.6}
                axes.plot(
                    [best],
                    [validation[best - 1]],
                    color="black",
                    linestyle="none",
                    **ring,
                    label=f"best (epoch {best})",
                )
            for _, start, _ in spans[1:]:
                axes.axvline(start - 0.5, color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)), gid="stage-boundary")
            axes.set_ylabel(title)
            axes.set_xlim(0.5, len(history) + 0.5)
            grid(axes, "y")
        panels[1].set_xlabel("Epoch, counted through all stages")
        panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _label_stages(panels[0], spans)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _wrap_width(class_name: str) -> int:
    """Characters a line, so that a name fills three lines at most (if its words allow), with room for the count."""
    return max(18, len(class_name) // 3 + 6)


def _zoom_into_corner(axes: Axes) -> None:
    """Repeat the curves drawn so far in an inset of the upper left corner, where good curves crowd together."""
    inset = axes.inset_axes((0.33, 0.4, 0.5, 0.5))
    for line in axes.get_lines():
        inset.plot(
            *line.get_data(), color=line.get_color(), linestyle=line.get_linestyle(), linewidth=line.get_linewidth()
        )
    inset.set(xlim=(-0.004, 0.2), ylim=(0.8, 1.004), xticks=(0, 0.1, 0.2), yticks=(0.8, 0.9, 1.0))
    inset.tick_params(labelsize=9.5)
    axes.indicate_inset_zoom(inset, edgecolor=GRAY, alpha=0.6)


def _label_stages(axes: Axes, spans: Sequence[tuple[str, int, int]]) -> None:
    """Name the stages above the panel, each on its own side of the boundary line."""
    for index, (stage, start, end) in enumerate(spans):
        first_of_several = index == 0 and len(spans) > 1
        axes.annotate(
            stage_label(stage),
            xy=(end + 0.5 if first_of_several else start - 0.5, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-6 if first_of_several else 6, 4),
            textcoords="offset points",
            ha="right" if first_of_several else "left",
            va="bottom",
            color=GRAY,
        )
