"""How long a training step takes on a number of workers, from a few measured steps.

    step = fixed + seconds per image * images of a replica / its share of a device
         + 2 (n - 1) / n * bytes of the trained gradients / bandwidth

A ring all-reduce of G bytes over n replicas sends and receives 2 (n - 1) / n G bytes at each of them (Patarasuk and
Yuan 2009). Workers of one machine without GPUs share its cores: each has a share of the device. Input is read while the
step before computes, so a step takes as long as the slower of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from cxr_dist.config.loading import read_yaml
from cxr_dist.config.schema import Node, first_problem
from tfrecords_builder.common.errors import UserError


@dataclass(frozen=True)
class Measured:
    """A stage on some workers."""

    stage: int
    workers: int
    global_batch_size: int
    images_per_second: float
    trainable_parameters: int
    device: str
    """CPU, which the workers share, or GPU, of which each has its own."""

    @property
    def step_seconds(self) -> float:
        return self.global_batch_size / self.images_per_second

    @property
    def share(self) -> float:
        """Of a device that each worker has."""
        return 1 / self.workers if self.device == "CPU" else 1.0

    @property
    def gradient_bytes(self) -> int:
        """Gradients are summed in float32."""
        return 4 * self.trainable_parameters


@dataclass(frozen=True)
class CostModel:
    """Of one stage on one kind of device."""

    fixed_seconds: float
    """Of a step, whatever its batch."""
    seconds_per_image: float
    """Of one device with nothing else to do."""
    seconds_per_byte: float
    """Of all-reduce traffic, in and out of one replica."""
    gradient_bytes: int

    def step_seconds(self, replicas: int, global_batch_size: int, share: float = 1.0) -> float:
        """Compute and all-reduce, one after the other: no part of the gradient is sent before all of it is there."""
        compute = self.seconds_per_image * global_batch_size / replicas / share
        return self.fixed_seconds + compute + self.seconds_per_byte * traffic(replicas, self.gradient_bytes)


def traffic(replicas: int, gradient_bytes: int) -> float:
    """Bytes in and out of each replica in a ring all-reduce."""
    return 2 * (replicas - 1) / replicas * gradient_bytes


def fit(points: Sequence[Measured]) -> CostModel:
    """Least squares of relative errors, no cost below zero; of points of one stage.

    Raises:
        ValueError: fewer than two points.
    """
    from scipy.optimize import nnls

    if len(points) < 2:
        raise ValueError(f"{len(points)} points do not determine a model")
    seconds, gradient_bytes = np.array([point.step_seconds for point in points]), points[0].gradient_bytes
    columns = np.array(
        [
            [1.0, point.global_batch_size / point.workers / point.share, traffic(point.workers, gradient_bytes)]
            for point in points
        ]
    )
    # Columns of like size: bytes are counted in millions, and nnls stops at absolute tolerances.
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0
    costs, _ = nnls(columns / scale / seconds[:, None], np.ones(len(points)))
    fixed, image, byte = costs / scale
    return CostModel(float(fixed), float(image), float(byte), gradient_bytes)


def errors(model: CostModel, points: Sequence[Measured]) -> list[float]:
    """By how much the model is off at each point, as a share of what was measured; of points that it was fitted to."""
    return [
        model.step_seconds(point.workers, point.global_batch_size, point.share) / point.step_seconds - 1
        for point in points
    ]


def held_out_errors(points: Sequence[Measured]) -> list[float]:
    """At each point, by how much a model is off that was fitted to all the others: what a prediction may be off by."""
    others = ([*points[:place], *points[place + 1 :]] for place in range(len(points)))
    return [errors(fit(rest), [point])[0] for rest, point in zip(others, points, strict=True)]


Positive = Annotated[float, Field(gt=0)]


class Cluster(Node):
    """Machines alike, as they are rented."""

    name: str
    machines: int = Field(ge=1)
    devices_per_machine: int = Field(1, ge=1)
    relative_speed: Positive = Field(
        description="Speed of a device, relative to the measured one; measure both with `cxr-dist bench step`."
    )
    network_gigabits: Positive = Field(description="Network bandwidth of a machine per second, in each direction.")
    storage_gigabytes: Positive = Field(description="Read bandwidth of a machine per second.")
    price_per_machine_hour: float = Field(0.0, ge=0)
    batch_per_device: int = Field(32, ge=1)


@dataclass(frozen=True)
class Prediction:
    """Of one stage on some of a cluster's machines."""

    machines: int
    replicas: int
    images_per_second: float
    limit: str
    """What takes most of a step: compute, all-reduce or input."""
    hours: float
    """Of an epoch."""
    cost: float
    """Of an epoch, in the currency of the price."""


def read_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes.

    Raises:
        UserError: the file cannot be read, or a key is missing, unknown or out of range.
    """
    try:
        return Cluster.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; see cluster/example.yaml") from None


def predict(model: CostModel, cluster: Cluster, machines: int, images: int, bytes_per_image: int) -> Prediction:
    """An epoch of `images` images on `machines` of the cluster's, each replica with its `batch_per_device`.

    What a step costs whatever its batch, mostly the update of the weights, is taken to be as much faster as the rest,
    and the all-reduce inside a machine to cost nothing beside the network between machines.
    """
    replicas = machines * cluster.devices_per_machine
    batch = cluster.batch_per_device
    compute = (model.fixed_seconds + model.seconds_per_image * batch) / cluster.relative_speed
    all_reduce = traffic(machines, model.gradient_bytes) * 8 / (cluster.network_gigabits * 1e9)
    reading = batch * cluster.devices_per_machine * bytes_per_image / (cluster.storage_gigabytes * 1e9)
    step = max(compute + all_reduce, reading)
    parts = {"compute": compute, "all-reduce": all_reduce, "input": reading if reading == step else 0.0}
    rate = replicas * batch / step
    hours = images / rate / 3600
    return Prediction(
        machines,
        replicas,
        rate,
        max(parts, key=lambda name: parts[name]),
        hours,
        hours * machines * cluster.price_per_machine_hour,
    )
