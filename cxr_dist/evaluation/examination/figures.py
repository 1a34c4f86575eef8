"""The figures of an examination, with their captions. Pure: numbers in, figures out.

Colours are Okabe and Ito's, and no meaning hangs on colour alone. A white ground of their own makes the figures
readable on light and dark pages alike.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from cxr_dist.evaluation.examination.shortcuts import WITHOUT_LUNGS
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import BLUE, GRAY, STYLE, VERMILLION


def occlusion_figure(occlusions: Mapping[str, Any]) -> Figure:
    """Accuracy as the images are and under each occlusion, with the line of chance."""
    chance, before = occlusions["chance"], occlusions["as_they_are"]["accuracy"]
    rows = [("Unchanged", before, False)]
    rows += [(item["title"], item["accuracy"], name in WITHOUT_LUNGS) for name, item in occlusions["variants"].items()]
    with mpl.rc_context(STYLE):
        drawing = Drawing(figsize=(7.0, 1.2 + 0.5 * len(rows)), layout="constrained")
        axes = drawing.add_subplot()
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
        axes.set(xlim=(0, 1.08), xlabel="Accuracy (hatched: no lungs visible)")
    best = max(WITHOUT_LUNGS, key=lambda name: occlusions["variants"][name]["accuracy"])
    item = occlusions["variants"][best]
    caption = (
        f"The accuracy on the unchanged images is {100 * before:.0f}%; without lungs it is at most "
        f"{100 * item['accuracy']:.0f}% ({item['title'].lower()}), whereas always predicting the largest class gives "
        f"{100 * chance:.0f}%."
    )
    return Figure("examination-occlusions.svg", "Accuracy with a part of the image removed", caption, drawing)


def robustness_figure(curves: Mapping[str, Any], chance: float) -> Figure:
    """Accuracy and macro F1 over the strengths of each perturbation."""
    with mpl.rc_context(STYLE):
        drawing = Drawing(figsize=(7.6, 4.8), layout="constrained")
        panels = drawing.subplots(2, -(-len(curves) // 2), sharey=True)
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
        drawing.legend(handles, labels, loc="outside upper center", ncols=3)
    worst = max(curves.values(), key=lambda curve: curve["points"][-1]["fall"])
    point = worst["points"][-1]
    caption = (
        f"At full strength, {worst['title'].lower()} ({point['strength']:g} {worst['unit']}) has the largest effect: "
        f"the accuracy falls from {100 * worst['points'][0]['accuracy']:.0f}% to {100 * point['accuracy']:.0f}%."
    )
    return Figure("examination-robustness.svg", "Accuracy under perturbations", caption, drawing)
