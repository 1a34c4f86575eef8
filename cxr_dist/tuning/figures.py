"""The figures of a search. Pure: outcomes in, a `matplotlib.figure.Figure` out; no pyplot, no display.

What was complete, stopped early or failed differs in the marker and not in colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from cxr_dist.runs.ranking import rank
from cxr_dist.tuning.search_space import Parameter, Value, Values
from tfrecords_builder.common.figure_style import BLUE, GRAY, RULE, STYLE, VERMILLION

_MARKERS = {"complete": ("o", BLUE, BLUE, "complete"), "stopped": ("o", "white", GRAY, "stopped early")}


@dataclass(frozen=True)
class Point:
    """A trial with a validation accuracy, as the figures show it."""

    number: int
    values: Values
    state: str
    objective: float
    val_loss: float = math.inf
    """Of the epoch with that accuracy."""

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts points from the worst to the best, as the tables do."""
        return (*rank({"val_accuracy": self.objective, "val_loss": self.val_loss}), -self.number)


def history_figure(points: Sequence[Point]) -> Figure:
    """Validation accuracy of each trial by number, and the best complete one so far as a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        _scatter(axes, [point.number for point in points], points)
        numbers, best = best_so_far(points)
        axes.step(numbers, best, where="post", color=VERMILLION, linestyle="--", label="best so far")
        axes.set_xlabel("Trial")
        axes.set_ylabel("Validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def best_so_far(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    """Of the complete trials, by number: the best validation accuracy up to each."""
    numbers: list[int] = []
    best: list[float] = []
    for point in sorted(points, key=lambda point: point.number):
        if point.state == "complete":
            numbers.append(point.number)
            best.append(max([point.objective, *best[-1:]]))
    return numbers, best


def parameter_figure(key: str, parameter: Parameter, points: Sequence[Point]) -> Figure:
    """Validation accuracy against one key."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        axes = figure.add_subplot()
        if parameter.choices is not None:
            places = [parameter.choices.index(point.values[key]) for point in points]
            _scatter(axes, places, points)
            axes.set_xticks(range(len(parameter.choices)), [str(choice) for choice in parameter.choices])
            axes.margins(x=0.15)
        else:
            _scatter(axes, [float(point.values[key]) for point in points], points)
            if parameter.log:
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            if parameter.low is not None and parameter.high is not None:
                axes.set_xlim(*_with_margin(float(parameter.low), float(parameter.high), log=parameter.log))
        axes.set_xlabel(key)
        axes.set_ylabel("Validation accuracy")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _with_margin(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """The whole range of a parameter and a little more, so that points at its ends are whole."""
    if log:
        margin = (high / low) ** 0.03
        return low / margin, high * margin
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _scatter(axes: Axes, places: Sequence[float], points: Sequence[Point]) -> None:
    for state, (marker, face, edge, label) in _MARKERS.items():
        chosen = [(place, point.objective) for place, point in zip(places, points, strict=True) if point.state == state]
        if chosen:
            across, up = zip(*chosen, strict=True)
            axes.scatter(across, up, marker=marker, c=face, edgecolors=edge, s=42, label=label, zorder=3)
    axes.grid(axis="y", color=RULE, linewidth=0.7)


def parallel_figure(parameters: dict[str, Parameter], points: Sequence[Point]) -> Figure:
    """Each trial as a line over the keys and its validation accuracy; the darker, the better, the best one bold."""
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
            _scale(axes, place, parameters[key])
        for height, value in ((0.0, low), (1.0, high)):
            axes.annotate(f"{value:.4f}", (len(keys), height), (6, 0), textcoords="offset points", va="center")
        axes.axvline(len(keys), color=RULE, zorder=0)
        axes.set_xticks(range(len(keys) + 1), [*[_two_lines(key) for key in keys], "validation\naccuracy"])
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.set_xlim(-0.35, len(keys) + 0.45)
    return figure


def position(parameter: Parameter, value: Value) -> float:
    """Where a value stands between the ends of its parameter: 0 to 1."""
    if parameter.choices is not None:
        return parameter.choices.index(value) / max(len(parameter.choices) - 1, 1)
    if parameter.low is None or parameter.high is None:
        raise ValueError("a range has both ends")
    low, high, at = float(parameter.low), float(parameter.high), float(value)
    if parameter.log:
        low, high, at = np.log(low), np.log(high), np.log(at)
    return float((at - low) / (high - low))


def _two_lines(key: str) -> str:
    section, dot, leaf = key.rpartition(".")
    return f"{section}{dot}\n{leaf}"


def _scale(axes: Axes, place: int, parameter: Parameter) -> None:
    axes.axvline(place, color=RULE, zorder=0)
    for value in parameter.extremes():
        height = position(parameter, value)
        text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        axes.annotate(text, (place, height), (-6, 0), textcoords="offset points", ha="right", va="center", color=GRAY)
