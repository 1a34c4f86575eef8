"""Which epoch, and so which trial, is better: by validation accuracy, then by validation loss. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """Sorts rows of a history from the worst validation to the best; a figure that is missing or NaN is the worst."""
    accuracy, loss = (_number(row.get(key)) for key in ("val_accuracy", "val_loss"))
    return (-math.inf if accuracy is None else accuracy, -math.inf if loss is None else -loss)


def best_index(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The position of the best epoch, the first of equal ones; None when no epoch was validated."""
    validated = [index for index, row in enumerate(history) if _number(row.get("val_accuracy")) is not None]
    return max(validated, key=lambda index: rank(history[index]), default=None)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
