"""A run's history, one row per epoch: stages, labels and the best epoch."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.runs.ranking import best_index

STAGE_LABELS = {"1": "stage 1: head", "2": "stage 2: fine-tuning"}


def best_epoch_of(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The best epoch (from 1, through all stages); None if no epoch was validated."""
    index = best_index(history)
    return None if index is None else index + 1


def stage_spans(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(stage, first epoch, last epoch) of each run of equal stages, epochs counted through all stages from 1."""
    stages = [str(row["stage"]) for row in history]
    starts = [1, *(index + 2 for index, (one, other) in enumerate(pairwise(stages)) if one != other)]
    ends = [*(start - 1 for start in starts[1:]), len(stages)]
    return [(stages[start - 1], start, end) for start, end in zip(starts, ends, strict=True)]


def stage_label(stage: str) -> str:
    """What a stage is called in figures and captions."""
    return STAGE_LABELS.get(stage, f"stage {stage}")


def column(history: Sequence[Mapping[str, Any]], key: str) -> npt.NDArray[np.float64]:
    """One value of each row; NaN where it is missing."""
    values = (row.get(key) for row in history)
    return np.array([math.nan if value is None else value for value in values], np.float64)
