"""What trials share: a search over settings of the head, against one trial that shares nothing.

Both are commands with an empty feature cache, timed from their start to their end: `train` of the base's stage 1, and
`tune` of so many trials, its tables and page included, the evaluation not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_dist.bench import common
from cxr_dist.tuning.experiment import Experiment, best_result


@dataclass(frozen=True)
class Comparison:
    """Seconds, whole commands."""

    trials: int
    alone_seconds: float
    alone_accuracy: float
    search_seconds: float
    best_accuracy: float

    @property
    def times(self) -> float:
        """Of one trial's time, that all trials take."""
        return self.search_seconds / self.alone_seconds


def measure(dataset: Path, work: Path, trials: int, launcher: str, overrides: Sequence[str]) -> Comparison:
    """One trial, then all of them, on `dataset`; `overrides` hold for both."""
    head = ["stages.2.epochs=0", *overrides]
    alone = common.train(dataset, work / "alone" / "run", ["--config", "cpu", "--launcher", "local"], head)
    experiment = work / "search" / "experiment"
    started = time.perf_counter()
    common.command(
        [
            *("tune", str(dataset), "--out", str(experiment), "--config", "search_cpu", "--no-evaluation"),
            *("--launcher", launcher),
        ],
        [f"search.trials={trials}", *overrides],
    )
    searched = time.perf_counter() - started
    results = Experiment(experiment).results()
    best = best_result(results)
    if best is None or any(result.trial.state != "complete" for result in results) or len(results) != trials:
        raise RuntimeError(f"the search did not complete its {trials} trials")
    accuracy = alone.result["best"]["val_accuracy"]
    return Comparison(trials, alone.seconds, accuracy, searched, best.objective or 0.0)


def table(measured: Comparison) -> list[str]:
    """Lines for people."""
    return [
        "                     seconds  best validation accuracy",
        f"one trial alone    {measured.alone_seconds:9.1f}  {measured.alone_accuracy:.4f}",
        f"{measured.trials:3} trials          {measured.search_seconds:9.1f}  {measured.best_accuracy:.4f}",
        f"all trials take {measured.times:.2f} times as long as one that shares no features",
    ]
