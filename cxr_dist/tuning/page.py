"""The page of a search: one HTML file that loads nothing, from the files of the experiment alone."""

from collections.abc import Sequence
from typing import Any

from cxr_dist.runs.ranking import WORDS
from cxr_dist.tuning import figures
from cxr_dist.tuning.experiment import PAGE, Experiment, TrialResult, best_result
from cxr_dist.tuning.figures import Point
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.files import write_text
from tfrecords_builder.common.page import template_environment

_STATES = ("complete", "stopped", "failed", "running")
TRIALS_FOR_IMPORTANCE = 8
"""Smallest number of complete trials for an estimate of importance."""


def write_page(experiment: Experiment) -> None:
    """`search.html` of what the experiment holds now."""
    page = render(experiment.plan(), experiment.results(), experiment.info()["dataset"])
    write_text(experiment.folder / PAGE, page)


def render(plan: SearchPlan, results: Sequence[TrialResult], dataset: str) -> str:
    """The page as HTML."""
    points = [
        Point(result.trial.number, result.trial.values, result.trial.state, result.objective, row["val_loss"])
        for result in results
        if result.objective is not None and result.trial.state in ("complete", "stopped") and (row := result.best_row)
    ]
    return (
        template_environment("cxr_dist")
        .get_template("search.html.j2")
        .render(
            search=plan.search,
            dataset=dataset,
            outcomes=sorted(
                results, key=lambda it: (_STATES.index(it.trial.state), -(it.objective or 0.0), it.trial.number)
            ),
            best=best_result(results),
            keys=list(plan.search.parameters),
            counts={state: sum(result.trial.state == state for result in results) for state in _STATES},
            figures=_figures(plan, points) if points else [],
            importance=importance(plan, results),
            needed=TRIALS_FOR_IMPORTANCE,
            config=plan.base.to_yaml(),
            value=_value,
            objective=WORDS[plan.base.selection.metric],
        )
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importance(plan: SearchPlan, results: Sequence[TrialResult]) -> dict[str, float] | None:
    """Share of the objective's variance that each key explains (fANOVA: Hutter, Hoos and Leyton-Brown 2014).

    None with few complete trials, a single key, or trials that are all alike.
    """
    import optuna

    complete = [result.finished() for result in results if result.trial.state == "complete" and result.history]
    if len(complete) < TRIALS_FOR_IMPORTANCE or len(plan.search.parameters) < 2:
        return None
    if len({trial.objective for trial in complete}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(Sampler(plan, complete).study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def _figures(plan: SearchPlan, points: Sequence[Point]) -> list[Figure]:
    objective = WORDS[plan.base.selection.metric]
    best, parameters = max(points, key=lambda point: point.rank), plan.search.parameters
    shown = [
        Figure(
            "history.svg",
            "Optimisation history",
            f"Best {objective} of each trial, from {min(point.objective for point in points):.4f} to "
            f"{best.objective:.4f}. Trial {best.number} has the highest.",
            figures.history_figure(points, objective),
        ),
        Figure(
            "parallel.svg",
            "Parallel coordinates",
            "Each line is a trial, and crosses each axis at its value. Darker lines end higher, and dotted "
            f"ones were stopped early. The thick line is trial {best.number}, the best.",
            figures.parallel_figure(parameters, points, objective),
        ),
    ]
    for key, parameter in parameters.items():
        caption = f"Best {objective} of each trial by {key}. The best trial has {_value(best.values[key])}."
        shown.append(Figure(f"{key}.svg", key, caption, figures.parameter_figure(key, parameter, points, objective)))
    return shown
