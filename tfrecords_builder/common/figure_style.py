"""The style of every figure, and SVG that is the same each time."""

import io
import textwrap
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAY, RULE = "#6b6b6b", "#d0d4d9"
DASHES = ("-", "--", "-.", ":")
_PNG_DPI = 150

STYLE = {
    "font.family": "sans-serif",
    "font.size": 11.0,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.6,
    "text.usetex": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # no font has to be there, or be fetched
    "svg.hashsalt": "cxr-dist",  # the same figure gives the same bytes
}


def display_name(class_name: str) -> str:
    """A class name as people read it: underscores as spaces."""
    return class_name.replace("_", " ").strip() or class_name


def wrapped(text: str, width: int) -> str:
    """A name in lines of `width` letters, its dollars literal (matplotlib would read them as formulas)."""
    return "\n".join(textwrap.wrap(display_name(text), width) or [text]).replace("$", r"\$")


def grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Lines behind what is drawn."""
    axes.grid(axis=axis, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def image_bytes(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """`figure`, grown to hold what reaches over its edge, in SVG text as outlines; the same figure, the same bytes."""
    buffer = io.BytesIO()
    metadata = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}[kind]
    with mpl.rc_context(STYLE | ({"savefig.dpi": _PNG_DPI} if kind == "png" else {})):
        figure.savefig(buffer, format=kind, bbox_inches="tight", pad_inches=0.1, metadata=dict.fromkeys(metadata))
    return buffer.getvalue()
