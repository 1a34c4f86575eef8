"""The figures of an exploratory analysis. Pure: numbers in, a `matplotlib.figure.Figure` out; no pyplot, no display.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and no meaning hangs on colour alone: lines differ
in dashes, parts of bars in hatching, and what is marked is named.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tfrecords_builder.common.figure_style import BLUE, COLOURS, DASHES, STYLE, VERMILLION, display_name
from tfrecords_builder.eda.shortcuts import Gray, reduced

_SPLIT_STYLES = {"train": ("#0072B2", ""), "validation": ("#E69F00", "///"), "test": ("#bdbdbd", "\\\\\\")}
_GRAY, _RULE = "#6b6b6b", "#e3e3e3"
_BOX = ("q05", "q25", "median", "q75", "q95")
_COLUMNS = 4
_SAMPLE_COLUMNS = 6
_MEAN_SIDE = 256
_GAP = 4
LABEL_WIDTH = 22
"""Letters in a line of a label."""


def counts_figure(counts: Mapping[str, Any]) -> Figure:
    """Images of each class, its bar divided into the splits; `counts` as `counts.count_numbers` gives them."""
    names = list(counts["classes"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 1.3 + 0.55 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(names))
        for split, (colour, hatch) in _SPLIT_STYLES.items():
            widths = np.array([counts["splits"][split][name]["images"] for name in names])
            axes.barh(range(len(names)), widths, 0.62, left, color=colour, hatch=hatch, edgecolor="white", label=split)
            left += widths
        for row, total in enumerate(left):
            axes.annotate(f"{int(total):,}", (total, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("Images")
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def sizes_figure(classes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Figure:
    """Width and height of the source images of each class: boxes from 25 to 75 %, lines from 5 to 95 %."""
    names = list(classes)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.2 + 0.55 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, side in zip(panels, ("width", "height"), strict=True):
            rows = [row for row, name in enumerate(names) if classes[name][side]]
            of = {key: np.array([classes[names[row]][side][key] for row in rows]) for key in _BOX}
            axes.hlines(rows, of["q05"], of["q95"], color=BLUE, linewidth=1.4)
            axes.barh(rows, of["q75"] - of["q25"], 0.5, of["q25"], color="#cfe3f1", edgecolor=BLUE)
            axes.plot(of["median"], rows, "|", color=VERMILLION, markersize=20, markeredgewidth=2.6)
            axes.set_yticks(range(len(names)), [_label(name) for name in names])
            axes.set_xlabel(f"{side.capitalize()} (pixels)")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            _grid(axes, "x")
        panels[0].invert_yaxis()
    return figure


def distributions_figure(pixels: Mapping[str, Any], kind: str = "class") -> Figure:
    """Brightness and contrast of the images of each class; `pixels` as in the numbers of `analysis.analyse`."""
    step = pixels["histogram_step"]
    longest = max(map(len, pixels["classes"]))
    columns = 4 if longest <= LABEL_WIDTH else 2
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.0 if columns == 4 else 4.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, title in zip(
            panels,
            ("brightness", "contrast"),
            ("Brightness: mean of an image's pixels", "Contrast: their standard deviation"),
            strict=True,
        ):
            used = []
            for number, (name, numbers) in enumerate(pixels["classes"].items()):
                bins = np.array(numbers[key]["histogram"])
                edges = np.arange(len(bins) + 1) * step
                colour, dashes = _line_style(number)
                axes.stairs(
                    bins / max(bins.sum(), 1),
                    edges,
                    color=colour,
                    linestyle=dashes,
                    linewidth=1.8,
                    label=_label(name, 90 // columns) if axes is panels[0] else None,
                )
                used += [*edges[:-1][bins > 0], *edges[1:][bins > 0]]
            axes.set_xlim(min(used, default=0) - step, max(used, default=step) + step)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlabel(title)
            _grid(axes, "y")
        panels[0].set_ylabel(f"Images of the {kind}, in bins of {step} levels")
        figure.legend(loc="outside upper center", ncols=min(len(pixels["classes"]), columns))
    return figure


def means_figure(
    class_names: Sequence[str], means: npt.NDArray[np.float32], deviations: npt.NDArray[np.float32]
) -> Figure:
    """Mean image of each class above its per-pixel deviation, each kind on one scale: [C, S, S] both."""
    columns = min(len(class_names), _COLUMNS)
    blocks = -(-len(class_names) // columns)
    greatest = max(float(deviations.max()), 1.0)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * columns + 1.2, 4.2 * blocks), layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for kind, (images, colours, top, what) in enumerate(
            ((means, "gray", 255.0, "mean (gray level)"), (deviations, "viridis", greatest, "deviation (gray levels)"))
        ):
            for label, name in enumerate(class_names):
                axes = grid[2 * (label // columns) + kind, label % columns]
                axes.imshow(reduced(images[label], _MEAN_SIDE), cmap=colours, vmin=0, vmax=top, interpolation="none")
                if kind == 0:
                    axes.set_title(_label(name, 18), size=11)
            scale = ScalarMappable(Normalize(0, top), colours)
            figure.colorbar(scale, ax=list(grid[kind::2].flat), label=what, shrink=0.9, aspect=16)
    return figure


def samples_figure(pictures: Sequence[Gray]) -> Figure:
    """Pictures of one size as a grid, row by row; a row that is not full ends in white."""
    columns = _SAMPLE_COLUMNS
    rows = -(-len(pictures) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.25 * columns, 1.25 * rows))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(_montage(pictures, columns), cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_axis_off()
    return figure


def group_sizes_figure(sizes: Mapping[str, int]) -> Figure:
    """How many groups have how many images."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(sizes)), list(sizes.values()), 0.6, color=BLUE)
        axes.bar_label(bars, [f"{count:,}" for count in sizes.values()], padding=2)
        axes.set_xticks(range(len(sizes)), list(sizes))
        axes.margins(y=0.14)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("Images in the group")
        axes.set_ylabel("Groups")
    return figure


def groups_figure(groups: Sequence[Sequence[Gray | None]]) -> Figure:
    """A row of pictures for each group, numbered from 1; None is an image of which there is no picture."""
    columns = max(_SAMPLE_COLUMNS, *map(len, groups))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.25 * columns + 0.9, 1.3 * len(groups)), layout="constrained")
        grid = figure.subplots(len(groups), columns, squeeze=False)
        for number, (row, pictures) in enumerate(zip(grid, groups, strict=True), start=1):
            for axes in row:
                axes.set_axis_off()
            for axes, picture in zip(row, pictures, strict=False):
                if picture is not None:
                    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
                else:
                    axes.text(0.5, 0.5, "left out", ha="center", va="center", color=_GRAY, transform=axes.transAxes)
            row[0].annotate(
                f"group {number}", (0, 0.5), (-6, 0), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="center",
            )  # fmt: skip
    return figure


def shortcuts_figure(shortcuts: Mapping[str, Mapping[str, Any]], words: Mapping[str, str]) -> Figure:
    """Accuracy of each trivial feature, the guess, and the line above which there is a warning."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 1.6 + 0.5 * len(shortcuts)), layout="constrained")
        axes = figure.add_subplot()
        for row, item in enumerate(shortcuts.values()):
            axes.barh(
                row, item["accuracy"], 0.6,
                color=VERMILLION if item["suspicious"] else BLUE, hatch="///" if item["suspicious"] else "",
                edgecolor="white",
            )  # fmt: skip
            # Beside the panel: on the bars, the lines would cross the words.
            axes.annotate(
                f"{100 * item['accuracy']:.1f}%" + (" (warning)" if item["suspicious"] else ""),
                (1.0, row), (6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center",
            )  # fmt: skip
        first = next(iter(shortcuts.values()))
        axes.axvline(first["guess"], color="black", linewidth=1.6, label="always the largest class")
        line = min(first["guess"] + first["margin"], 1.0)
        axes.axvline(line, color="black", linewidth=1.4, linestyle="--", label="more than chance from here on")
        axes.set_yticks(range(len(shortcuts)), [_label(words[name], 26) for name in shortcuts])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("Accuracy on the validation images")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _montage(pictures: Sequence[Gray], columns: int) -> Gray:
    """Pictures beside and below each other, with white gaps; white where the last row is not full."""
    side = len(pictures[0])
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (side + _GAP) - _GAP, columns * (side + _GAP) - _GAP), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (side + _GAP) * (number // columns), (side + _GAP) * (number % columns)
        sheet[top : top + side, left : left + side] = picture
    return sheet


def _label(text: str, width: int = LABEL_WIDTH) -> str:
    """A name broken into lines, its dollars literal (matplotlib would read them as formulas)."""
    return "\n".join(textwrap.wrap(display_name(text), width) or [text]).replace("$", r"\$")


def _line_style(number: int) -> tuple[str, str]:
    """Colours first and dashes with them, so that no two neighbours differ in colour alone."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    axes.grid(axis=axis, color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
