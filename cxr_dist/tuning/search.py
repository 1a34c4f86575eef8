"""A search in progress: what its launcher asks for and tells, whether that is Ray Tune or processes of this machine."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.runs.ranking import WORDS
from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.tuning.experiment import Experiment, Trial, TrialResult, best_result
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan, Values
from cxr_dist.tuning.trial import TrialJob
from tfrecords_builder.common.places import absolute


class Search:
    """The trials of a search: those that an interrupted search left, then new ones; all are written down at once."""

    def __init__(self, plan: SearchPlan, experiment: Experiment, dataset: OpenDataset) -> None:
        self.plan, self.experiment, self.dataset = plan, experiment, dataset
        self._observer: Callable[[Mapping[str, int]], None] = lambda _counts: None
        self._interrupted: list[Trial] = []
        self._running: dict[int, tuple[Trial, float]] = {}
        self._states: Counter[str] = Counter()
        self._best: TrialResult | None = None
        self._planned = plan.search.planned_trials()

    def resume(self) -> None:
        """Learn from the trials that ended, in the opened folder of the experiment."""
        ended, self._interrupted = self.experiment.settle()
        started = len(ended) + len(self._interrupted)
        if started:
            _print(f"{self.experiment.folder}: {len(ended)} trials have ended, {len(self._interrupted)} resume")
        self.sampler = Sampler(self.plan, [result.finished() for result in ended], started)
        self._planned = max(self._planned, started)
        self._states.update(result.trial.state for result in ended)
        self._best = best_result(ended)

    @property
    def left(self) -> int:
        """Trials that have not been begun by this process."""
        return max(self.plan.search.planned_trials() - self.sampler.asked, 0) + len(self._interrupted)

    def begin_next(self) -> TrialJob | None:
        """The next trial, begun; None when all have been."""
        if self._interrupted:
            trial = self._interrupted.pop(0)
            number, values = trial.number, trial.values
            self.sampler.ask_again(number, values)
        else:
            chosen = self.sampler.ask()
            if chosen is None:
                return None
            number, values = chosen
        trial = self.experiment.begin(number, values)
        self._running[number] = trial, time.monotonic()
        if trial.attempts > 1:
            _print(f"trial {number}: resumes ({_format(values)})")
        self._count("running", 1)
        return self.job(number, values)

    def should_stop(self, number: int, curve: Sequence[tuple[int, float]]) -> bool:
        """Whether the pruner stops a trial.

        Args:
            number: Of the trial.
            curve: (epochs done, best objective so far) of each further epoch; what is known is passed over.
        """
        if number not in self._running:
            return False
        return any(self.sampler.report(number, epochs, objective) for epochs, objective in curve)

    def end(self, number: int, reason: str | None = None) -> None:
        """Write how a trial ended.

        Args:
            number: Of the trial.
            reason: Why it failed, unless its own process wrote that.
        """
        trial, started = self._running.pop(number)
        result = self.experiment.end(trial, time.monotonic() - started, reason=reason)
        trial = result.trial
        self.sampler.tell(number, result.finished())
        self._count("running", -1)
        self._count(trial.state, 1)
        self._best = best_result([result, *([self._best] if self._best else [])])
        ended = sum(self._states.values()) - self._states["running"]
        _print(f"[{ended}/{self._planned}] {result_line(result, self._best, self.plan.base.selection.metric)}")

    def observe(self, observer: Callable[[Mapping[str, int]], None]) -> None:
        """Tell `observer` now and at every change how many trials are in each state, `waiting` too."""
        self._observer = observer
        self._count("running", 0)

    def _count(self, state: str, change: int) -> None:
        self._states[state] += change
        self._observer({**self._states, "waiting": max(self._planned - sum(self._states.values()), 0)})

    def job(self, number: int, values: Values) -> TrialJob:
        """What the process of a trial needs to know."""
        return TrialJob(
            number,
            values,
            str(self.experiment.folder),
            absolute(self.dataset.folder),  # a trial under Ray works in a folder of its own
            absolute(self.dataset.place),
            self.resolved(self.plan.trial_config(values)).tree(),
            self.plan.search.time_limit_s,
        )

    def shared_job(self) -> TrialJob:
        """A job with the settings of the base, whose features are those of all trials."""
        return self.job(-1, {})

    def resolved(self, config: Config) -> Config:
        """As the trials' loops get it: all use one feature cache, which lies beside the experiment."""
        config = run_folder.resolve_config(config, self.dataset.manifest)
        if config.features.folder is None:
            folder = str(self.experiment.folder.parent / run_folder.FEATURE_CACHE)
            config = config.model_copy(update={"features": config.features.model_copy(update={"folder": folder})})
        return config


class Trials(Protocol):
    """Where the trials of a search run."""

    def run(self, search: Search) -> None:
        """Run all trials that are left; whatever happens to one, the others go on."""
        ...


def result_line(result: TrialResult, best: TrialResult | None, metric: str = "accuracy") -> str:
    """One line for people: a trial that has ended, and the best trial so far, by `selection.metric`."""
    trial, objective = result.trial, result.objective
    state = f"failed: {trial.reason}" if trial.state == "failed" else trial.state
    if trial.state != "failed" and objective is not None:
        state += f", {WORDS[metric]} {objective:.4f}"
    leader = f"; best {best.objective or 0.0:.4f} (trial {best.trial.number})" if best else ""
    return f"trial {trial.number} ({_format(trial.values)}): {state}, {trial.seconds:.0f} s{leader}"


def _format(values: Values) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
