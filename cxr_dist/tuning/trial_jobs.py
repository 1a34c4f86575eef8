"""What the launchers of a search share: the jobs of trials, and the lines that tell how it goes."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.tuning.experiment import Experiment, Outcome, Trial, best_outcome
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan, Values
from cxr_dist.tuning.trial import TrialJob
from tfrecords_builder.format.manifest import Manifest
from tfrecords_builder.remote import Place, absolute


@dataclass
class Jobs:
    """Makes the jobs of a search's trials."""

    experiment: Experiment
    plan: SearchPlan
    manifest: Manifest
    dataset: Path
    """On this machine."""
    place: Place
    """As it was given."""
    left: list[Trial] = field(default_factory=list)
    """Begun by an earlier process, and not ended."""

    def of(self, number: int, values: Values) -> TrialJob:
        """The job of a trial."""
        config = self.resolved(self.plan.trial_config(values))
        return TrialJob(
            number,
            values,
            str(self.experiment.folder),
            absolute(self.dataset),  # a trial under Ray works in a folder of its own
            absolute(self.place),
            config.tree(),
            self.plan.search.time_limit_s,
        )

    def resolved(self, config: Config) -> Config:
        """As the trials' loops get it: all use one feature cache, which lies beside the experiment."""
        config = run_folder.resolve_config(config, self.manifest)
        if config.features.folder is None:
            folder = str(self.experiment.folder.parent / run_folder.FEATURE_CACHE)
            config = config.model_copy(update={"features": config.features.model_copy(update={"folder": folder})})
        return config

    def shared(self) -> TrialJob:
        """A job with the settings of the base, whose features are those of all trials."""
        return self.of(-1, {})

    def interrupted(self, sampler: Sampler) -> Iterator[TrialJob]:
        """Those to go on with; the sampler is told that they run."""
        for trial in self.left:
            sampler.ask_again(trial.number, trial.values)
            yield self.of(trial.number, trial.values)


class Watch:
    """Prints a line for each trial that ends."""

    def __init__(self, planned: int, ended: Sequence[Outcome] = ()) -> None:
        self._planned, self._ended = planned, len(ended)
        self._best = best_outcome(ended)

    def began(self, trial: Trial) -> None:
        if trial.attempts > 1:
            _say(f"trial {trial.number}: goes on ({_words(trial.values)})")

    def ended(self, outcome: Outcome) -> None:
        trial, self._ended = outcome.trial, self._ended + 1
        objective = outcome.objective
        if trial.state == "failed":
            how = f"failed: {trial.reason}"
        else:
            how = trial.state + (f", validation accuracy {objective:.4f}" if objective is not None else "")
        leader = self._best = best_outcome([outcome, *([self._best] if self._best else [])])
        best = f"; best {leader.objective or 0.0:.4f} (trial {leader.trial.number})" if leader else ""
        _say(
            f"[{self._ended}/{self._planned}] trial {trial.number} ({_words(trial.values)}): {how}, "
            f"{trial.seconds:.0f} s{best}"
        )


def _words(values: Values) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
