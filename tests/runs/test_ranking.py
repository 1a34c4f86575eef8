"""One order of epochs and trials, wherever a best one is named."""

import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from cxr_dist.evaluation.history import best_epoch_of
from cxr_dist.runs.ranking import COLUMNS, best_index, rank, selection_score
from cxr_dist.training.progress import Best, Progress
from cxr_dist.tuning.experiment import Trial, TrialResult, best_result
from cxr_dist.tuning.figures import Point
from cxr_dist.tuning.search import result_line


def row(accuracy: float, loss: float, number: int = 1) -> dict[str, Any]:
    return {
        "selection": accuracy,
        "val_accuracy": accuracy,
        "val_loss": loss,
        "stage": 1,
        "epoch": number,
        "epochs_done": number,
    }


ROWS = list(itertools.product((0.25, 0.5, 0.75), (0.1, 0.2, 0.3)))


def test_the_better_accuracy_then_the_lower_loss_then_the_earlier() -> None:
    for history in itertools.permutations(ROWS[:5] + ROWS[:1], 4):
        rows = [row(*pair, number + 1) for number, pair in enumerate(history)]
        expected = sorted(range(4), key=lambda index: (-history[index][0], history[index][1], index))[0]
        assert best_index(rows) == expected
        assert best_epoch_of(rows) == expected + 1
        best = Best()
        for each in rows:
            if best.is_beaten_by(each):
                best = Best(each["selection"], each["val_accuracy"], each["val_loss"], each["epochs_done"])
        assert best.epochs_done == expected + 1, "what the run keeps is what its page marks"
        assert (TrialResult(Trial(0, {}), rows, None).best_row or {})["epoch"] == expected + 1


def test_what_was_not_validated_is_never_the_best() -> None:
    assert best_index([]) is None
    assert best_index([{"loss": 1.0}, {"val_accuracy": math.nan, "val_loss": 0.1}]) is None
    assert best_index([{"loss": 1.0}, row(0.0, math.nan)]) == 1
    assert rank(row(0.5, math.nan)) < rank(row(0.5, 99.0)) < rank(row(0.5, 0.0))


def test_the_line_of_a_search_names_the_best_that_its_tables_name() -> None:
    """Whatever the order in which trials of equal accuracy end."""
    results = [
        TrialResult(Trial(number, {}, "complete"), [row(*pair)], {})
        for number, pair in enumerate([(0.5, 0.3), (0.5, 0.2), (0.5, 0.2), (0.25, 0.1)])
    ]
    assert (best_result(results) or results[0]).trial.number == 1
    for order in itertools.permutations(results):
        best = None
        for result in order:
            best = best_result([result, *([best] if best else [])])
        assert result_line(order[-1], best).endswith("best 0.5000 (trial 1)")
    points = [Point(each.trial.number, {}, "complete", 0.5, -rank(each.history[0])[1]) for each in results[:3]]
    assert max(reversed(points), key=lambda point: point.rank).number == 1


@pytest.mark.parametrize("metric", COLUMNS)
def test_the_metric_of_the_selection_decides(metric: str) -> None:
    """Of random histories, the best epoch is the one that NumPy finds in the metric's column."""
    column, sign = COLUMNS[metric]
    rng = np.random.default_rng(0)
    for _ in range(50):
        progress, rows = Progress(), []
        for epoch in range(1, 9):
            figures = {name: float(rng.integers(0, 5)) / 4 for name, _ in COLUMNS.values()}
            found = row(0.0, 0.0, epoch) | figures | {"selection": selection_score(figures, metric)}
            progress.end_epoch(found)
            rows.append(found)
        values = np.array([sign * each[column] for each in rows])
        losses = np.array([each["val_loss"] for each in rows])
        expected = int(np.lexsort((np.arange(8), losses, -values))[0])
        assert best_index(rows) == expected
        assert progress.best.epochs_done == expected + 1
        assert progress.epochs_without_gain == 7 - max(index for index, each in enumerate(rows) if each["best"])
        assert TrialResult(Trial(0, {}), rows, None).objective == values.max()
        assert Progress.of_state(json.loads(json.dumps(asdict(progress)))) == progress
