"""The figures of a search. Pure: outcomes in, a `matplotlib.figure.Figure` out; no pyplot, no display.

What was complete, stopped early or failed differs in the marker and not in colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from cxr_dist.runs.ranking import SELECTION, rank
from cxr_dist.tuning.search_space import Parameter, Value, Values
from tfrecords_builder.common.figure_style import BLUE, GRAY, RULE, STYLE, VERMILLION

_MARKERS = {"complete": ("o", BLUE, BLUE, "complete"), "stopped": ("o", "white", GRAY, "stopped early")}


@dataclass(frozen=True)
class Point:
    """A trial that was validated, as the figures show it."""

    number: int
    values: Values
    state: str
    objective: float
    val_loss: float = math.inf
    """Of the epoch with that objective."""

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts points from the worst to the best, as the tables do."""
        return (*rank({SELECTION: self.objective, "val_loss": self.val_loss}), -self.number)


def history_figure(points: Sequence[Point], objective: str) -> Figure:
    """Objective of each trial by number, and the best complete one so far as a line."""
    with mpl.rc_context(STYLE):
        figure, axes = _scatter([point.number for point in points], points, ("Trial", objective), height=3.6)
        numbers, best = best_so_far(points)
        axes.step(numbers, best, where="post", color=VERMILLION, linestyle="--", label="best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def best_so_far(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    """Of the complete trials, by number: the best objective up to each."""
    complete = sorted((point.number, point.objective) for point in points if point.state == "complete")
    return [number for number, _ in complete], list(accumulate((objective for _, objective in complete), max))


def parameter_figure(key: str, parameter: Parameter, points: Sequence[Point], objective: str) -> Figure:
    """The objective against one key."""
    choices = parameter.choices
    places = [choices.index(point.values[key]) if choices else float(point.values[key]) for point in points]
    with mpl.rc_context(STYLE):
        figure, axes = _scatter(places, points, (key, objective), height=3.4)
        if choices is not None:
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.margins(x=0.15)
        else:
            # The whole range and a little more, so that points at its ends are whole.
            low, high = (float(value) for value in parameter.extremes())
            margin = (high / low) ** 0.03 if parameter.log else 0.03 * (high - low)
            axes.set_xlim(*((low / margin, high * margin) if parameter.log else (low - margin, high + margin)))
            if parameter.log:
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _scatter(
    places: Sequence[float], points: Sequence[Point], labels: tuple[str, str], height: float
) -> tuple[Figure, Axes]:
    """Points at `places` by their objective, in inches 7 wide; `labels` of the axes, across and up."""
    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.add_subplot(xlabel=labels[0], ylabel=capitalised(labels[1]))
    for state, (marker, face, edge, name) in _MARKERS.items():
        chosen = [(place, point.objective) for place, point in zip(places, points, strict=True) if point.state == state]
        if chosen:
            across, up = zip(*chosen, strict=True)
            axes.scatter(across, up, marker=marker, c=face, edgecolors=edge, s=42, label=name, zorder=3)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    return figure, axes


def parallel_figure(parameters: dict[str, Parameter], points: Sequence[Point], objective: str) -> Figure:
    """Each trial as a line over the keys and its objective; the darker, the better, the best one bold."""
    keys = list(parameters)
    objectives = np.array([point.objective for point in points])
    low, high = float(objectives.min()), float(objectives.max())
    shade = (objectives - low) / (high - low) if high > low else np.ones(len(points))
    best = max(range(len(points)), key=lambda index: points[index].rank)
    with mpl.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(max(5.0, 2.2 * (len(keys) + 1)), 4.2), layout="constrained")
        axes = figure.add_subplot()
        colours = mpl.colormaps["cividis_r"]
        for index in np.argsort(objectives, kind="stable"):
            heights = [position(parameters[key], points[index].values[key]) for key in keys] + [float(shade[index])]
            is_best = index == best
            axes.plot(
                range(len(keys) + 1),
                heights,
                color=colours(0.15 + 0.85 * float(shade[index])),
                linewidth=3.0 if is_best else 1.3,
                linestyle="-" if points[index].state == "complete" else ":",
            )
        for place, key in enumerate(keys):
            axes.axvline(place, color=RULE, zorder=0)
            for value in parameters[key].extremes():
                text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
                where = (place, position(parameters[key], value))
                axes.annotate(text, where, (-6, 0), textcoords="offset points", ha="right", va="center", color=GRAY)
        for height, value in ((0.0, low), (1.0, high)):
            axes.annotate(f"{value:.4f}", (len(keys), height), (6, 0), textcoords="offset points", va="center")
        axes.axvline(len(keys), color=RULE, zorder=0)
        axes.set_xticks(
            range(len(keys) + 1), [*[".\n".join(key.rsplit(".", 1)) for key in keys], objective.replace(" ", "\n", 1)]
        )
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.set_xlim(-0.35, len(keys) + 0.45)
    return figure


def capitalised(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]


def position(parameter: Parameter, value: Value) -> float:
    """Where a value stands between the ends of its parameter: 0 to 1."""
    if parameter.choices is not None:
        return parameter.choices.index(value) / max(len(parameter.choices) - 1, 1)
    low, high, at = (float(number) for number in (*parameter.extremes(), value))
    if parameter.log:
        low, high, at = np.log(low), np.log(high), np.log(at)
    return float((at - low) / (high - low))
