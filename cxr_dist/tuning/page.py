"""The page of a search: one HTML file that loads nothing, from the files of the experiment alone."""

from collections.abc import Sequence
from typing import Any

from cxr_dist.tuning import figures
from cxr_dist.tuning.experiment import PAGE, Experiment, TrialResult, best_result
from cxr_dist.tuning.figures import Point
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchPlan
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.files import write_bytes
from tfrecords_builder.common.page import template_environment

TRIALS_FOR_IMPORTANCE = 8
"""Complete trials below which an estimate of importance says nothing."""


def write_page(experiment: Experiment) -> None:
    """`search.html` of what the experiment holds now."""
    outcomes = experiment.results()
    plan = experiment.plan()
    write_bytes(experiment.folder / PAGE, render(plan, outcomes, experiment.info()["dataset"]).encode())


def render(plan: SearchPlan, outcomes: Sequence[TrialResult], dataset: str) -> str:
    """The page as HTML."""
    points = [
        Point(each.trial.number, each.trial.values, each.trial.state, each.objective, (each.best_row or {})["val_loss"])
        for each in outcomes
        if each.objective is not None and each.trial.state in ("complete", "stopped")
    ]
    best = best_result(list(outcomes))
    template = template_environment("cxr_dist").get_template("search.html.j2")
    return template.render(
        search=plan.search,
        dataset=dataset,
        outcomes=sorted(outcomes, key=_order),
        best=best,
        keys=list(plan.search.parameters),
        counts={state: sum(each.trial.state == state for each in outcomes) for state in _STATES},
        figures=_figures(plan, points) if points else [],
        importance=importance(plan, outcomes),
        needed=TRIALS_FOR_IMPORTANCE,
        config=plan.base.to_yaml(),
        value=_value,
    )


_STATES = ("complete", "stopped", "failed", "running")


def _order(outcome: TrialResult) -> tuple[int, float, int]:
    return _STATES.index(outcome.trial.state), -(outcome.objective or 0.0), outcome.trial.number


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importance(plan: SearchPlan, outcomes: Sequence[TrialResult]) -> dict[str, float] | None:
    """How much of the variation of the objective goes with each key (fANOVA: Hutter, Hoos and Leyton-Brown 2014).

    None with few complete trials, a single key, or trials that are all alike.
    """
    import optuna

    complete = [each.finished() for each in outcomes if each.trial.state == "complete" and each.objective is not None]
    if len(complete) < TRIALS_FOR_IMPORTANCE or len(plan.search.parameters) < 2:
        return None
    if len({each.objective for each in complete}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found: dict[str, float] = optuna.importance.get_param_importances(
        Sampler(plan, complete).study, evaluator=evaluator
    )
    return {key: float(share) for key, share in found.items()}


def _figures(plan: SearchPlan, points: Sequence[Point]) -> list[Figure]:
    best = max(points, key=lambda point: point.rank)
    span = f"from {min(point.objective for point in points):.4f} to {best.objective:.4f}"
    shown = [
        Figure(
            "history.svg",
            "Optimisation history",
            f"Best validation accuracy of each trial, {span}; the highest is trial {best.number}.",
            figures.history_figure(points),
        ),
        Figure(
            "parallel.svg",
            "Parallel coordinates",
            "A line is a trial: where it stands on each scale is its value. Dark is good, dotted was stopped early; "
            f"the thick line is trial {best.number}.",
            figures.parallel_figure(plan.search.parameters, points),
        ),
    ]
    for key, parameter in plan.search.parameters.items():
        caption = f"Best validation accuracy of each trial against {key}; the highest is at {_value(best.values[key])}."
        shown.append(Figure(f"{key}.svg", key, caption, figures.parameter_figure(key, parameter, points)))
    return shown
