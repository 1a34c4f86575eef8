"""A figure of a page with its words: the one type for evaluation, examination, analysis and search."""

import base64
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure as Drawing

from tfrecords_builder.common.figure_style import image_bytes


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
        if self.file.endswith(".png") and not isinstance(self.drawing, bytes):
            return image_bytes(self.drawing, "png")
        return self._as_shown

    @cached_property
    def source(self) -> str:
        """As the address of an image inside a page: vectors, unless it is a PNG from the start."""
        kind = "png" if isinstance(self.drawing, bytes) else "svg+xml"
        return f"data:image/{kind};base64,{base64.b64encode(self._as_shown).decode()}"

    @cached_property
    def _as_shown(self) -> bytes:
        return self.drawing if isinstance(self.drawing, bytes) else image_bytes(self.drawing, "svg")
