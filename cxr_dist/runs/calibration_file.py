"""`calibration.json` in a run's folder: what makes honest probabilities of its logits, and when not to answer.

`cxr-dist calibrate` writes it; here it is read and checked. Probabilities are softmax(logits / temperature) (Guo et al.
2017), and an answer whose highest probability is below `abstain_threshold` is not given. The threshold was chosen on
images that also chose the model: it does not guarantee the risk (see `calibration`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfrecords_builder.common.errors import UserError, one_line

CALIBRATION = "calibration.json"
TEMPERATURES = (1e-3, 1e3)
"""Beyond these, float32 has no finite logits left, or no difference between them."""


@dataclass(frozen=True)
class Calibration:
    """How logits become answers."""

    temperature: float = 1.0
    abstain_threshold: float = 0.0
    """0 gives every answer, and infinity none: no answer was sure enough for the risk that was asked for."""


def read_calibration(run: Path) -> Calibration | None:
    """What the run was calibrated to; None when it was not. Raises as `read_fitted` does."""
    raw = read_fitted(run)
    if raw is None:
        return None
    threshold = raw["abstain_threshold"]
    return Calibration(float(raw["temperature"]), math.inf if threshold is None else float(threshold))


def read_fitted(run: Path) -> dict[str, Any] | None:
    """The file as it was written (see `calibration.fit`); None when there is none.

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
        _check_temperature(raw)
        _check_threshold(raw)
        _check_risk(raw)
        return raw
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {one_line(error)}; run `cxr-dist calibrate` again, or remove the file") from None


def _check_temperature(raw: dict[str, Any]) -> None:
    value, (least, most) = _number(raw, "temperature"), TEMPERATURES
    if value is None or not least <= value <= most:
        raise ValueError(f"temperature must be a number from {least:g} to {most:g}")


def _check_threshold(raw: dict[str, Any]) -> None:
    value = _number(raw, "abstain_threshold")
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError("abstain_threshold must be null, or a number from 0 to 1")


def _check_risk(raw: dict[str, Any]) -> None:
    value = _number(raw, "target_risk")
    if value is None or not 0.0 < value < 1.0:
        raise ValueError("target_risk must be a number between 0 and 1")


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
