"""`calibration.json` in a run's folder: what makes honest probabilities of its logits, and when not to answer.

Whoever fits it writes it; here it is read and checked. Probabilities are softmax(logits / temperature) (Guo et al.
2017), and an answer whose highest probability is below `abstain_threshold` is not given.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfrecords_builder.errors import UserError, one_line

CALIBRATION = "calibration.json"
TEMPERATURES = (1e-3, 1e3)
"""Beyond these, float32 has no finite logits left, or no difference between them."""


@dataclass(frozen=True)
class Calibration:
    """How logits become answers."""

    temperature: float = 1.0
    abstain_threshold: float | None = None
    """From 0 to 1; None when every answer is given."""


def read_calibration(run: Path) -> Calibration | None:
    """What the run was calibrated to; None when it was not.

    Raises:
        UserError: the file is there, and is damaged or of another form.
    """
    path = run / CALIBRATION
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("is no JSON object")
        return Calibration(_temperature(raw), _threshold(raw))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {one_line(error)}; calibrate the run again, or remove the file") from None


def _temperature(raw: dict[str, Any]) -> float:
    value, (least, most) = _number(raw, "temperature"), TEMPERATURES
    if value is None or not least <= value <= most:
        raise ValueError(f"temperature must be a number from {least:g} to {most:g}")
    return value


def _threshold(raw: dict[str, Any]) -> float | None:
    value = _number(raw, "abstain_threshold")
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError("abstain_threshold must be null, or a number from 0 to 1")
    return value


def _number(raw: dict[str, Any], key: str) -> float | None:
    if key not in raw:
        raise ValueError(f"{key} is missing")
    value = raw[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is no number")
    try:
        return float(value)
    except OverflowError:
        return math.inf
