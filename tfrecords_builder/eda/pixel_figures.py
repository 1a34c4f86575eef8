"""Figures of an exploratory analysis: brightness, contrast, mean images and samples. Pure; see `figures`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import COLOURS, DASHES, STYLE, display_name, grid, wrapped
from tfrecords_builder.eda.figures import LABEL_WIDTH, SAMPLE_COLUMNS, count
from tfrecords_builder.eda.odd_images import CLEARLY_ODD
from tfrecords_builder.eda.shortcuts import Gray, reduced

SOURCES_DRAWN = 6
_COLUMNS = 4
_MEAN_SIDE = 256
_GAP = 4


def distributions(pixels: Mapping[str, Any]) -> Figure:
    """Brightness and contrast of the images of each class; `pixels` as in the numbers of `analysis.analyse`."""
    parts = []
    for key, low_words, high_words in (
        ("brightness", "are the darkest", "the brightest"),
        ("contrast", "have the least contrast", "the most"),
    ):
        means = {name: item[key]["mean"] for name, item in pixels["classes"].items()}
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        within = sum(item[key]["deviation"] for item in pixels["classes"].values()) / len(means)
        parts.append(
            f"images of {display_name(low)} {low_words} on average ({means[low]:.1f}), those of {display_name(high)} "
            f"{high_words} ({means[high]:.1f}); the standard deviation within a class is {within:.1f}"
        )
    caption = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)
    drawing = _draw_distributions(pixels, "class")
    return Figure("distributions.svg", "Brightness and contrast", caption, drawing)


def sources(sources: Mapping[str, Mapping[str, Any]], pixels: Mapping[str, Any]) -> Figure:
    """Likewise of the largest sources."""
    drawn = dict(list(sources.items())[:SOURCES_DRAWN])
    images = sum(item["images"] for item in drawn.values())
    everything = sum(item["images"] for item in sources.values())
    what = f"All {count(len(drawn), 'source')}" if len(drawn) == len(sources) else f"The {len(drawn)} largest sources"
    text = f"{what} with {images:,} of {count(everything)} of known source"
    if len(drawn) > 1:
        means = {name: item["brightness"]["mean"] for name, item in drawn.items()}
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        text += f"; the darkest on average is {low} ({means[low]:.1f}), the brightest {high} ({means[high]:.1f})"
    levels = {"histogram_step": pixels["histogram_step"], "classes": drawn}
    drawing = _draw_distributions(levels, "source")
    return Figure("sources.svg", "Brightness and contrast by source", f"{text}.", drawing)


def _draw_distributions(pixels: Mapping[str, Any], kind: str) -> Drawing:
    step = pixels["histogram_step"]
    longest = max(map(len, pixels["classes"]))
    columns = 4 if longest <= LABEL_WIDTH else 2
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.6, 4.0 if columns == 4 else 4.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, title in zip(
            panels,
            ("brightness", "contrast"),
            ("Brightness (mean of the pixels)", "Contrast (standard deviation of the pixels)"),
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
                    label=wrapped(name, 90 // columns) if axes is panels[0] else None,
                )
                used += [*edges[:-1][bins > 0], *edges[1:][bins > 0]]
            axes.set_xlim(min(used, default=0) - step, max(used, default=step) + step)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlabel(title)
            grid(axes, "y")
        panels[0].set_ylabel(f"Images of the {kind}, in bins of {step} levels")
        figure.legend(loc="outside upper center", ncols=min(len(pixels["classes"]), columns))
    return figure


def means(
    class_names: Sequence[str],
    pixels: Mapping[str, Any],
    means: npt.NDArray[np.float32],
    deviations: npt.NDArray[np.float32],
) -> Figure:
    """Mean image of each class above its per-pixel deviation, each kind on one scale: [C, S, S] both."""
    differences = pixels["mean_image_differences"]
    most = max(differences, key=lambda item: item["difference"])
    least = min(differences, key=lambda item: item["difference"])

    def words(item: Mapping[str, Any]) -> str:
        return f"{' and '.join(map(display_name, item['classes']))} ({item['difference']:.1f} gray levels per pixel)"

    text = f"The mean images of {words(most)} differ most"
    if len(differences) > 1:
        text += f" and those of {words(least)} least"
    spread = {name: item["pixel_deviation"] for name, item in pixels["classes"].items()}
    varied = max(spread, key=spread.__getitem__)
    text += f"; pixels vary most between images of {display_name(varied)} (by {spread[varied]:.1f} gray levels)."
    return Figure("means.svg", "Mean images and standard deviations", text, _draw_means(class_names, means, deviations))


def _draw_means(
    class_names: Sequence[str], means: npt.NDArray[np.float32], deviations: npt.NDArray[np.float32]
) -> Drawing:
    columns = min(len(class_names), _COLUMNS)
    blocks = -(-len(class_names) // columns)
    greatest = max(float(deviations.max()), 1.0)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(1.9 * columns + 1.2, 4.2 * blocks), layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for kind, (images, colours, top, what) in enumerate(
            (
                (means, "gray", 255.0, "mean (gray level)"),
                (deviations, "viridis", greatest, "standard deviation (gray levels)"),
            )
        ):
            for label, name in enumerate(class_names):
                axes = grid[2 * (label // columns) + kind, label % columns]
                axes.imshow(reduced(images[label], _MEAN_SIDE), cmap=colours, vmin=0, vmax=top, interpolation="none")
                if kind == 0:
                    axes.set_title(wrapped(name, 18), size=11)
            scale = ScalarMappable(Normalize(0, top), colours)
            figure.colorbar(scale, ax=list(grid[kind::2].flat), label=what, shrink=0.9, aspect=16)
    return figure


def samples(label: int, class_name: str, pictures: Sequence[Gray], images: int) -> Figure:
    """Some of a class's `images` training images, of one size, as a grid; a row that is not full ends in white."""
    name = display_name(class_name)
    if len(pictures) == images:
        caption = f"All {images:,} training images of {name}."
    else:
        caption = (
            f"{len(pictures)} of {images:,} training images of {name}, selected by a hash of their paths, "
            "so the selection is arbitrary and reproducible."
        )
    return Figure(f"samples-{label}.svg", f"Samples of {name}", caption, _draw_samples(pictures))


def _draw_samples(pictures: Sequence[Gray]) -> Drawing:
    columns = SAMPLE_COLUMNS
    rows = -(-len(pictures) // columns)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(1.25 * columns, 1.25 * rows))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(_montage(pictures, columns), cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_axis_off()
    return figure


def odd(label: int, class_name: str, suspects: Sequence[Mapping[str, Any]], pictures: Sequence[Gray]) -> Figure:
    """The oddest images of a class, the oddest first, each under its rank and its reason."""
    name = display_name(class_name)
    clear = sum(item["score"] >= CLEARLY_ODD for item in suspects)
    text = (
        f"The {count(len(suspects))} of {name} that differ most from the collection, with the largest robust z-score "
        f"and its reason; {clear:,} {'is' if clear == 1 else 'are'} clearly odd (z-score of {CLEARLY_ODD:.0f} or more)."
    )
    return Figure(f"odd-{label}.svg", f"Odd images of {name}", text, _draw_odd(suspects, pictures))


def _draw_odd(suspects: Sequence[Mapping[str, Any]], pictures: Sequence[Gray]) -> Drawing:
    columns = SAMPLE_COLUMNS
    rows = max(1, -(-len(pictures) // columns))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(1.3 * columns, 1.9 * rows))
        # One panel for all: a layout of a dozen takes seconds.
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for number, (item, picture) in enumerate(zip(suspects, pictures, strict=True)):
            left, top = 1.3 * (number % columns) + 0.05, 1.9 * (number // columns) + 0.65
            axes.imshow(
                picture, cmap="gray", vmin=0, vmax=255, interpolation="none", aspect="auto",
                extent=(left, left + 1.2, top + 1.2, top),
            )  # fmt: skip
            words = f"{item['rank']}. z = {item['score']:.1f}\n{wrapped(item['reason'], 20)}"
            axes.text(left, top - 0.04, words, size=7, va="bottom")
        axes.set(xlim=(0, 1.3 * columns), ylim=(1.9 * rows, 0))
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


def _line_style(number: int) -> tuple[str, str]:
    """Colours first and dashes with them, so that no two neighbours differ in colour alone."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]
