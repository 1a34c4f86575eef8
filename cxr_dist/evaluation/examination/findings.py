"""What an examination found, as others read it. Pure."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Section = Literal["attention", "lungs", "robustness"]

KIND = "examination of a classifier"
"""What `examination.json` says that it is."""
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that whoever reads the test figures has to know."""

    name: str
    """Of the check that found it."""
    severity: Literal["alarm", "note"]
    sentence: str
    figures: Mapping[str, float | int | str | None]
    """The numbers that the sentence is about."""

    def tree(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "severity": self.severity,
            "sentence": self.sentence,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with its words: `svg` or `png` is there, not both."""

    file: str
    """The name under which it is saved."""
    section: Section
    title: str
    caption: str
    """A sentence that says what it shows, computed from the numbers."""
    alt: str
    """In place of the figure, for those who do not see it."""
    svg: str | None = None
    png: bytes | None = None

    def __post_init__(self) -> None:
        if (self.svg is None) == (self.png is None):
            raise ValueError(f"{self.file}: must have either an SVG or a PNG")

    @property
    def content(self) -> bytes:
        """The file's bytes."""
        return self.svg.encode() if self.svg is not None else self.png or b""

    @property
    def source(self) -> str:
        """As the address of an image inside a page."""
        kind = "svg+xml" if self.svg is not None else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Examination:
    """All numbers of an examination, its findings and its figures."""

    numbers: Mapping[str, Any]
    """Numbers, strings, None, lists and mappings alone; see `examine.examine`."""
    findings: Sequence[Finding]
    panels: Sequence[Panel]

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "alarm"]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "note"]

    def shown(self, section: Section) -> list[Panel]:
        """The figures of one section, in order."""
        return [panel for panel in self.panels if panel.section == section]

    def to_json(self) -> str:
        """Strict JSON. Raises ValueError rather than write NaN, which is not JSON."""
        tree = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            **self.numbers,
            "findings": [finding.tree() for finding in self.findings],
            "figures": {panel.file: {"title": panel.title, "caption": panel.caption} for panel in self.panels},
        }
        return json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
