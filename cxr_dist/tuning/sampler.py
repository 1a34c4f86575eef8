"""What the next trial tries: Optuna's samplers behind `ask` and `tell`, which know of trials by our own numbers.

All that the sampler has learned is in the records of earlier trials, so a search that goes on needs no other state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cxr_dist.tuning.search_space import Parameter, SearchPlan, Values


@dataclass(frozen=True)
class Finished:
    """A trial that has ended, as a sampler learns from it."""

    values: Values
    objective: float | None
    """The best of what the selection maximises; None when it failed before there was one."""
    stopped: bool = False
    """Whether it was stopped early."""
    curve: tuple[tuple[int, float], ...] = ()
    """(epochs done, the best so far of what the selection maximises)."""


class Sampler:
    """Chooses the values of trial after trial."""

    def __init__(self, plan: SearchPlan, earlier: Sequence[Finished] = (), started: int | None = None) -> None:
        """
        Args:
            earlier: Trials that ended before this process began, in their order.
            started: Trials that were chosen before, ended or not; the next is that number.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._plan, search = plan, plan.search
        self._next = len(earlier) if started is None else started
        # With the number of trials, so that a search that goes on does not draw its first values again.
        seed = search.seed + self._next
        self._distributions = {key: _distribution(parameter) for key, parameter in search.parameters.items()}
        if search.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(4, search.trials // 4)))
        else:  # of a grid it is never asked: that is listed
            sampler = optuna.samplers.RandomSampler(seed=seed)
        if search.scheduler == "asha":
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=search.grace_epochs, reduction_factor=search.reduction_factor
            )
        elif search.scheduler == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=search.grace_epochs)
        else:
            pruner = optuna.pruners.NopPruner()
        self._grid = search.grid() if search.sampler == "grid" else []
        self.study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        self._open: dict[int, Any] = {}
        self._reported: dict[int, int] = {}
        for trial in earlier:
            self._learn(trial)

    @property
    def asked(self) -> int:
        """How many trials have been chosen, those of earlier processes too."""
        return self._next

    def ask(self) -> tuple[int, Values] | None:
        """The number and the values of the next trial; None when all have been chosen."""
        number = self._next
        if number >= self._plan.search.planned_trials():
            return None
        self._next += 1
        fixed: Values | None = None
        if self._grid:
            fixed = self._grid[number]
        elif number == 0 and self._plan.search.start_from_base:
            fixed = self._plan.base_values()
        self.ask_again(number, fixed)
        return number, {key: self._open[number].params[key] for key in self._distributions}

    def ask_again(self, number: int, values: Values | None) -> None:
        """Trial `number` runs now, with these values, which an earlier process chose; None: new ones."""
        if values is not None:
            self.study.enqueue_trial(values)
        self._open[number] = self.study.ask(self._distributions)

    def report(self, number: int, epochs_done: int, objective: float) -> bool:
        """Whether the trial should be stopped after so many epochs; an epoch that was reported decides nothing again.

        Args:
            number: Of the trial.
            epochs_done: Over all stages.
            objective: The best up to there of what the selection maximises.
        """
        if epochs_done <= self._reported.get(number, 0):
            return False
        self._reported[number] = epochs_done
        trial = self._open[number]
        trial.report(objective, epochs_done)
        return epochs_done >= self._plan.search.grace_epochs and bool(trial.should_prune())

    def tell(self, number: int, ended: Finished) -> None:
        """Trial `number` has ended."""
        trial = self._open.pop(number)
        self._reported.pop(number, None)
        outcome = _outcome(ended)
        if outcome["state"].name == "PRUNED":
            # What a stopped trial is worth is the last that was reported of it.
            reported = self.study.trials[trial.number].intermediate_values
            for epochs_done, objective in ended.curve:
                if epochs_done not in reported:
                    trial.report(objective, epochs_done)
        self.study.tell(trial, outcome["value"], state=outcome["state"])

    def _learn(self, trial: Finished) -> None:
        from optuna.trial import create_trial

        learned = {"params": dict(trial.values), "intermediate_values": dict(trial.curve)}
        self.study.add_trial(create_trial(**_outcome(trial), **learned, distributions=self._distributions))


def _outcome(ended: Finished) -> dict[str, Any]:
    """State and value of a trial that has ended, in Optuna's terms."""
    from optuna.trial import TrialState

    if ended.objective is None:
        return {"state": TrialState.FAIL, "value": None}
    if ended.stopped and ended.curve:
        return {"state": TrialState.PRUNED, "value": None}
    return {"state": TrialState.COMPLETE, "value": ended.objective}


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices is not None:
        return CategoricalDistribution(parameter.choices)
    low, high = (float(value) for value in parameter.extremes())
    if parameter.is_whole:
        return IntDistribution(int(low), int(high), log=parameter.log, step=int(parameter.step or 1))
    return FloatDistribution(low, high, log=parameter.log, step=parameter.step)
