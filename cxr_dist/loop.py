"""The one loop over stages and epochs. No Ray here: a worker of any launcher calls `train`."""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist import checkpoint, damage, features, run_folder, stages, steps, watchdog
from cxr_dist.averaging import WeightAverage
from cxr_dist.config import Config, StageConfig
from cxr_dist.data import EvaluationPlan, ShardSource, Source, TrainingPlan
from cxr_dist.keeping import Keeper
from cxr_dist.metrics import counts_metrics
from cxr_dist.model import build_model, load_base_weights, set_trainable, trains_base_batch_norm
from cxr_dist.pace import FixedLengths, Pace
from cxr_dist.progress import Best, Progress
from cxr_dist.reporting import Reporter
from cxr_dist.stage_inputs import StageInputs
from cxr_dist.stopping import RegroupedError, StoppedError, StopRequest
from cxr_dist.store import FeatureStore
from cxr_dist.strategy import Topology, dtype_policy, make_strategy, resolve_precision, resolve_xla
from tfrecords_builder.errors import UserError
from tfrecords_builder.files import move_durably, write_json
from tfrecords_builder.manifest import read_manifest


def train(
    config: Config, dataset: Path, run: Path, topology: Topology, reporter: Reporter, launcher: str
) -> dict[str, Any]:
    """Train all stages and leave the best model; goes on from the run's newest checkpoint.

    Every worker calls this with equal arguments; the chief writes. The folder was prepared by
    `run_folder.prepare`, and `config` is resolved.

    Returns:
        What result.json holds.

    Raises:
        UserError: something in the configuration or the data that the user can mend.
    """
    with ExitStack() as held:
        beat: Callable[[str], None] = _ignore
        if topology.workers > 1:
            folder = run / watchdog.BEATS
            beat = held.enter_context(watchdog.Watchdog(folder, topology.worker, config.worker_timeout_s)).beat
        one = _Run(config, dataset, run, topology, reporter, launcher, beat)
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
    ) -> None:
        import keras
        import tensorflow as tf

        self.started = self.counted = time.perf_counter()
        self.config, self.run, self.topology = config, run, topology
        self.reporter, self.launcher, self.beat = reporter, launcher, beat
        self.stop = StopRequest(run)
        self.folder = checkpoint.CheckpointFolder(run / run_folder.CHECKPOINTS, config.checkpoint.keep)
        self.keeper = Keeper(config.checkpoint, warn=self._warn)
        self.waiting_told = False
        self.progress = Progress()
        self.best_arrays: checkpoint.Arrays = {}
        self.average: WeightAverage | None = None
        self.resumed_from: str | None = None
        self.steps_computed = 0

        self.precision = resolve_precision(config.precision, topology.kind)
        self.xla = resolve_xla(config, topology.kind)
        manifest = read_manifest(dataset)
        self.classes = len(manifest.class_names)
        self.left_out = damage.left_out(run)
        self.train_source = ShardSource(dataset, manifest, "train", self.left_out.paths)
        self.validation_source = ShardSource(dataset, manifest, "validation", self.left_out.paths)
        self.plan = TrainingPlan(
            self.train_source.count,
            config.global_batch_size,
            topology.replicas,
            config.seed,
            parts=config.accumulation_steps,
        )

        keras.utils.set_random_seed(config.seed)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = make_strategy(topology, config.all_reduce)
        with self.strategy.scope():
            self.model = build_model(self.classes, manifest.image_size, config, dtype_policy(self.precision))
        self.iterators: list[Any] = []
        folder = Path(config.features.folder) if config.features.folder else run.parent / run_folder.FEATURE_CACHE
        self.store = FeatureStore(folder, int(config.features.limit_gb * 1e9))
        frozen = features.FrozenFeatures(
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
            features.SplitImages(content, "train", self.train_source),
            features.SplitImages(content, "validation", self.validation_source),
            announce=self._announce,
            timed=lambda phase: self.progress.timed(phase),
            decided=lambda: self.progress.kept_cuts,
        )

    def execute(self) -> dict[str, Any]:
        if self.left_out.records:
            listed = self.run / run_folder.DAMAGED
            self._warn(f"{len(self.left_out.records)} damaged records are left out; {listed} lists them")
        arrays = self._restore()
        self.progress.seconds["start"] = self.progress.seconds.get("start", 0.0) + time.perf_counter() - self.started
        try:
            for number in sorted(self.config.stages):
                if number < self.progress.stage or not self.config.stages[number].epochs:
                    continue
                if not self._is_finished(number):
                    self._run_stage(number, self.config.stages[number], arrays)
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

    def _run_stage(self, number: int, stage: StageConfig, restored: checkpoint.Arrays | None) -> None:
        config, plan = self.config, self.plan
        if self.progress.stage != number:
            self.progress.stage, self.progress.epoch, self.progress.epochs_without_gain = number, 0, 0
        set_trainable(self.model, stage.unfreeze_layers, trains_base_batch_norm(config))
        inputs = self.inputs.of(number)
        with self.strategy.scope():
            optimizer = steps.make_optimizer(stage)
            optimizer.build(self.model.trainable_variables)
            # Of the weights as they stand, which are those of the checkpoint where there is one.
            decay = stage.weight_average
            self.average = None if decay is None else WeightAverage(self.model.trainable_variables, decay)
        loss_scale = steps.LossScale.create(self.precision)
        if restored is not None:
            checkpoint.restore_optimizer(optimizer, restored)
            loss_scale.restore(restored)
            if self.average is not None:
                self.average.restore(restored)
        train_step = steps.make_train_step(
            self.strategy,
            inputs.network,
            optimizer,
            stage,
            global_batch_size=config.global_batch_size,
            classes=self.classes,
            seed=config.seed,
            augmentation=config.augmentation if stage.augment and not inputs.from_cut else None,
            class_weights=stages.class_weights(self.train_source.labels, self.classes) if stage.class_weights else None,
            loss_scale=loss_scale,
            xla=self.xla,
            accumulation_steps=config.accumulation_steps,
            measure_wait=not config.deterministic,
            average=self.average,
        )
        rates = stages.learning_rates(stage, plan.steps_per_epoch)
        # Counted from the planned ends of earlier stages, so that an early stop changes no later order.
        first_epoch = sum(self.config.stages[earlier].epochs for earlier in range(1, number))
        start = (first_epoch + self.progress.epoch) * plan.steps_per_epoch + self.progress.step
        iterator = self._batches(inputs.train, replace(plan, views=inputs.train.count // plan.count), start)
        head_alone = inputs.from_cut and not stage.unfreeze_layers
        lengths = FixedLengths.of(self.topology.kind, head_alone=head_alone)
        pace = Pace(lengths.training if self.topology.workers > 1 else None)

        def trained() -> checkpoint.Arrays:
            average = {} if self.average is None else self.average.arrays()
            kept = checkpoint.model_arrays(self.model) | checkpoint.optimizer_arrays(optimizer)
            return kept | loss_scale.arrays() | average

        evaluate = self._evaluation(inputs.network, inputs.validation, lengths.validation, trained)
        while not self._is_finished(number):
            epoch = self.progress.epoch
            rate = rates[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
            first_step = (first_epoch + epoch) * plan.steps_per_epoch
            row = self._train_epoch(number, train_step, iterator, first_step, rate, pace, trained)
            with self.progress.timed("validation"):
                row |= evaluate()
            self._count_time()
            row["run_seconds"] = self.progress.seconds["total"]
            self._end_epoch(row)
            if self._is_finished(number) or self.keeper.is_due(0):
                self._keep(trained)
            self.reporter.emit({"kind": "epoch", "row": row})
        self.keeper.wait()

    def _train_epoch(
        self,
        number: int,
        train_step: steps.TrainStep,
        iterator: Any,
        first_step: int,
        rates: npt.NDArray[np.float32],
        pace: Pace,
        trained: Callable[[], checkpoint.Arrays],
    ) -> dict[str, Any]:
        progress = self.progress
        started = time.perf_counter()
        pace.start_epoch()
        while progress.step < len(rates):
            done = progress.step
            due = self.keeper.steps_until_due(done) or len(rates)
            count = min(pace.steps_per_call, len(rates) - done, due)
            begun = time.perf_counter()
            totals = train_step.run(iterator, first_step + done, rates[done : done + count], np.array(progress.totals))
            spent = time.perf_counter() - begun
            pace.record(count, spent)
            progress.totals, progress.step = totals.tolist(), done + count
            progress.seconds_in_steps += spent
            progress.seconds[f"stage_{number}"] = progress.seconds.get(f"stage_{number}", 0.0) + spent
            self.steps_computed += count
            self._check_finite(number)
            self.beat(f"stage {number}, epoch {progress.epoch + 1}, step {progress.step}")
            self._end_if_asked(trained)
            if progress.step < len(rates) and self.keeper.is_due(progress.step):
                self._keep(trained)
            self.reporter.emit(
                {
                    "kind": "progress",
                    "stage": number,
                    "epoch": self.progress.epoch + 1,
                    "step": progress.step,
                    "steps": len(rates),
                    "images_per_second": pace.steps_per_second * self.config.global_batch_size,
                }
            )
        total = progress.totals
        images = total[steps.COUNT]
        # Resumed after its last step, an epoch has none of this process's to measure.
        steps_per_second = pace.steps_per_second or len(rates) / progress.seconds_in_steps
        if not images:
            raise self._diverged(number, "no step was finite")
        return {
            "stage": number,
            "epoch": progress.epoch + 1,
            "epochs_done": progress.epochs_done + 1,
            "loss": total[steps.LOSS] / images,
            "accuracy": total[steps.CORRECT] / images,
            "learning_rate": float(rates[-1]),
            "skipped_steps": int(total[steps.SKIPPED] - total[steps.OVERFLOWED]),
            "overflowed_steps": int(total[steps.OVERFLOWED]),
            "trainable_parameters": sum(int(np.prod(v.shape)) for v in self.model.trainable_variables),
            "input_wait": None if self.config.deterministic else total[steps.WAITED] / progress.seconds_in_steps,
            "images_per_second": steps_per_second * self.config.global_batch_size,
            "seconds": time.perf_counter() - started,
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

    def _evaluation(
        self, model: Any, source: Source, steps_per_call: int, trained: Callable[[], checkpoint.Arrays]
    ) -> Callable[[], dict[str, float]]:
        # A part of a step, as more may not fit in the replica's memory.
        batch_size = self.plan.batch_size // self.plan.parts
        evaluation_plan = EvaluationPlan(source.count, batch_size, self.topology.replicas)
        run_steps = steps.make_evaluation_step(self.strategy, model, self.classes, self.xla, self.average)
        iterator = self._batches(source, evaluation_plan)

        def evaluate() -> dict[str, float]:
            confusion, loss = np.zeros([self.classes] * 2, np.int64), 0.0
            for first in range(0, evaluation_plan.steps, steps_per_call):
                part = run_steps(iterator, min(steps_per_call, evaluation_plan.steps - first))
                confusion, loss = confusion + part[0], loss + part[1]
                self.beat(f"the validation after epoch {self.progress.epoch + 1} of the stage, step {first}")
                self._end_if_asked(trained)
            if confusion.sum() != source.count:
                raise RuntimeError(f"{confusion.sum()} images were counted, of {source.count}")
            measured = {f"val_{key}": value for key, value in counts_metrics(confusion).items()}
            return {"val_loss": loss / source.count, **measured}

        return evaluate

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
        iterator = steps.distributed_batches(self.strategy, self.topology, source, plan, start_step)
        self.iterators.append(iterator)
        return iterator

    def _report_features(self, done: int, total: int, images_per_second: float) -> None:
        self.beat(f"the features, image {done}")
        self.reporter.emit(
            {"kind": "progress", "stage": self.progress.stage, "epoch": "features", "step": done, "steps": total}
            | {"images_per_second": images_per_second}
        )

    # -- what is kept ---------------------------------------------------------------------------

    def _end_epoch(self, row: dict[str, Any]) -> None:
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
            average = {} if self.average is None else self.average.model_arrays()
            self.best_arrays = checkpoint.model_arrays(self.model) | average
        if self.topology.is_chief:
            run_folder.write_history(self.run, progress.history)

    def _keep(self, trained: Callable[[], checkpoint.Arrays]) -> None:
        """Begin to write a checkpoint of this moment; the chief alone does."""
        if not self.topology.is_chief:
            return
        with self.progress.timed("checkpoint"):
            self._count_time()
            state = asdict(self.progress)
            position, arrays, best, best_arrays = (
                self.progress.position,
                trained(),
                self.progress.best.epochs_done,
                self.best_arrays,
            )
            self.keeper.write(lambda: self.folder.save(position, arrays, state, best, best_arrays))

    def _end_if_asked(self, trained: Callable[[], checkpoint.Arrays]) -> None:
        """The chief ends the run at once when it was asked to; the other workers end with it."""
        if not (self.topology.is_chief and self.stop.is_made()):
            return
        self._keep(trained)
        self.keeper.wait()
        kind = RegroupedError if self.stop.is_for_more_workers() else StoppedError
        self.stop.clear()
        raise kind(f"{self.run}: stopped, with a checkpoint; start the same command again to go on")

    def _restore(self) -> checkpoint.Arrays | None:
        """Load the newest checkpoint, or the pretrained weights of a new run.

        All workers take the chief's: what they read meanwhile may have changed.
        """
        found = None
        if self.topology.is_chief:
            self.folder.clean()
            found = self.folder.newest(self._warn, set_aside=True)
        position = found[0] if found else checkpoint.Position(-1)
        epochs_done, step = steps.chiefs(self.strategy, self.topology, (position.epochs_done, position.step))
        if epochs_done < 0:
            load_base_weights(self.model, self.config.model.weights)
            return None
        position = checkpoint.Position(epochs_done, step)
        arrays, state = found[1:] if found else self.folder.load(position)
        state.pop("best_epochs_done")
        checkpoint.restore_model(self.model, arrays)
        self.progress = Progress.of_state(state)
        if self.progress.best.epochs_done:
            self.best_arrays = self.folder.load_best(self.progress.best.epochs_done)
        self.resumed_from = position.file_name
        self.reporter.emit(
            {"kind": "message", "text": f"going on from {self.run / run_folder.CHECKPOINTS / position.file_name}"}
        )
        return arrays

    def _count_time(self) -> None:
        """Add what has passed since it was last added to the total, so that the total survives an interruption."""
        now = time.perf_counter()
        self.progress.seconds["total"] = self.progress.seconds.get("total", 0.0) + now - self.counted
        self.counted = now

    def _restore_best(self) -> None:
        checkpoint.restore_model(self.model, self.best_arrays)

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
        """`model.keras` in float32, so that it runs anywhere as it is."""
        size = self.config.model.image_size
        if size is None:
            raise ValueError("the configuration was not resolved")
        portable = build_model(self.classes, size, self.config, "float32")
        checkpoint.restore_model(portable, self.best_arrays)
        with tempfile.TemporaryDirectory(prefix=f".{run_folder.MODEL}.", dir=self.run) as folder:
            saved = Path(folder, run_folder.MODEL)
            portable.save(saved)
            with saved.open("r+b") as file:
                checkpoint.seal_archive(file)
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
