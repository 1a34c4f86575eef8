"""The figures of an examination, with their captions. Pure: numbers in, panels with SVG out.

Colours are Okabe and Ito's, and no meaning hangs on colour alone. A white ground of their own makes the figures
readable on light and dark pages alike.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cxr_dist.evaluation.examination.findings import Panel
from cxr_dist.evaluation.examination.shortcuts import WITHOUT_LUNGS
from tfrecords_builder.common.figure_style import BLUE, GRAY, STYLE, VERMILLION, svg_bytes


def occlusion_panel(occlusions: Mapping[str, Any]) -> Panel:
    """Accuracy as the images are and under each occlusion, with the line of chance."""
    chance, before = occlusions["chance"], occlusions["as_they_are"]["accuracy"]
    rows = [("As they are", before, False)]
    rows += [(item["title"], item["accuracy"], name in WITHOUT_LUNGS) for name, item in occlusions["variants"].items()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 1.2 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, accuracy, lungless) in enumerate(rows):
            axes.barh(
                place,
                accuracy,
                0.62,
                color=VERMILLION if lungless else BLUE,
                hatch="///" if lungless else "",
                edgecolor="white",
            )
            axes.annotate(f"{100 * accuracy:.0f}%", (accuracy, place), (4, 0), textcoords="offset points", va="center")
        axes.axvline(chance, color=GRAY, linestyle="--")
        axes.annotate("chance", (chance, -0.55), (4, 0), textcoords="offset points", color=GRAY, va="bottom")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.08), xlabel="Accuracy (hatched: no lung is to be seen)")
    best = max(WITHOUT_LUNGS, key=lambda name: occlusions["variants"][name]["accuracy"])
    item = occlusions["variants"][best]
    caption = (
        f"{100 * before:.0f}% of the images as they are are recognised; of those without lungs at most "
        f"{100 * item['accuracy']:.0f}% ({item['title'].lower()}), where naming one class throughout gives "
        f"{100 * chance:.0f}%."
    )
    return _panel("examination-occlusions.svg", "lungs", "Accuracy without a part of the image", caption, figure)


def robustness_panel(curves: Mapping[str, Any], chance: float) -> Panel:
    """Accuracy and macro F1 over the strengths of each perturbation."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        panels = figure.subplots(2, -(-len(curves) // 2), sharey=True)
        for axes, curve in zip(panels.flat, curves.values(), strict=False):
            points = curve["points"]
            places = range(len(points))
            axes.plot(places, [point["accuracy"] for point in points], "o-", color=BLUE, label="accuracy")
            axes.plot(places, [point["macro_f1"] for point in points], "s--", color=VERMILLION, label="macro F1")
            axes.axhline(chance, color=GRAY, linestyle=":", label="chance")
            axes.set_xticks(
                places, ["none" if point["strength"] is None else f"{point['strength']:g}" for point in points]
            )
            axes.set(title=curve["title"], xlabel=curve["unit"], ylim=(0, 1.03))
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
    worst = max(curves.values(), key=lambda curve: curve["points"][-1]["fall"])
    point = worst["points"][-1]
    caption = (
        f"At its strongest, {worst['title'].lower()} ({point['strength']:g} {worst['unit']}) costs most: the accuracy "
        f"goes from {100 * worst['points'][0]['accuracy']:.0f}% to {100 * point['accuracy']:.0f}%."
    )
    return _panel("examination-robustness.svg", "robustness", "Accuracy under changes of the image", caption, figure)


def _panel(file: str, section: Any, title: str, caption: str, figure: Figure) -> Panel:
    return Panel(file, section, title, caption, f"{title}. {caption}", svg=svg_bytes(figure).decode())
