"""The one loop over stages. No Ray here: a worker of any launcher calls `train`."""

import resource
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import Config
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import Topology, hardware
from cxr_dist.model.resnet import FrozenBase, build_model, load_base_weights, name_what_older_keras_knows
from cxr_dist.runs import checkpoints, run_folder, versions
from cxr_dist.runs.checkpoint_file import Arrays
from cxr_dist.runs.events import Reporter
from cxr_dist.runs.heartbeat import HEARTBEATS, Watchdog
from cxr_dist.runs.typical_images import SAMPLE, write_typical
from cxr_dist.training.progress import Progress
from cxr_dist.training.run_checkpoints import RunCheckpoints
from cxr_dist.training.run_context import RunContext
from cxr_dist.training.stage_runner import StageRunner
from tfrecords_builder.common.files import move_durably, write_json
from tfrecords_builder.common.seal import seal_zip
from tfrecords_builder.format.manifest import Manifest


def train(
    config: Config, dataset: Path, manifest: Manifest, run: Path, topology: Topology, reporter: Reporter, launcher: str
) -> dict[str, Any]:
    """Train all stages and leave the best model; goes on from the run's newest checkpoint.

    Every worker calls this with equal arguments; the chief writes. Of the process's global state there stay changed:
    the seeds of TensorFlow and Keras and, with `config.deterministic`, TensorFlow's switch for determinism.

    Args:
        config: Resolved.
        dataset: The dataset's folder on this machine.
        manifest: The dataset's.
        run: Prepared by `run_folder.prepare`.
        topology: The devices of this process, and its place among the workers.
        reporter: Receives the run's events.
        launcher: Named in the result.

    Returns:
        What result.json holds.

    Raises:
        UserError: something in the configuration or the data that the user can mend.
    """
    with ExitStack() as stack:
        context = RunContext(config, dataset, manifest, run, topology, reporter)
        if topology.workers > 1:
            watchdog = stack.enter_context(Watchdog(run / HEARTBEATS, topology.worker, config.worker_timeout_s))
            context.heartbeat = watchdog.heartbeat
        stack.callback(context.store.close)
        kept = RunCheckpoints(context)
        progress = _train_stages(context, kept, launcher)
        return _finish(context, kept, progress, launcher)


def compute_features(
    config: Config, dataset: Path, manifest: Manifest, run: Path, topology: Topology, reporter: Reporter
) -> bool:
    """Fill the activation cache with what the first stage reads, as `train` would; nothing else.

    Args:
        config: Resolved.
        dataset: The dataset's folder on this machine.
        manifest: The dataset's.
        run: Beside which the cache lies when the configuration names no folder; not made.
        topology: The devices of this process.
        reporter: Receives the progress.

    Returns:
        Whether the stage reads from the cache; if not, nothing was computed.
    """
    context = RunContext(config, dataset, manifest, run, topology, reporter)
    with closing(context.store):
        number = next(number for number, stage in sorted(config.stages.items()) if stage.epochs)
        load_base_weights(context.model, config.model.weights)
        FrozenBase.of(config.stages[number], config).apply(context.model)
        inputs = context.stage_inputs(Progress(stage=number))
        if inputs.cached_split(number) is None:
            return False
        try:
            inputs.of(number)
        except Exception as error:
            context.raise_reading_failure(error)
            raise
        return True


def _train_stages(context: RunContext, kept: RunCheckpoints, launcher: str) -> Progress:
    """Train what the run has not trained yet; the model has the best weights then."""
    stages = context.config.stages
    if context.left_out.records:
        listed = context.run / run_folder.DAMAGED
        context.warn(f"{len(context.left_out.records)} damaged records are left out; {listed} lists them")
    progress, restored = kept.restore()
    if context.topology.is_chief:
        _record_versions(context, launcher)
    progress.add_seconds("start", time.perf_counter() - context.started)
    inputs = context.stage_inputs(progress)
    try:
        for number in sorted(stages):
            if number < progress.stage or not stages[number].epochs:
                continue
            if not progress.has_finished(number, stages[number]):
                StageRunner(number, context, kept, progress, inputs, restored).run()
            kept.restore_best()
            restored = None  # of the stage that was interrupted, and of no other
        kept.writer.wait()
    except Exception as error:
        context.raise_reading_failure(error)
        raise
    finally:
        kept.writer.close()
    return progress


def _record_versions(context: RunContext, launcher: str) -> None:
    """Add this process's versions to the run's; say which differ from those that the run was trained with."""
    changed = run_folder.record_versions(context.run, versions.made_with(hardware(context.topology.kind), launcher))
    if changed:
        context.warn(
            f"{context.run}: resumed under other versions ({', '.join(changed)}); the results may differ from those "
            "under one version"
        )


def _finish(context: RunContext, kept: RunCheckpoints, progress: Progress, launcher: str) -> dict[str, Any]:
    """Write the model and result.json; its content."""
    kept.restore_best()
    best, topology = progress.best, context.topology
    result = {
        "launcher": launcher,
        "strategy": type(context.strategy).__name__,
        "workers": topology.workers,
        "replicas": topology.replicas,
        "device": topology.kind,
        "precision": context.precision,
        "xla": context.xla,
        "parameters": int(context.model.count_params()),
        "resumed_from": kept.resumed_from,
        "steps_computed": context.steps_computed,
        "peak_memory_bytes": _peak_memory_bytes(),
        "damaged_records": len(context.left_out.records),
        "best": {
            "stage": best.stage,
            "epoch": best.epoch,
            "val_accuracy": best.val_accuracy,
            "val_loss": best.val_loss,
        },
        "images_per_second": {
            str(number): float(np.median(rates))
            for number in context.config.stages
            if (rates := [row["images_per_second"] for row in progress.history if row["stage"] == number])
        },
        "seconds": progress.seconds,
    }
    if topology.is_chief:
        # Again: a run that was stopped between a checkpoint and its history has the row in the one alone.
        run_folder.write_history(context.run, progress.history)
        with progress.timed("save"):
            _save_model(context, kept.best_arrays)
            write_typical(context.run, _sample(context.train_source))
        context.count_time(progress)
        write_json(context.run / run_folder.RESULT, result)
    context.reporter.emit({"kind": "done", "result": result})
    return result


def _save_model(context: RunContext, arrays: Arrays) -> None:
    """`model.keras` in float32, so that it runs anywhere as it is."""
    portable = build_model(context.classes, context.model.input.shape[1], context.config, "float32")
    checkpoints.restore_model(portable, arrays)
    name_what_older_keras_knows(portable)
    with tempfile.TemporaryDirectory(prefix=f".{run_folder.MODEL}.", dir=context.run) as folder:
        saved = Path(folder, run_folder.MODEL)
        portable.save(saved)
        seal_zip(saved)
        move_durably(saved, context.run / run_folder.MODEL)


def _sample(source: ShardSource) -> npt.NDArray[np.uint8]:
    """Some images of a split, always the same: uint8 [N, S, S]."""
    rows = np.random.default_rng(0).permutation(source.count)[:SAMPLE]
    return source.pixels(np.sort(rows))


def _peak_memory_bytes() -> int:
    """Of this process, resident, since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
