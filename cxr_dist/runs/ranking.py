"""Which epoch, and so which trial, is better: by the metric of the selection, then by validation loss. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SELECTION = "selection"
"""Of a row of the history: the metric of the selection, negated where less is better."""
COLUMNS = {
    "accuracy": ("val_accuracy", 1.0),
    "f1_macro": ("val_f1_macro", 1.0),
    "balanced_accuracy": ("val_recall_macro", 1.0),
    "log_loss": ("val_loss", -1.0),
}
"""By `selection.metric`: the column of the history, and its sign."""
WORDS = {
    "accuracy": "validation accuracy",
    "f1_macro": "validation macro F1",
    "balanced_accuracy": "balanced validation accuracy",
    "log_loss": "negative validation loss",
}


def selection_score(row: Mapping[str, Any], metric: str) -> float:
    """What the selection maximises, of the row of a validated epoch."""
    column, sign = COLUMNS[metric]
    return sign * float(row[column])


def rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """Sorts rows of a history from the worst validation to the best; a figure that is missing or NaN is the worst."""
    score, loss = _score(row), _number(row.get("val_loss"))
    return (-math.inf if score is None else score, -math.inf if loss is None else -loss)


def best_index(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The position of the best epoch, the first of equal ones; None when no epoch was validated."""
    validated = [index for index, row in enumerate(history) if _score(row) is not None]
    return max(validated, key=lambda index: rank(history[index]), default=None)


def score_of(row: Mapping[str, Any]) -> float:
    """What the selection maximises; the accuracy where a row does not say."""
    return float(row[SELECTION] if SELECTION in row else row["val_accuracy"])


def _score(row: Mapping[str, Any]) -> float | None:
    return _number(row.get(SELECTION, row.get("val_accuracy")))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
