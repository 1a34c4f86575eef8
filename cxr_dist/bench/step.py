"""What the loop costs beside its step: images per second of `train` against a bare compiled step, taken in turns.

The bare step is the same network, optimizer, precision and compiler without anything of ours: one `tf.function` with
a forward pass, a gradient and plain Keras's update, on one batch that is on the device already. No reading, no
augmentation, no counts, no finite check, no strategy. After each epoch of `train` it runs as many steps, so both see
the same state of the machine.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_dist.bench.common import Medians, Round
from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import Topology, prepare_devices
from cxr_dist.distributed.precision import dtype_policy, resolve_precision, resolve_xla
from cxr_dist.model.resnet import FrozenBase, build_model
from cxr_dist.runs import run_folder
from cxr_dist.runs.events import Event, Reporter
from cxr_dist.training.loop import train
from tfrecords_builder.format.manifest import read_manifest


def table(rounds: Mapping[int, Sequence[Round]]) -> list[str]:
    """Lines for people: a row for each stage."""
    lines = ["stage  train img/s  bare step img/s  ratio (median of rounds)"]
    for stage, measured in rounds.items():
        row = Medians.of(measured)
        lines.append(f"{stage:5} {row.ours:12.2f} {row.baseline:16.2f}  {row.ratio:.3f} ({row.rounds})")
    return lines


def overrides(rounds: int) -> list[str]:
    """What every measured configuration has in common: enough epochs, and the whole network in each step."""
    return ["model.weights=none", "features.cache=off"] + [f"stages.{stage}.epochs={rounds + 1}" for stage in (1, 2)]


def measure(config: Config, dataset: Path, run: Path, reporter: Reporter) -> dict[int, list[Round]]:
    """By stage, what training on `dataset` in this process, on one device, takes, and bare steps between its epochs.

    The first round of a stage compiles, and is left out.

    Args:
        config: with `overrides` in it.
        run: a new folder for the run.
    """
    manifest = read_manifest(dataset)
    config = run_folder.resolve_config(config, manifest)
    topology = prepare_devices(1)
    run_folder.prepare(run, config, dataset, manifest)
    turns = _Turns(config, topology, len(manifest.class_names), reporter)
    train(config, dataset, manifest, run, topology, turns, "local")
    return {stage: rounds[1:] for stage, rounds in turns.rounds.items()}


class _Turns(Reporter):
    """A reporter that answers each epoch of `train` with as many bare steps."""

    def __init__(self, config: Config, topology: Topology, classes: int, reporter: Reporter) -> None:
        self.rounds: dict[int, list[Round]] = {}
        self._config, self._topology, self._classes, self._reporter = config, topology, classes, reporter
        self._steps = 0
        self._bare: Callable[[], Any] | None = None

    def emit(self, event: Event) -> None:
        self._reporter.emit(event)
        if event["kind"] == "stage":
            self._steps = event["steps_per_epoch"]
            self._bare = bare_step(self._config, self._topology, self._classes, event["stage"])
        elif event["kind"] == "epoch" and self._bare is not None:
            row, images = event["row"], self._steps * self._config.global_batch_size
            started = time.perf_counter()
            for _ in range(self._steps):
                loss = self._bare()
            loss.numpy()
            pair = Round(images / row["seconds"], images / (time.perf_counter() - started))
            self.rounds.setdefault(row["stage"], []).append(pair)


def bare_step(config: Config, topology: Topology, classes: int, stage: int) -> Callable[[], Any]:
    """A function of nothing that runs one compiled step and returns its loss, a scalar tensor."""
    import keras
    import tensorflow as tf

    size, batch_size = config.model.image_size, config.global_batch_size
    if size is None:
        raise ValueError("the configuration was not resolved")
    row = config.stages[stage]
    policy = dtype_policy(resolve_precision(config.precision, topology.kind))
    model = build_model(classes, size, config, policy)
    FrozenBase.of(row, config).apply(model)
    optimizer = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[
        row.optimizer
    ](row.learning_rate)
    optimizer.build(model.trainable_variables)
    images = tf.random.stateless_uniform((batch_size, size, size, 1), (0, stage), 0.0, 255.0)
    labels = tf.range(batch_size) % classes

    @tf.function(jit_compile=resolve_xla(config))
    def step() -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return step
