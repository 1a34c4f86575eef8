"""A small two-stage training, driven step by step, whose curve the tests compare."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cxr_dist.config.schema import Config, ModelConfig, StageConfig
from cxr_dist.data import pipeline, resident
from cxr_dist.data.arrays import ArraySource
from cxr_dist.data.batch_sampler import EvaluationBatchSampler, TrainBatchSampler
from cxr_dist.distributed.devices import Topology
from cxr_dist.distributed.precision import dtype_policy
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.model import resnet
from cxr_dist.training import train_step as steps
from cxr_dist.training.gradients import StepSpec
from cxr_dist.training.stage_state import LossScale, StageState

CLASSES = 4
SIZE = 32
BATCH = 8
IMAGES = 32


def images(count: int = IMAGES, seed: int = 0) -> ArraySource:
    """Noise with a dark band whose place tells the class: uint8 [N, 32, 32, 1]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % CLASSES
    pixels = rng.integers(60, 200, (count, SIZE, SIZE, 1))
    for index, label in enumerate(labels):
        pixels[index, 8 * label : 8 * label + 8] //= 4
    return ArraySource(pixels.astype(np.uint8), labels)


def pixels_of(source: ArraySource) -> np.ndarray:
    return source._inputs


def local_topology(replicas: int) -> Topology:
    return Topology(1, 0, "CPU", tuple(f"CPU:{index}" for index in range(replicas)))


@dataclass
class Trace:
    """What a training left to compare."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    traces: list[int] = field(default_factory=list)


def small_base(image_size: int) -> Any:
    """One residual block of ResNet50's kind, whose step compiles in a second where ResNet50's takes half a minute."""
    import keras

    layers = keras.layers

    def conv_bn(x: Any, filters: int, kernel: int, name: str, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, kernel, strides=strides, padding="same", name=f"{name}_conv")(x)
        return layers.BatchNormalization(epsilon=1.001e-5, name=f"{name}_bn")(x)

    inputs = keras.Input((image_size, image_size, 3))
    x = layers.ReLU(name="stem_relu")(conv_bn(inputs, 8, 3, "stem", strides=4))
    branch = layers.ReLU(name="block_1_relu")(conv_bn(x, 8, 1, "block_1"))
    branch = layers.ReLU(name="block_2_relu")(conv_bn(branch, 8, 3, "block_2"))
    x = layers.Add(name="block_add")([conv_bn(x, 16, 1, "block_0"), conv_bn(branch, 16, 1, "block_out")])
    x = layers.ReLU(name="block_relu")(x)
    x = layers.ReLU(name="top_relu")(conv_bn(x, resnet.FEATURES, 1, "top", strides=4))
    return keras.Model(inputs, x, name=resnet.BASE_NAME)


def config(**changes: object) -> Config:
    settings: dict[str, object] = {"weights": "none", "dropout": 0.0, "image_size": SIZE} | changes
    return Config(global_batch_size=BATCH, model=ModelConfig.model_validate(settings))


class Training:
    """One model under one strategy, trained stage by stage on `images()`."""

    def __init__(
        self,
        replicas: int = 1,
        precision: str = "float32",
        xla: bool = False,
        topology: Topology | None = None,
        make_base: Callable[[int], Any] = small_base,
        microbatches: int = 1,
        xla_update: bool = False,
        **changes: object,
    ) -> None:
        import keras

        self.config = config(**changes)
        self.topology = topology or local_topology(replicas)
        self.precision, self.xla, self.microbatches = precision, xla, microbatches
        self.xla_update = xla or xla_update
        self.strategy = make_strategy(self.topology)
        keras.utils.set_random_seed(0)
        with self.strategy.scope():
            self.model = resnet.build_model(CLASSES, SIZE, self.config, dtype_policy(precision), make_base)
        self.source = images()
        self.plan = TrainBatchSampler(self.source.count, BATCH, self.topology.replicas, seed=0)

    def poison(self, replica: int) -> None:
        """An infinite pixel in one image of `replica` at every step, and in no other replica's."""
        pixels = pixels_of(self.source).astype(np.float32)
        pixels[[self.plan.positions(step, replica)[0] for step in range(self.plan.steps_per_epoch)]] = np.inf
        self.source = ArraySource(pixels, self.source.labels)

    def stage(self, row: StageConfig, trace: Trace | None = None, loss_scale: float = 2.0**15) -> Trace:
        """Train the epochs of `row` at a constant rate and validate after each."""
        trace = trace or Trace()
        resnet.FrozenBase.of(row, self.config).apply(self.model)
        state = StageState.create(self.strategy, self.model, row, self.precision)
        self.loss_scale = LossScale.create(self.precision, loss_scale)
        spec = StepSpec(
            global_batch_size=BATCH,
            classes=CLASSES,
            seed=0,
            label_smoothing=row.label_smoothing,
            clip_norm=row.clip_norm,
            weight_decay=row.weight_decay,
            augmentation=self.config.augmentation if row.augment else None,
            accumulation_steps=self.microbatches,
            xla=self.xla,
            xla_update=self.xla_update,
        )
        table = resident.table_of(self.source)
        train_step = steps.make_train_step(self.model, replace(state, loss_scale=self.loss_scale), spec, table)
        evaluate = steps.make_evaluation_step(self.strategy, self.model, CLASSES, self.xla, table=table)
        evaluation = EvaluationBatchSampler(self.source.count, 5, self.topology.replicas)
        iterator = pipeline.distributed_batches(self.strategy, self.topology, self.source, self.plan)
        rates = np.full(self.plan.steps_per_epoch, row.learning_rate, np.float32)
        for epoch in range(row.epochs):
            # Two calls of different lengths: neither may cause another trace.
            first = epoch * len(rates)
            totals = train_step.run(iterator, first, rates[:1], np.zeros(steps.TOTALS))
            totals = train_step.run(iterator, first + 1, rates[1:], totals)
            counted = pipeline.distributed_batches(self.strategy, self.topology, self.source, evaluation)
            confusion, loss = evaluate(counted, evaluation.steps)
            assert confusion.sum() == self.source.count
            trace.losses.append(totals[steps.LOSS] / max(totals[steps.COUNT], 1))
            trace.validation.append(loss / self.source.count)
            trace.skipped.append(int(totals[steps.SKIPPED]))
        trace.traces.append(train_step.traces)
        return trace


HEAD = StageConfig(epochs=2, learning_rate=1e-3, optimizer="sgd", momentum=0.9)
UPPER = StageConfig(epochs=2, learning_rate=1e-3, optimizer="sgd", momentum=0.9, unfreeze_layers=12)


def two_stages(replicas: int = 1, precision: str = "float32", xla: bool = False, **changes: object) -> Trace:
    """Both stages on one model; the curve of all epochs."""
    training = Training(replicas, precision, xla, **changes)
    # A scale that does not overflow on the way: skipped steps are another test.
    return training.stage(UPPER, training.stage(HEAD, loss_scale=2.0**8), loss_scale=2.0**8)
