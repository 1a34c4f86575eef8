"""Figures of an exploratory analysis: counts, sizes, duplicates and trivial features. Pure.

Each is drawn and captioned by one function. Colours are Okabe and Ito's, which colour-blind readers tell apart, and no
meaning hangs on colour alone: lines differ in dashes, parts of bars in hatching, and what is marked is named.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import BLUE, GRAY, STYLE, VERMILLION, display_name, grid, wrapped
from tfrecords_builder.eda.analysis import FEATURES, IMAGES_SHOWN_PER_GROUP
from tfrecords_builder.eda.shortcuts import Gray

_SPLIT_STYLES = {"train": ("#0072B2", ""), "validation": ("#E69F00", "///"), "test": ("#bdbdbd", "\\\\\\")}
_BOX = ("q05", "q25", "median", "q75", "q95")
SAMPLE_COLUMNS = 6
LABEL_WIDTH = 22
"""Letters in a line of a label."""


def counts(counts: Mapping[str, Any]) -> Figure:
    """Images of each class, its bar divided into the splits; `counts` as `counts.count_numbers` gives them."""
    classes = counts["classes"]
    largest, smallest = counts["largest"], counts["smallest"]
    if classes[largest] == classes[smallest]:
        text = f"Every class has {classes[largest]:,} images"
    else:
        text = (
            f"{display_name(largest)} has the most images ({classes[largest]:,}), {counts['imbalance']:.2f} times as "
            f"many as {display_name(smallest)}, which has the fewest ({classes[smallest]:,})"
        )
    far = max(
        ((abs(item["deviation"]), name, split) for split, of in counts["splits"].items() for name, item in of.items()),
        key=lambda item: item[0],
    )
    text += (
        f"; the largest deviation of a class from the split 70/15/15 is {100 * far[0]:.1f} percentage points "
        f"({display_name(far[1])}, {far[2]})."
    )
    return Figure("counts.svg", "Images by class", text, _draw_counts(counts))


def _draw_counts(counts: Mapping[str, Any]) -> Drawing:
    names = list(counts["classes"])
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.0, 1.3 + 0.55 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(names))
        for split, (colour, hatch) in _SPLIT_STYLES.items():
            widths = np.array([counts["splits"][split][name]["images"] for name in names])
            axes.barh(range(len(names)), widths, 0.62, left, color=colour, hatch=hatch, edgecolor="white", label=split)
            left += widths
        for row, total in enumerate(left):
            axes.annotate(f"{int(total):,}", (total, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), [wrapped(name, LABEL_WIDTH) for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("Images")
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def sizes(sizes: Mapping[str, Any]) -> Figure:
    """Width and height of the source images of each class: boxes from 25 to 75 %, lines from 5 to 95 %."""
    return Figure("sizes.svg", "Size of the source images", _sizes_caption(sizes), _draw_sizes(sizes["classes"]))


def _sizes_caption(sizes: Mapping[str, Any]) -> str:
    if not sizes["commonest"]:
        return "The sizes of the source images are unknown."
    first = sizes["commonest"][0]
    if sizes["distinct"] == 1:
        return (
            f"Every source image has {first['width']:,} x {first['height']:,} pixels: size does not reveal the class."
        )
    medians = {name: item["width"]["median"] for name, item in sizes["classes"].items() if item["width"]}
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    share = sum(first["images"].values())
    text = (
        f"The source images have {sizes['distinct']:,} different sizes, most often {first['width']:,} x "
        f"{first['height']:,} pixels ({count(share)})"
    )
    if medians[low] == medians[high]:
        return f"{text}; the median width is {medians[low]:,} pixels in every class."
    return (
        f"{text}; the median width ranges from {medians[low]:,} pixels ({display_name(low)}) to {medians[high]:,} "
        f"({display_name(high)})."
    )


def _draw_sizes(classes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Drawing:
    names = list(classes)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.6, 1.2 + 0.55 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, side in zip(panels, ("width", "height"), strict=True):
            rows = [row for row, name in enumerate(names) if classes[name][side]]
            of = {key: np.array([classes[names[row]][side][key] for row in rows]) for key in _BOX}
            axes.hlines(rows, of["q05"], of["q95"], color=BLUE, linewidth=1.4)
            axes.barh(rows, of["q75"] - of["q25"], 0.5, of["q25"], color="#cfe3f1", edgecolor=BLUE)
            axes.plot(of["median"], rows, "|", color=VERMILLION, markersize=20, markeredgewidth=2.6)
            axes.set_yticks(range(len(names)), [wrapped(name, LABEL_WIDTH) for name in names])
            axes.set_xlabel(f"{side.capitalize()} (pixels)")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            grid(axes, "x")
        panels[0].invert_yaxis()
    return figure


def group_sizes(duplicates: Mapping[str, Any]) -> Figure:
    """How many groups have how many images."""
    straddling = duplicates["straddling_splits"]
    text = (
        f"{count(duplicates['pairs'], 'pair')} of near-duplicates join {count(duplicates['images'])} into "
        f"{count(duplicates['groups'], 'group')}, the largest of {max(map(int, duplicates['sizes']))}; "
    )
    if straddling:
        text += f"{count(straddling, 'group')} {'lies' if straddling == 1 else 'lie'} in more than one split"
    else:
        text += "no group lies in more than one split"
    across = duplicates["straddling_classes"]
    text += f", and {across:,} in more than one class." if across else " or class."
    drawing = _draw_group_sizes(duplicates["sizes"])
    return Figure("group_sizes.svg", "Sizes of the groups of near-duplicates", text, drawing)


def _draw_group_sizes(sizes: Mapping[str, int]) -> Drawing:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(sizes)), list(sizes.values()), 0.6, color=BLUE)
        axes.bar_label(bars, [f"{count:,}" for count in sizes.values()], padding=2)
        axes.set_xticks(range(len(sizes)), list(sizes))
        axes.margins(y=0.14)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("Images in the group")
        axes.set_ylabel("Groups")
    return figure


def groups(duplicates: Mapping[str, Any], pictures: list[list[Gray | None]]) -> Figure:
    """A row of pictures for each group, numbered from 1; None is an image of which there is no picture."""
    shown, everything = len(duplicates["largest"]), duplicates["groups"]
    text = f"All {count(shown, 'group')}" if shown == everything else f"The {shown} largest of {everything:,} groups"
    text += f", {count(sum(map(len, pictures)))} in all"
    cut = sum(map(len, duplicates["largest"])) - sum(map(len, pictures))
    if cut:
        text += f" (of large groups the first {IMAGES_SHOWN_PER_GROUP}; {cut:,} more are in the table)"
    without = sum(picture is None for row in pictures for picture in row)
    if without:
        text += f"; {without:,} of them {'was' if without == 1 else 'were'} excluded from the dataset and not shown"
    return Figure("groups.svg", "The largest groups of near-duplicates", f"{text}.", _draw_groups(pictures))


def _draw_groups(groups: Sequence[Sequence[Gray | None]]) -> Drawing:
    columns = max(SAMPLE_COLUMNS, *map(len, groups))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(1.25 * columns + 0.9, 1.3 * len(groups)), layout="constrained")
        grid = figure.subplots(len(groups), columns, squeeze=False)
        for number, (row, pictures) in enumerate(zip(grid, groups, strict=True), start=1):
            for axes in row:
                axes.set_axis_off()
            for axes, picture in zip(row, pictures, strict=False):
                if picture is not None:
                    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
                else:
                    axes.text(0.5, 0.5, "excluded", ha="center", va="center", color=GRAY, transform=axes.transAxes)
            row[0].annotate(
                f"group {number}", (0, 0.5), (-6, 0), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="center",
            )  # fmt: skip
    return figure


def shortcuts(shortcuts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy of each trivial feature, the guess, and the line above which there is a warning."""
    best = max(shortcuts, key=lambda name: shortcuts[name]["accuracy"])
    item = shortcuts[best]
    suspicious = sum(entry["suspicious"] for entry in shortcuts.values())
    text = (
        f"Always predicting the largest class has an accuracy of {percent(item['guess'])} on "
        f"{count(item['validation_images'], 'validation image')}; "
    )
    if item["accuracy"] > item["guess"]:
        text += f"the highest accuracy of a single feature is {percent(item['accuracy'])} ({FEATURES[best]})"
    else:
        text += "no single feature has a higher accuracy"
    text += f". {suspicious} of {len(shortcuts)} features predict the class better than chance."
    return Figure("shortcuts.svg", "Class prediction from trivial features", text, _draw_shortcuts(shortcuts))


def _draw_shortcuts(shortcuts: Mapping[str, Mapping[str, Any]]) -> Drawing:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.4, 1.6 + 0.5 * len(shortcuts)), layout="constrained")
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
        axes.axvline(first["guess"], color="black", linewidth=1.6, label="chance (always the largest class)")
        line = min(first["guess"] + first["margin"], 1.0)
        axes.axvline(line, color="black", linewidth=1.4, linestyle="--", label="threshold of a warning")
        axes.set_yticks(range(len(shortcuts)), [wrapped(FEATURES[name], 26) for name in shortcuts])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("Accuracy on the validation images")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def count(number: int, noun: str = "image") -> str:
    """A number with its noun in singular or plural."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
