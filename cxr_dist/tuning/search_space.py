"""A search as its YAML file defines it: the search space, the sampler, early stopping, and the resources of a trial."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cxr_dist.config.loading import (
    Layer,
    Overrides,
    flat,
    known_keys,
    load_config,
    nested,
    override_layers,
    read_yaml,
    resolve_preset,
)
from cxr_dist.config.schema import Config, Node, first_problem
from tfrecords_builder.common.errors import UserError

Value = bool | int | float | str
Values = dict[str, Value]
"""What a trial sets, by dotted config key."""


class Parameter(Node):
    """The values of one config key KEY: either choices, or a range from low to high."""

    choices: tuple[Value, ...] | None = Field(None, min_length=1, description="List of the values to try, of any type.")
    low: int | float | None = Field(None, description="Lower end of the range, included.")
    high: int | float | None = Field(None, description="Upper end of the range, included.")
    log: bool = Field(False, description="Sample the range on a logarithmic scale.")
    step: int | float | None = Field(
        None, gt=0, description="Distance between values of the range. null: 1 between whole numbers, else continuous."
    )

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "Parameter":
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError("needs either choices, or low and high")
        if self.choices is not None:
            if self.log or self.step is not None:
                raise ValueError("log and step belong to a range, not to choices")
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("low must be below high, and both be given")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the range has whole numbers only."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    def extremes(self) -> tuple[Value, ...]:
        """Values between which, or among which, all others are."""
        return self.choices or tuple(value for value in (self.low, self.high) if value is not None)

    def holds(self, value: object) -> bool:
        """Whether a trial could have `value`."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and (self.low or 0) <= value <= (self.high or 0)

    def points(self) -> tuple[Value, ...] | None:
        """All values, where they are few enough to be listed; None for a range without steps."""
        if self.low is None or self.high is None:
            return self.choices
        if self.log or not (self.step or self.is_whole):
            return None
        step = self.step or 1
        return tuple(self.low + number * step for number in range(int((self.high - self.low) / step + 1e-9) + 1))


def _off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false; here it is a word."""
    return "off" if value is False else value


class SearchConfig(Node):
    """The search, in the file for `cxr-dist tune`."""

    trials: int = Field(16, ge=1, description="Number of trials. A grid with fewer points ends after its last point.")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="Method that chooses the next trial: Optuna's TPE, random, or every point of a grid."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of the sampler.")
    start_from_base: bool = Field(
        True, description="Give the first trial the values of the base, if the space has them."
    )
    scheduler: Annotated[Literal["asha", "median", "off"], BeforeValidator(_off)] = Field(
        "asha", description="Early stopping of trials: successive halving (asha), those below the median, or none."
    )
    grace_epochs: int = Field(1, ge=1, description="Number of epochs, over all stages, before a trial may be stopped.")
    reduction_factor: int = Field(
        3, ge=2, description="Reduction factor of asha: one of this number of trials continues at each rung."
    )
    concurrent: int | None = Field(
        None, ge=1, description="Number of trials that run at a time. null: as many as the resources allow."
    )
    workers_per_trial: int = Field(1, ge=1, description="Number of workers of a trial. Above 1, it needs Ray Train.")
    cpus_per_trial: float | None = Field(
        None, gt=0, description="Number of CPUs of each worker. null: the cores in equal parts."
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, description="Number of GPUs of each worker; a single worker may have a fraction. null: 1 if any."
    )
    time_limit_s: float | None = Field(
        None, gt=0, description="Time limit of a trial in seconds; beyond it, the trial fails. null: no limit."
    )
    keep: int = Field(
        1,
        ge=1,
        description="Number of the best trials that keep model.keras. Others keep the weights that training changed, "
        "from which the model can be rebuilt.",
    )
    parameters: dict[str, Parameter] = Field(min_length=1, description="Search space, by dotted config key.")

    @model_validator(mode="after")
    def _consistent(self) -> "SearchConfig":
        if self.sampler == "grid":
            for key, parameter in self.parameters.items():
                if parameter.points() is None:
                    raise ValueError(f"parameters.{key}: sampler grid needs choices, or a range with a step")
        gpus = self.gpus_per_trial
        if gpus is not None and gpus != int(gpus) and (self.workers_per_trial > 1 or gpus > 1):
            raise ValueError(
                "gpus_per_trial: a fraction must be below 1, for a single worker; several workers need whole GPUs"
            )
        return self

    def grid(self) -> list[Values]:
        """Every point of the space, in order of the keys; `points` of each parameter are known."""
        lists = {key: parameter.points() or () for key, parameter in self.parameters.items()}
        return [dict(zip(lists, point, strict=True)) for point in product(*lists.values())]

    def planned_trials(self) -> int:
        """How many there will be."""
        return min(self.trials, len(self.grid())) if self.sampler == "grid" else self.trials


@dataclass(frozen=True)
class SearchPlan:
    """A search, and the configuration that its trials start from."""

    search: SearchConfig
    layers: tuple[Layer, ...]
    """Trees of config keys, later ones over earlier ones."""

    @property
    def base(self) -> Config:
        return load_config(layers=self.layers)

    def trial_config(self, values: Mapping[str, Value]) -> Config:
        """The configuration of the trial that sets `values`."""
        trial = tuple((f"search.parameters.{key}: ", nested(key, value)) for key, value in values.items())
        return load_config(layers=(*self.layers, *trial))

    def base_values(self) -> Values | None:
        """What the base has for the keys that vary; None where one lies outside its range."""
        tree = flat(self.base.tree())
        found = {key: tree[key] for key in self.search.parameters}
        return found if all(self.search.parameters[key].holds(value) for key, value in found.items()) else None

    def trains_head_alone(self) -> bool:
        """Whether no trial has a stage that trains layers of the base."""
        keys = self.search.parameters
        for number, stage in self.base.stages.items():
            depth, epochs = f"stages.{number}.unfreeze_layers", f"stages.{number}.epochs"
            deep = stage.unfreeze_layers > 0 or depth in keys
            if deep and (stage.epochs > 0 or epochs in keys):
                return False
        return True

    def largest_config(self) -> Config:
        """The configuration of a trial that trains the most layers and, of stages that may be left out, all."""
        deepest: Values = {}
        for key, parameter in self.search.parameters.items():
            if key.endswith((".unfreeze_layers", ".epochs")):
                deepest[key] = max(int(value) for value in parameter.extremes())
        return self.trial_config(deepest)

    def tree(self) -> dict[str, Any]:
        """As plain data, from which `from_tree` makes an equal one."""
        return {"search": self.search.model_dump(mode="json"), "config": self.base.tree()}


def from_tree(tree: Mapping[str, Any]) -> SearchPlan:
    """What `SearchPlan.tree` gave; the configuration is then one resolved layer."""
    return SearchPlan(SearchConfig.model_validate(tree["search"]), (("config ", tree["config"]),))


def load_search(path: Path, overrides: Overrides | None = None) -> SearchPlan:
    """A search space from the YAML file at `path`: `base` (a preset or file), `search`, and config keys over the base.

    Args:
        overrides: Of `search.` or of the configuration.

    Raises:
        UserError: the file is missing or no search space, or a key or value is not valid.
    """
    tree = read_yaml(path)
    section = tree.pop("search", None)
    if not isinstance(section, dict):
        raise UserError(f"{path}: has no section search; give a search space, such as --config search_cpu")
    base = tree.pop("base", None)
    layers: list[Layer] = [(f"{path}: ", tree)]
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base is a {type(base).__name__}; give the name of a preset or file")
        beside = path.parent / base
        base_path = beside if beside.is_file() else resolve_preset(Path(base)) or beside
        layers.insert(0, (f"{base_path}: ", read_yaml(base_path)))
    for where, change in override_layers(overrides):
        if set(change) != {"search"}:
            layers.append((where, change))
            continue
        if not isinstance(change["search"], dict):
            raise UserError(
                f"{where}search={change['search']}: search is a section with keys of its own, such as search.trials"
            )
        for key, value in change["search"].items():
            if isinstance(value, dict) and key != "parameters":
                raise UserError(f"{where}search.{key}: is a value, not a mapping")
            section[key] = value
    try:
        plan = SearchPlan(SearchConfig.model_validate(section), tuple(layers))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, 'search')}") from None
    _check_keys(plan)
    return plan


def _check_keys(plan: SearchPlan) -> None:
    """Every key can be set, and to the ends of its range; whatever is wrong is said now, not after the first trials."""
    plan.base  # noqa: B018 - raises where a layer is wrong
    known = known_keys()
    for key, parameter in plan.search.parameters.items():
        if key == "selection.metric":
            raise UserError(f"search.parameters.{key}: ranks the trials; set one metric for all of them")
        number = key.split(".")[1] if key.startswith("stages.") and key.count(".") == 2 else None
        usual = key.replace(f"stages.{number}.", "stages.1.") if number else key
        if usual not in known:
            load_config(layers=[("search.parameters ", nested(key, None))])  # names the nearest
        if number and int(number) not in plan.base.stages:
            raise UserError(f"search.parameters.{key}: the base has no stage {number}")
        for value in parameter.extremes():
            plan.trial_config({key: value})
