"""What a run takes and costs on clusters of GPUs, from the rate of one GPU: arithmetic alone.

    step   = batch / rate + all-reduce inside a machine + all-reduce between machines, or the reading if that is longer
    hours  = start + staging + epochs x (steps x step + validation) + checkpoints + interruptions
    price  = hours x machines x price of a machine-hour

Each all-reduce is a ring; see `cost_model.traffic`. Between machines it runs once a machine. Nothing of it is hidden
behind the backward pass, as here the gradient is one compiled function.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from cxr_dist.bench.cost_model import Positive, traffic
from cxr_dist.config.loading import read_yaml
from cxr_dist.config.schema import Node, first_problem
from tfrecords_builder.common.errors import UserError

FORWARD_SPEEDUP = 3
"""Of validation over training: the backward pass takes twice the operations of the forward pass."""
N = TypeVar("N", bound=Node)
Whole = Annotated[int, Field(ge=1)]


class RunPlan(Node):
    """A run, and the machines that it may have."""

    name: str
    gpus_per_machine: Whole
    machines: list[Whole] = Field(min_length=1, description="Numbers of machines to compare.")
    images_per_second: list[Positive] = Field(min_length=1, description="Rates of one GPU to compare.")
    batch_per_gpu: list[Whole] = Field(min_length=1, description="Images to compare; the last is that of the run.")
    gradient_megabytes: Positive
    image_bytes: Whole
    gpu_link_gigabytes: Positive = Field(description="Bandwidth of a GPU inside its machine per second and direction.")
    network_gigabits: Positive = Field(description="Bandwidth of a machine per second, in each direction.")
    storage_gigabytes: Positive = Field(description="Read bandwidth of a machine's own disk per second.")
    staging_gigabytes: Positive = Field(description="Bandwidth of shared storage to one machine per second.")
    training_images: Whole
    validation_images: int = Field(ge=0)
    epochs: Whole
    start_seconds: float = Field(ge=0, description="From the machines' start to the first step, without staging.")
    checkpoint_seconds: Positive
    checkpoint_overhead: Positive = Field(description="`checkpoint.max_overhead`.")
    interruptions_per_machine_hour: float = Field(ge=0, description="Of spot machines.")


class Price(Node):
    """Of a machine."""

    name: str
    usd_per_hour: Positive
    spot: bool
    gpus: Whole
    date: datetime.date
    source: str
    check_at: str


class Prices(Node):
    """The file of prices."""

    prices: list[Price] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """A training step of all GPUs."""

    machines: int
    gpus: int
    rate: float
    """Images per second of a GPU with nothing else to do."""
    batch: int
    """Images of a GPU."""
    all_reduce_seconds: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.gpus * self.batch / self.seconds

    @property
    def lost(self) -> float:
        """Share of the step in which the GPUs do not compute."""
        return 1 - self.batch / self.rate / self.seconds


@dataclass(frozen=True)
class Run:
    """Hours of a run by what they are spent on."""

    step: Step
    start: float
    """With staging."""
    training: float
    validation: float
    checkpoints: float
    interruptions: float
    """On spot machines: starts again, and work since the last checkpoint."""

    def hours(self, spot: bool) -> float:
        """The whole run."""
        always = self.start + self.training + self.validation + self.checkpoints
        return always + self.interruptions if spot else always

    def cost(self, price: Price) -> float:
        """In dollars."""
        return self.hours(price.spot) * self.step.machines * price.usd_per_hour


def read_plan(path: Path) -> RunPlan:
    """Raises UserError: the file cannot be read, or a key is missing, unknown or out of range."""
    return _read(path, RunPlan, "cluster/h100.yaml")


def read_prices(path: Path, gpus: int) -> list[Price]:
    """Of machines with so many GPUs.

    Raises:
        UserError: as `read_plan`; or no price is of such a machine.
    """
    fitting = [price for price in _read(path, Prices, "cluster/prices.yaml").prices if price.gpus == gpus]
    if not fitting:
        raise UserError(f"{path}: has no price of a machine with {gpus} GPUs; add one")
    return fitting


def step_of(plan: RunPlan, machines: int, rate: float, batch: int) -> Step:
    """The all-reduces follow the computation; reading goes on beside both."""
    gradients = int(plan.gradient_megabytes * 1e6)
    inside = traffic(plan.gpus_per_machine, gradients) / (plan.gpu_link_gigabytes * 1e9)
    between = traffic(machines, gradients) * 8 / (plan.network_gigabits * 1e9)
    reading = plan.gpus_per_machine * batch * plan.image_bytes / (plan.storage_gigabytes * 1e9)
    seconds = max(batch / rate + inside + between, reading)
    return Step(machines, machines * plan.gpus_per_machine, rate, batch, inside + between, seconds)


def run_of(plan: RunPlan, machines: int, rate: float) -> Run:
    """With the last of the plan's batches; each machine stages the whole dataset.

    Raises:
        UserError: an epoch has less than a step.
    """
    step = step_of(plan, machines, rate, plan.batch_per_gpu[-1])
    steps = plan.training_images // (step.gpus * step.batch)
    if not steps:
        raise UserError(
            f"training_images {plan.training_images}: fewer than a step of {step.gpus * step.batch:,} images"
        )
    staging = (plan.training_images + plan.validation_images) * plan.image_bytes / (plan.staging_gigabytes * 1e9)
    start = plan.start_seconds + staging
    training = plan.epochs * steps * step.seconds
    validation = plan.epochs * plan.validation_images / (step.gpus * rate * FORWARD_SPEEDUP)
    checkpoints = training * plan.checkpoint_overhead
    useful = training + validation + checkpoints
    # Of each interruption: half the time between checkpoints, and all up to a new first step, which may be interrupted
    # too: at Poisson's intervals it takes (e^(frequency x start) - 1) / frequency on average until a start succeeds.
    frequency = plan.interruptions_per_machine_hour * machines / 3600
    half = plan.checkpoint_seconds / plan.checkpoint_overhead / 2
    interrupted = useful * (frequency * half + math.expm1(frequency * start))
    return Run(step, *(part / 3600 for part in (start, training, validation, checkpoints, interrupted)))


def predict(plan: RunPlan) -> tuple[list[Step], list[Run]]:
    """Every step and every run that the plan compares."""
    pairs = [(machines, rate) for machines in plan.machines for rate in plan.images_per_second]
    steps = [step_of(plan, *pair, batch) for pair in pairs for batch in plan.batch_per_gpu]
    return steps, [run_of(plan, *pair) for pair in pairs]


def table(plan: RunPlan, steps: Sequence[Step], runs: Sequence[Run], prices: Sequence[Price]) -> list[str]:
    """Lines for people."""
    lines = [
        f"{plan.name}: all-reduce of {plan.gradient_megabytes:g} MB, {plan.network_gigabits:g} Gbit/s between machines",
        "GPUs  img/s a GPU  batch  compute ms  all-reduce ms   lost       img/s  storage GB/s",
        *(
            f"{step.gpus:4} {step.rate:12,.0f} {step.batch:6} {step.batch / step.rate * 1e3:11.1f}"
            f" {step.all_reduce_seconds * 1e3:14.1f} {step.lost:6.0%} {step.images_per_second:11,.0f}"
            f" {step.images_per_second * plan.image_bytes / 1e9:13.1f}"
            for step in steps
        ),
        "",
        f"{plan.epochs} epochs of {plan.training_images:,} images, batch {plan.batch_per_gpu[-1]} a GPU, in hours:",
        "GPUs  img/s a GPU  start  training  validation  checkpoints  interrupted"
        + "".join(f"  {price.name:>{_width(price)}}" for price in prices),
    ]
    for run in runs:
        parts = (run.start, run.training, run.validation, run.checkpoints, run.interruptions)
        shown = (f"{hours:{width}.2f}" for hours, width in zip(parts, (6, 9, 11, 12, 12), strict=True))
        costs = (f"{f'${run.cost(price):,.0f}':>{_width(price)}}" for price in prices)
        lines.append(f"{run.step.gpus:4} {run.step.rate:12,.0f} {' '.join(shown)}  {'  '.join(costs)}")
    lines += [
        f"{price.name}: ${price.usd_per_hour:,.2f} a machine-hour, {price.date}, {price.source}" for price in prices
    ]
    return lines


def _width(price: Price) -> int:
    return max(len(price.name), 8)


def _read(path: Path, kind: type[N], example: str) -> N:
    try:
        tree: Any = read_yaml(path)
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; see {example}") from None
