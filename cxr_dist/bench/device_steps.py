"""The measurements of `bench device`, each in a process of its own, as each needs the device's memory to itself.

python -m cxr_dist.bench.device_steps REQUEST.json ANSWER.json
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cxr_dist.bench import common, step
from cxr_dist.bench.common import Medians
from cxr_dist.config.loading import load_config, resolve_preset
from cxr_dist.config.schema import Config
from cxr_dist.data.batch_sampler import TrainBatchSampler
from cxr_dist.data.pipeline import worker_batches
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import DeviceKind, Topology, gpu_memory_bytes, hardware, prepare_devices
from cxr_dist.runs import run_folder
from cxr_dist.runs.events import Event, Reporter
from cxr_dist.runs.versions import made_with
from cxr_dist.training.loop import train
from tfrecords_builder.common.files import write_json
from tfrecords_builder.format.manifest import Manifest, read_manifest

WHOLE_BASE, PUBLISHED_LAYERS = 175, 100
"""Layers of ResNet50 that train."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One measurement."""

    step: str
    """A key of STEPS."""
    dataset: str
    work: str
    """An empty folder."""
    batch_size: int
    epochs: int
    """Measured; one more, which compiles, comes before them."""
    overrides: tuple[str, ...] = ()
    """Of the configuration."""
    source: str | None = None
    """Labelled X-rays, for `published` and `adamw`."""
    weights: str | None = None
    """Of the base, for these and `two_devices`."""


class _Log(Reporter):
    """Keeps when features were computed."""

    def __init__(self) -> None:
        self.features: list[tuple[float, int]] = []
        """Time in seconds, and images that are done, of one split."""

    def emit(self, event: Event) -> None:
        if event["kind"] == "progress" and event["epoch"] == "features":
            if self.features and event["step"] < self.features[-1][1]:
                return  # the next split
            self.features.append((time.perf_counter(), event["step"]))

    @property
    def features_per_second(self) -> float | None:
        """Without the first batch, which compiles."""
        if len(self.features) < 2:
            return None
        (started, before), (ended, done) = self.features[0], self.features[-1]
        return (done - before) / (ended - started)


def describe(request: Request) -> Figures:
    """What computes, and versions."""
    import tensorflow as tf

    topology = prepare_devices(1)
    figures: Figures = hardware(topology.kind) | made_with({}, "ray") | {"cores": len(os.sched_getaffinity(0))}
    if topology.kind == "GPU":
        details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
        figures["compute_capability"] = ".".join(map(str, details.get("compute_capability", ())))
        figures["memory_gb"] = round(gpu_memory_bytes() / 1e9, 1)
    return figures


def whole_network(request: Request) -> Figures:
    """The whole base from random weights, from images; beside the bare compiled step."""
    return _beside_bare_step(request, WHOLE_BASE)


def upper_layers(request: Request) -> Figures:
    """Stage 2 with the published depth, from images; beside the bare compiled step."""
    return _beside_bare_step(request, PUBLISHED_LAYERS)


def upper_layers_cached(request: Request) -> Figures:
    """Stage 2 with the published depth, from kept activations of the layers below."""
    changes = ["features.cache=on", "features.cache_activations=on", f"stages.2.unfreeze_layers={PUBLISHED_LAYERS}"]
    return _trained(request, 2, [*changes, "stages.2.augment=false", "input.device_memory_gb=16"])


def frozen_base(request: Request) -> Figures:
    """Stage 1 from images: a forward pass and the head."""
    return _trained(request, 1, ["features.cache=off"])


def head(request: Request) -> Figures:
    """Stage 1 from kept features, and the pass that computes them."""
    return _trained(request, 1, ["features.cache=on"])


def two_devices(request: Request) -> Figures:
    """Largest difference of an epoch's loss between two logical devices and one, with equal global batch in float32."""
    import tensorflow as tf

    names: tuple[str, ...]
    gpus = tf.config.list_physical_devices("GPU")
    kind: DeviceKind = "GPU" if gpus else "CPU"
    if gpus:
        limit = int(0.4 * gpu_memory_bytes() / 2**20)
        tf.config.set_logical_device_configuration(gpus[0], [tf.config.LogicalDeviceConfiguration(limit)] * 2)
        # Else float32 is rounded to 10 bits, in another order on two devices.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        names = ("GPU:0", "GPU:1")
    else:
        names = prepare_devices(2).devices
    changes = ["precision=float32", "model.dropout=0", "stages.2.optimizer=sgd", "stages.2.schedule=constant"]
    changes += [f"stages.2.unfreeze_layers={PUBLISHED_LAYERS}", "features.cache=off"]
    if request.weights:
        changes += [f"model.weights={request.weights}", "model.batch_norm=inference"]
    else:  # Statistics of random weights are no use, and those of a replica's own batch are others on two.
        changes += ["model.synchronize_batch_norm=true"]
    losses = []
    for count in (1, 2):
        topology = Topology(1, 0, kind, names[:count])
        history = _run(request, _config(request, 2, changes), topology, _Log(), f"devices-{count}")
        losses.append([row["loss"] for row in history])
    difference = max(abs(first - second) for first, second in zip(*losses, strict=True))
    return {"losses": losses, "largest_difference": difference}


def input_alone(request: Request) -> Figures:
    """The batches of the training split from the host's memory, over as many passes as there are epochs."""
    topology, manifest = prepare_devices(1), read_manifest(Path(request.dataset))
    source = ShardSource(Path(request.dataset), manifest, "train").in_memory(1 << 40)
    plan = TrainBatchSampler(source.count, request.batch_size, 1, seed=0)
    batches = iter(worker_batches(source, plan, first_replica=0, local_replicas=1))
    rates = []
    for _ in range(request.epochs + 1):
        started = time.perf_counter()
        for _ in range(plan.steps_per_epoch):
            next(batches)
        rates.append(plan.steps_per_epoch * request.batch_size / (time.perf_counter() - started))
    return {"images_per_second": median(rates[1:])} | hardware(topology.kind)


def published(request: Request) -> Figures:
    """The whole recipe on X-rays: build, train, evaluate."""
    return _recipe(request, "published")


def adamw(request: Request) -> Figures:
    """The longer recipe, likewise."""
    return _recipe(request, "adamw")


STEPS: dict[str, Callable[[Request], Figures]] = {
    function.__name__: function
    for function in (
        describe,
        whole_network,
        upper_layers,
        upper_layers_cached,
        frozen_base,
        head,
        input_alone,
        two_devices,
        published,
        adamw,
    )
}


def _recipe(request: Request, preset: str) -> Figures:
    """Of the commands, start-up included; in processes of their own."""
    work, started = Path(request.work), time.perf_counter()
    common.command(["build", str(request.source), str(work / "dataset"), "--image-size", str(common.IMAGE_SIZE)], [])
    built = time.perf_counter()
    settings = [f"model.weights={request.weights}", *request.overrides]
    run = common.train(work / "dataset", work / "run", ["--config", preset, "--launcher", "local"], settings)
    trained = time.perf_counter()
    common.command(["evaluate", str(work / "run"), "--out", str(work / "evaluation")], [])
    metrics = json.loads((work / "evaluation" / "metrics.json").read_bytes())
    best = run.result["best"]
    of_best = next(row for row in run.history if (row["stage"], row["epoch"]) == (best["stage"], best["epoch"]))
    return {
        "total_seconds": time.perf_counter() - started,
        "trained_seconds": trained - started,
        "best_seconds": built - started + of_best["run_seconds"],
        "val_accuracy": best["val_accuracy"],
        "accuracy": metrics["accuracy"],
        "interval": metrics["uncertainty"]["intervals"]["accuracy"],
        "images_per_second_by_stage": run.result["images_per_second"],
    }


def _beside_bare_step(request: Request, layers: int) -> Figures:
    changes = ["features.cache=off", f"stages.2.unfreeze_layers={layers}", "stages.2.augment=false"]
    config, run = _config(request, 2, changes), Path(request.work, "run")
    rounds = step.measure(config, Path(request.dataset), run, _Log())[2]
    medians = Medians.of(rounds)
    figures = _of_history(run_folder.read_history(run))
    return figures | {"images_per_second": medians.ours, "bare": medians.baseline, "ratio": medians.ratio}


def _trained(request: Request, stage: int, changes: list[str]) -> Figures:
    log = _Log()
    history = _run(request, _config(request, stage, changes), prepare_devices(1), log, "run")
    features = log.features_per_second
    return _of_history(history) | ({} if features is None else {"features_per_second": features})


def _config(request: Request, stage: int, changes: list[str]) -> Config:
    """Of a run of one stage."""
    epochs = [f"stages.{number}.epochs={request.epochs + 1 if number == stage else 0}" for number in (1, 2)]
    common = ["model.weights=none", f"global_batch_size={request.batch_size}", "stages.2.early_stopping=null"]
    folder = f"features.folder={Path(request.work, 'features')}"
    return load_config(resolve_preset(Path("published")), [*common, folder, *epochs, *changes, *request.overrides])


def _run(request: Request, config: Config, topology: Topology, reporter: Reporter, name: str) -> list[Figures]:
    dataset, run = Path(request.dataset), Path(request.work, name)
    manifest: Manifest = read_manifest(dataset)
    config = run_folder.resolve_config(config, manifest)
    run_folder.prepare(run, config, dataset, manifest)
    train(config, dataset, manifest, run, topology, reporter, "local")
    return run_folder.read_history(run)


def _of_history(history: list[Figures]) -> Figures:
    """Medians over the epochs but the first, which compiles."""
    import tensorflow as tf

    later = history[1:]
    seconds = median(row["seconds"] for row in later)
    figures = {
        "images_per_second": median(row["images_per_second"] for row in later),
        "input_wait": median(row["input_wait"] for row in later),
        "compile_seconds": history[0]["seconds"] - seconds,
    }
    if tf.config.list_physical_devices("GPU"):
        figures["memory_gb"] = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e9
    return figures


def main() -> None:
    request_file, answer = map(Path, sys.argv[1:])
    request = Request(**json.loads(request_file.read_text(encoding="utf-8")))
    write_json(answer, STEPS[request.step](request))


def save(request: Request, path: Path) -> None:
    """For `main`."""
    write_json(path, asdict(request))


if __name__ == "__main__":
    main()
