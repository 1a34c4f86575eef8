"""The one loop over stages and epochs. No Ray here: a worker of any launcher calls `train`."""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.data import pipeline
from cxr_dist.data.arrays import Source
from cxr_dist.data.batch_sampler import EvaluationPlan, TrainingPlan
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed import collectives
from cxr_dist.distributed.devices import Topology, hardware
from cxr_dist.distributed.precision import dtype_policy, resolve_precision, resolve_xla
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.evaluation.metrics import counts_metrics
from cxr_dist.features import cache
from cxr_dist.features.stage_inputs import StageInputs
from cxr_dist.features.store import FeatureStore
from cxr_dist.model.resnet import (
    base_of,
    build_model,
    load_base_weights,
    name_what_older_keras_knows,
    set_trainable,
    trains_base_batch_norm,
)
from cxr_dist.runs import checkpoints, corrupt_records, heartbeat, run_folder, versions
from cxr_dist.runs.checkpoint_writer import Keeper
from cxr_dist.runs.events import Reporter
from cxr_dist.runs.stop_request import StoppedError, StopRequest
from cxr_dist.training import schedules, train_step as steps
from cxr_dist.training.progress import Best, Progress
from cxr_dist.training.stage_state import StageState
from cxr_dist.training.steps_per_call import FixedLengths, Pace
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import move_durably, write_json
from tfrecords_builder.format.manifest import Manifest, read_manifest


def train(
    config: Config,
    dataset: Path,
    run: Path,
    topology: Topology,
    reporter: Reporter,
    launcher: str,
    manifest: Manifest | None = None,
) -> dict[str, Any]:
    """Train all stages and leave the best model; goes on from the run's newest checkpoint.

    Every worker calls this with equal arguments; the chief writes. The folder was prepared by
    `run_folder.prepare`, and `config` is resolved. Of the process's global state there stay changed: the seeds of
    TensorFlow and Keras and, with `schema.deterministic`, TensorFlow's switch for deterministic operations.

    Args:
        manifest: The dataset's, where the caller has read it.

    Returns:
        What result.json holds.

    Raises:
        UserError: something in the configuration or the data that the user can mend.
    """
    with ExitStack() as held:
        beat: Callable[[str], None] = _ignore
        if topology.workers > 1:
            folder = run / heartbeat.HEARTBEATS
            beat = held.enter_context(heartbeat.Watchdog(folder, topology.worker, config.worker_timeout_s)).heartbeat
        one = _Run(config, dataset, run, topology, reporter, launcher, beat, manifest)
        held.callback(one.store.close)
        return one.execute()


def _peak_memory_bytes() -> int:
    """Of this process, resident, since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ignore(_where: str) -> None:
    pass


def compute_features(config: Config, dataset: Path, run: Path, topology: Topology, reporter: Reporter) -> bool:
    """Put what the first stage reads of the frozen part into the feature cache, as `train` would; nothing else.

    Args:
        run: Beside which the cache lies when the configuration names no folder; not made.

    Returns:
        Whether the stage reads from the cache; if not, nothing was computed.
    """
    one = _Run(config, dataset, run, topology, reporter, "")
    with closing(one.store):
        return one.fill_cache()


@dataclass(frozen=True)
class _Stage:
    """A stage in progress."""

    number: int
    first_step: int
    """Of the stage, counted over all stages."""
    rates: npt.NDArray[np.float32]
    """Of every step of the stage."""
    state: StageState
    train_step: steps.TrainStep
    batches: Any
    pace: Pace
    evaluation: EvaluationPlan
    evaluation_step: Callable[[Any, int], tuple[npt.NDArray[np.int64], float]]
    evaluation_batches: Any
    evaluation_steps_per_call: int

    def epoch_steps(self, epoch: int, steps_per_epoch: int) -> tuple[int, npt.NDArray[np.float32]]:
        """The first step of an epoch, counted over all stages, and the rates of its steps."""
        first = epoch * steps_per_epoch
        return self.first_step + first, self.rates[first : first + steps_per_epoch]


class _Run:
    """The state of one call of `train`, so that its parts need no long argument lists."""

    def __init__(
        self,
        config: Config,
        dataset: Path,
        run: Path,
        topology: Topology,
        reporter: Reporter,
        launcher: str,
        beat: Callable[[str], None] = _ignore,
        manifest: Manifest | None = None,
    ) -> None:
        import tensorflow as tf

        self.started = self.counted = time.perf_counter()
        self.config, self.run, self.topology = config, run, topology
        self.reporter, self.launcher, self.beat = reporter, launcher, beat
        self.stop = StopRequest(run)
        self.folder = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS, config.checkpoint.keep)
        self.keeper = Keeper(config.checkpoint, warn=self._warn)
        self.waiting_told = False
        self.progress = Progress()
        self.best_arrays: checkpoints.Arrays = {}
        self.resumed_from: str | None = None
        self.steps_computed = 0

        self.precision = resolve_precision(config.precision, topology.kind)
        self.xla = resolve_xla(config, topology.kind)
        manifest = manifest or read_manifest(dataset)
        self.classes = len(manifest.class_names)
        self.left_out = corrupt_records.load_excluded(run)
        self.train_source = ShardSource(dataset, manifest, "train", self.left_out.paths)
        self.validation_source = ShardSource(dataset, manifest, "validation", self.left_out.paths)
        self.plan = TrainingPlan(
            self.train_source.count,
            config.global_batch_size,
            topology.replicas,
            config.seed,
            parts=config.accumulation_steps,
        )

        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = make_strategy(topology, config.all_reduce)
        with self.strategy.scope():
            policy = dtype_policy(self.precision)
            self.model = build_model(self.classes, manifest.image_size, config, policy, seed=config.seed)
        self.iterators: list[Any] = []
        self.store = FeatureStore(run_folder.feature_cache(config, run), int(config.features.limit_gb * 1e9))
        frozen = cache.FrozenFeatures(
            config,
            self.strategy,
            topology,
            self.store,
            precision=self.precision,
            xla=self.xla,
            progress=self._report_features,
            waiting=self._wait_for_features,
        )
        content = self.left_out.fingerprint(manifest.fingerprint)
        self.inputs = StageInputs(
            config,
            self.model,
            frozen,
            cache.SplitImages(content, "train", self.train_source),
            cache.SplitImages(content, "validation", self.validation_source),
            announce=self._announce,
            timed=lambda phase: self.progress.timed(phase),
            decided=lambda: self.progress.kept_cuts,
        )

    def execute(self) -> dict[str, Any]:
        if self.left_out.records:
            listed = self.run / run_folder.DAMAGED
            self._warn(f"{len(self.left_out.records)} damaged records are left out; {listed} lists them")
        arrays = self._restore()
        if self.topology.is_chief:
            self._record_versions()
        self.progress.seconds["start"] = self.progress.seconds.get("start", 0.0) + time.perf_counter() - self.started
        try:
            for number in sorted(self.config.stages):
                if number < self.progress.stage or not self.config.stages[number].epochs:
                    continue
                if not self._is_finished(number):
                    self._run_stage(self._begin_stage(number, self.config.stages[number], arrays))
                self._restore_best()
                arrays = None  # of the stage that was interrupted, and of no other
            self.keeper.wait()
        except Exception as error:
            self._raise_reading_failure(error)
            raise
        finally:
            self.keeper.close()
        return self._finish()

    def fill_cache(self) -> bool:
        """Compute the inputs of the first stage that has epochs."""
        number = next(number for number, stage in sorted(self.config.stages.items()) if stage.epochs)
        stage = self.config.stages[number]
        load_base_weights(self.model, self.config.model.weights)
        set_trainable(self.model, stage.unfreeze_layers, trains_base_batch_norm(self.config))
        if self.inputs.cut_of(number) is None:
            return False
        self.progress.stage = number
        try:
            self.inputs.of(number)
        except Exception as error:
            self._raise_reading_failure(error)
            raise
        return True

    # -- stages ---------------------------------------------------------------------------------

    def _run_stage(self, stage: _Stage) -> None:
        while not self._is_finished(stage.number):
            row = self._train_epoch(stage)
            with self.progress.timed("validation"):
                row |= self._evaluate(stage)
            self._count_time()
            row["run_seconds"] = self.progress.seconds["total"]
            self._end_epoch(row, stage.state)
            if self._is_finished(stage.number) or self.keeper.is_due(0):
                self._keep(stage.state)
            self.reporter.emit({"kind": "epoch", "row": row})
        self.keeper.wait()

    def _begin_stage(self, number: int, settings: StageConfig, restored: checkpoints.Arrays | None) -> _Stage:
        """Make all that the stage needs, as it stands at the run's progress.

        Args:
            restored: Of a checkpoint within this stage, whose weights the model has.
        """
        config, plan = self.config, self.plan
        if self.progress.stage != number:
            self.progress.stage, self.progress.epoch, self.progress.epochs_without_gain = number, 0, 0
        set_trainable(self.model, settings.unfreeze_layers, trains_base_batch_norm(config))
        inputs = self.inputs.of(number)
        state = StageState.create(self.strategy, self.model, settings, self.precision)
        if restored is not None:
            with checkpoints.fitting(self._resumed_path):
                state.restore(restored)
        train_step = steps.make_train_step(
            self.strategy,
            inputs.network,
            state.optimizer,
            settings,
            global_batch_size=config.global_batch_size,
            classes=self.classes,
            seed=config.seed,
            augmentation=config.augmentation if settings.augment and not inputs.from_cut else None,
            class_weights=(
                schedules.class_weights(self.train_source.labels, self.classes) if settings.class_weights else None
            ),
            loss_scale=state.loss_scale,
            xla=self.xla,
            accumulation_steps=config.accumulation_steps,
            measure_wait=not config.deterministic,
            average=state.average,
        )
        # Counted from the planned ends of earlier stages, so that an early stop changes no later order.
        first_step = sum(config.stages[earlier].epochs for earlier in range(1, number)) * plan.steps_per_epoch
        start = first_step + self.progress.epoch * plan.steps_per_epoch + self.progress.step
        lengths = FixedLengths.of(self.topology.kind, head_alone=inputs.from_cut and not settings.unfreeze_layers)
        # A part of a step, as more may not fit in the replica's memory.
        evaluation = EvaluationPlan(inputs.validation.count, plan.batch_size // plan.parts, self.topology.replicas)
        return _Stage(
            number=number,
            first_step=first_step,
            rates=schedules.learning_rates(settings, plan.steps_per_epoch),
            state=state,
            train_step=train_step,
            batches=self._batches(inputs.train, replace(plan, views=inputs.train.count // plan.count), start),
            pace=Pace(lengths.training if self.topology.workers > 1 else None),
            evaluation=evaluation,
            evaluation_step=steps.make_evaluation_step(
                self.strategy, inputs.network, self.classes, self.xla, state.average
            ),
            evaluation_batches=self._batches(inputs.validation, evaluation),
            evaluation_steps_per_call=lengths.validation,
        )

    def _train_epoch(self, stage: _Stage) -> dict[str, Any]:
        """Train to the end of the epoch that the progress is in.

        Returns:
            Its row of the history, without validation.
        """
        progress, pace = self.progress, stage.pace
        first_step, rates = stage.epoch_steps(progress.epoch, self.plan.steps_per_epoch)
        started = time.perf_counter()
        pace.start_epoch()
        while progress.step < len(rates):
            done = progress.step
            due = self.keeper.steps_until_due(done) or len(rates)
            count = min(pace.steps_per_call, len(rates) - done, due)
            begun = time.perf_counter()
            totals = stage.train_step.run(
                stage.batches, first_step + done, rates[done : done + count], np.array(progress.totals)
            )
            spent = time.perf_counter() - begun
            pace.record(count, spent)
            self._count_steps(stage.number, count, totals, spent)
            self._check_finite(stage.number)
            self.beat(f"stage {stage.number}, epoch {progress.epoch + 1}, step {progress.step}")
            self._end_if_asked(stage.state)
            if progress.step < len(rates) and self.keeper.is_due(progress.step):
                self._keep(stage.state)
            self.reporter.emit(
                {
                    "kind": "progress",
                    "stage": stage.number,
                    "epoch": progress.epoch + 1,
                    "step": progress.step,
                    "steps": len(rates),
                    "images_per_second": pace.steps_per_second * self.config.global_batch_size,
                }
            )
        # Resumed after its last step, an epoch has none of this process's to measure.
        steps_per_second = pace.steps_per_second or len(rates) / progress.seconds_in_steps
        return self._row(stage.number, float(rates[-1]), steps_per_second, time.perf_counter() - started)

    def _count_steps(self, number: int, count: int, totals: npt.NDArray[np.float64], spent: float) -> None:
        """Take `count` steps of `spent` seconds into the progress, after which the epoch's sums are `totals`."""
        progress = self.progress
        progress.totals, progress.step = totals.tolist(), progress.step + count
        progress.seconds_in_steps += spent
        progress.seconds[f"stage_{number}"] = progress.seconds.get(f"stage_{number}", 0.0) + spent
        self.steps_computed += count

    def _row(self, number: int, rate: float, steps_per_second: float, seconds: float) -> dict[str, Any]:
        progress, total = self.progress, self.progress.totals
        images = total[steps.COUNT]
        if not images:
            raise self._diverged(number, "no step was finite")
        return {
            "stage": number,
            "epoch": progress.epoch + 1,
            "epochs_done": progress.epochs_done + 1,
            "loss": total[steps.LOSS] / images,
            "accuracy": total[steps.CORRECT] / images,
            "learning_rate": rate,
            "skipped_steps": int(total[steps.SKIPPED] - total[steps.OVERFLOWED]),
            "overflowed_steps": int(total[steps.OVERFLOWED]),
            "trainable_parameters": sum(int(np.prod(v.shape)) for v in self.model.trainable_variables),
            "input_wait": None if self.config.deterministic else total[steps.WAITED] / progress.seconds_in_steps,
            "images_per_second": steps_per_second * self.config.global_batch_size,
            "seconds": seconds,
        }

    def _check_finite(self, number: int) -> None:
        """End a run whose steps are lost to non-finite numbers, and say where."""
        totals = self.progress.totals
        skipped = int(totals[steps.SKIPPED] - totals[steps.OVERFLOWED])
        if skipped > self.config.max_skipped_steps:
            raise self._diverged(number, f"{skipped} steps had a loss or gradient that is not finite")

    def _diverged(self, number: int, what: str) -> UserError:
        return UserError(
            f"training diverged: {what} in stage {number}, epoch {self.progress.epoch + 1}, until step "
            f"{self.progress.step}; lower stages.{number}.learning_rate"
        )

    def _evaluate(self, stage: _Stage) -> dict[str, float]:
        """The validation's part of an epoch's row."""
        confusion, loss = np.zeros([self.classes] * 2, np.int64), 0.0
        planned, at_once = stage.evaluation, stage.evaluation_steps_per_call
        for first in range(0, planned.steps, at_once):
            part = stage.evaluation_step(stage.evaluation_batches, min(at_once, planned.steps - first))
            confusion, loss = confusion + part[0], loss + part[1]
            self.beat(f"the validation after epoch {self.progress.epoch + 1} of the stage, step {first}")
            self._end_if_asked(stage.state)
        if confusion.sum() != planned.count:
            raise RuntimeError(f"{confusion.sum()} images were counted, of {planned.count}")
        measured = {f"val_{key}": value for key, value in counts_metrics(confusion).items()}
        return {"val_loss": loss / planned.count, **measured}

    def _is_finished(self, number: int) -> bool:
        """Whether the current stage is `number` and has done its epochs or stops early."""
        stage, progress = self.config.stages[number], self.progress
        if progress.stage != number:
            return False
        stops = stage.early_stopping is not None and progress.epochs_without_gain >= stage.early_stopping
        return progress.epoch >= stage.epochs or stops

    # -- inputs ---------------------------------------------------------------------------------

    def _batches(self, source: Source, plan: TrainingPlan | EvaluationPlan, start_step: int = 0) -> Any:
        """An endless iterator, kept until the run ends: making and destroying one costs seconds."""
        iterator = pipeline.distributed_batches(self.strategy, self.topology, source, plan, start_step)
        self.iterators.append(iterator)
        return iterator

    def _report_features(self, done: int, total: int, images_per_second: float) -> None:
        self.beat(f"the features, image {done}")
        self.reporter.emit(
            {"kind": "progress", "stage": self.progress.stage, "epoch": "features", "step": done, "steps": total}
            | {"images_per_second": images_per_second}
        )

    # -- what is kept ---------------------------------------------------------------------------

    def _end_epoch(self, row: dict[str, Any], state: StageState) -> None:
        progress = self.progress
        if not np.isfinite(row["val_loss"]):
            raise self._diverged(row["stage"], "the validation loss is not finite")
        row["best"] = progress.best.is_beaten_by(row)
        progress.epoch, progress.epochs_done = row["epoch"], row["epochs_done"]
        progress.step, progress.totals, progress.seconds_in_steps = 0, [0.0] * steps.TOTALS, 0.0
        progress.epochs_without_gain = 0 if row["best"] else progress.epochs_without_gain + 1
        progress.history.append(row)
        if row["best"]:
            progress.best = Best(**{known.name: row[known.name] for known in fields(Best)})
            self.best_arrays = state.evaluated_arrays()
        if self.topology.is_chief:
            run_folder.write_history(self.run, progress.history)

    def _keep(self, state: StageState) -> None:
        """Begin to write a checkpoint of this moment; the chief alone does."""
        if not self.topology.is_chief:
            return
        with self.progress.timed("checkpoint"):
            self._count_time()
            # All of it as it is now: it is written while the training goes on.
            position, progress = self.progress.position, asdict(self.progress)
            arrays, best, best_arrays = state.arrays(), self.progress.best.epochs_done, self.best_arrays
            self.keeper.write(lambda: self.folder.save(position, arrays, progress, best, best_arrays))

    def _end_if_asked(self, state: StageState) -> None:
        """The chief ends the run at once when it was asked to; the other workers end with it."""
        if not (self.topology.is_chief and self.stop.is_made()):
            return
        self._keep(state)
        self.keeper.wait()
        kind = self.stop.take() or StoppedError
        raise kind(f"{self.run}: stopped, with a checkpoint; start the same command again to resume")

    def _restore(self) -> checkpoints.Arrays | None:
        """Load the newest checkpoint, or the pretrained weights of a new run.

        All workers take the chief's: what they read meanwhile may have changed.
        """
        found = None
        if self.topology.is_chief:
            self.folder.clean()
            found = self.folder.newest(self._warn, set_aside=True)
        position = found[0] if found else checkpoints.Position(-1)
        epochs_done, step = collectives.chiefs(self.strategy, self.topology, (position.epochs_done, position.step))
        if epochs_done < 0:
            load_base_weights(self.model, self.config.model.weights)
            if self.topology.is_chief:
                self.folder.start_from(checkpoints.model_arrays(base_of(self.model)))
            return None
        position = checkpoints.Position(epochs_done, step)
        arrays, state = found[1:] if found else self.folder.load(position)
        self.resumed_from = position.file_name
        with checkpoints.fitting(self._resumed_path):
            state.pop("best_epochs_done")
            checkpoints.restore_model(self.model, arrays)
            self.progress = Progress.of_state(state)
        if self.progress.best.epochs_done:
            self.best_arrays = self.folder.load_best(self.progress.best.epochs_done)
        self.reporter.emit({"kind": "message", "text": f"going on from {self._resumed_path}"})
        return arrays

    @property
    def _resumed_path(self) -> Path:
        return self.run / run_folder.CHECKPOINTS / str(self.resumed_from)

    def _record_versions(self) -> None:
        """Add this process's versions to the run's; say which differ from those that the run was trained with."""
        changed = run_folder.record_versions(self.run, versions.made_with(hardware(self.topology.kind), self.launcher))
        if changed:
            self._warn(
                f"{self.run}: resumed under other versions ({', '.join(changed)}); the results can differ from those "
                "of a run under one version"
            )

    def _count_time(self) -> None:
        """Add what has passed since it was last added to the total, so that the total survives an interruption."""
        now = time.perf_counter()
        self.progress.seconds["total"] = self.progress.seconds.get("total", 0.0) + now - self.counted
        self.counted = now

    def _restore_best(self) -> None:
        checkpoints.restore_model(self.model, self.best_arrays)

    def _finish(self) -> dict[str, Any]:
        self._restore_best()
        seconds, best = self.progress.seconds, self.progress.best
        result = {
            "launcher": self.launcher,
            "strategy": type(self.strategy).__name__,
            "workers": self.topology.workers,
            "replicas": self.topology.replicas,
            "device": self.topology.kind,
            "precision": self.precision,
            "xla": self.xla,
            "parameters": int(self.model.count_params()),
            "resumed_from": self.resumed_from,
            "steps_computed": self.steps_computed,
            "peak_memory_bytes": _peak_memory_bytes(),
            "damaged_records": len(self.left_out.records),
            "best": {
                "stage": best.stage,
                "epoch": best.epoch,
                "val_accuracy": best.val_accuracy,
                "val_loss": best.val_loss,
            },
            "images_per_second": {
                str(number): float(np.median(rates))
                for number in self.config.stages
                if (rates := [row["images_per_second"] for row in self.progress.history if row["stage"] == number])
            },
            "seconds": seconds,
        }
        if self.topology.is_chief:
            # Again: a run that was stopped between a checkpoint and its history has the row in the one alone.
            run_folder.write_history(self.run, self.progress.history)
            with self.progress.timed("save"):
                self._save_model()
            self._count_time()
            write_json(self.run / run_folder.RESULT, result)
        self.reporter.emit({"kind": "done", "result": result})
        return result

    def _save_model(self) -> None:
        """`resnet.keras` in float32, so that it runs anywhere as it is."""
        size = self.config.model.image_size
        if size is None:
            raise ValueError("the configuration was not resolved")
        portable = build_model(self.classes, size, self.config, "float32")
        checkpoints.restore_model(portable, self.best_arrays)
        name_what_older_keras_knows(portable)
        with tempfile.TemporaryDirectory(prefix=f".{run_folder.MODEL}.", dir=self.run) as folder:
            saved = Path(folder, run_folder.MODEL)
            portable.save(saved)
            with saved.open("r+b") as file:
                checkpoints.seal_archive(file)
            move_durably(saved, self.run / run_folder.MODEL)

    def _wait_for_features(self) -> None:
        self.beat("features that another run computes")
        if not self.waiting_told:
            self.waiting_told = True
            self._warn("another run computes the same features; waiting for it, and using them then")

    def _warn(self, text: str) -> None:
        self.reporter.emit({"kind": "warning", "text": text})

    def _announce(self, number: int, stage: StageConfig, source: str) -> None:
        what = f"head and upper {stage.unfreeze_layers} layers" if stage.unfreeze_layers else "head"
        text = (
            f"stage {number}: {what}, {stage.epochs} epochs of {self.plan.steps_per_epoch} steps, batch "
            f"{self.config.global_batch_size}, from {source} "
            f"[{self.topology.replicas} x {self.topology.kind}, {self.precision}{', XLA' if self.xla else ''}]"
        )
        self.reporter.emit(
            {"kind": "stage", "stage": number, "epochs": stage.epochs}
            | {"steps_per_epoch": self.plan.steps_per_epoch, "text": text}
        )

    def _raise_reading_failure(self, error: Exception) -> None:
        for source in (self.train_source, self.validation_source):
            if source.failure is not None:
                raise source.failure from error
