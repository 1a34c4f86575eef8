"""A figure of a page with its words: the one type for evaluation, examination, analysis and search."""

import base64
import io
from dataclasses import dataclass
from functools import cached_property

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from tfrecords_builder.common.figure_style import STYLE, svg_bytes

_PNG_DPI = 150


@dataclass(frozen=True, eq=False)
class Figure:
    """What is drawn, and what is said of it."""

    file: str
    """The name under which it is saved, as SVG or PNG by its suffix."""
    title: str
    caption: str
    """A sentence that says what it shows, computed from the numbers."""
    drawing: Drawing | bytes
    """Drawn by matplotlib, or a PNG."""
    kind: str = ""
    """What one would see, if the title does not say it: a sentence."""

    @property
    def alt(self) -> str:
        """In place of the figure, for those who do not see it."""
        return f"{self.kind} {self.title}. {self.caption}".lstrip()

    @cached_property
    def content(self) -> bytes:
        """The file's bytes."""
        return png_bytes(self.drawing) if self.file.endswith(".png") else self._as_shown

    @cached_property
    def source(self) -> str:
        """As the address of an image inside a page: vectors, unless it is a PNG from the start."""
        kind = "png" if isinstance(self.drawing, bytes) else "svg+xml"
        return f"data:image/{kind};base64,{base64.b64encode(self._as_shown).decode()}"

    @cached_property
    def _as_shown(self) -> bytes:
        return self.drawing if isinstance(self.drawing, bytes) else svg_bytes(self.drawing)


def png_bytes(drawing: Drawing | bytes) -> bytes:
    """A drawing as PNG, grown to hold what reaches over its edge; the same drawing gives the same bytes."""
    if isinstance(drawing, bytes):
        return drawing
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        drawing.savefig(
            buffer, format="png", dpi=_PNG_DPI, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None}
        )
    return buffer.getvalue()
