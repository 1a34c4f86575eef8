"""What an examination found, as others read it. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tfrecords_builder.common.figure import Figure

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


@dataclass(frozen=True)
class Examination:
    """All numbers of an examination, its findings and its figures."""

    numbers: Mapping[str, Any]
    """Numbers, strings, None, lists and mappings alone; see `examine.examine`."""
    findings: Sequence[Finding]
    sections: Mapping[Section, Sequence[Figure]]
    """The figures, by the section of the page that shows them."""

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "alarm"]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "note"]

    @property
    def figures(self) -> list[Figure]:
        """All of them."""
        return [figure for figures in self.sections.values() for figure in figures]

    def to_json(self) -> str:
        """Strict JSON. Raises ValueError rather than write NaN, which is not JSON."""
        tree = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            **self.numbers,
            "findings": [asdict(finding) for finding in self.findings],
            "figures": {item.file: {"title": item.title, "caption": item.caption} for item in self.figures},
        }
        return json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
