"""The one loop over stages and epochs. No Ray here: a worker of any launcher calls `train`."""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist import checkpoint, cut, damage, features, run_folder, stages, steps, watchdog
from cxr_dist.config import Config, StageConfig
from cxr_dist.data import EvaluationPlan, ShardSource, Source, TrainingPlan
from cxr_dist.keeping import Keeper
from cxr_dist.metrics import counts_metrics
from cxr_dist.model import build_model, load_base_weights, set_trainable, trains_base_batch_norm
from cxr_dist.pace import Pace
from cxr_dist.reporting import Reporter
from cxr_dist.stopping import RegroupedError, StoppedError, StopRequest
from cxr_dist.store import FeatureStore
from cxr_dist.strategy import Topology, dtype_policy, make_strategy, resolve_precision, resolve_xla
from tfrecords_builder.errors import UserError
from tfrecords_builder.files import move_durably, write_json
from tfrecords_builder.manifest import read_manifest

VALIDATION_STEPS_PER_CALL = 64
"""Then the host hears of progress; fixed, as workers must agree."""


@dataclass
class Best:
    """The best validation so far."""

    val_accuracy: float = -1.0
    val_loss: float = float("inf")
    epochs_done: int = 0
    """After which epoch over all stages; 0 before the first."""
    stage: int = 0
    epoch: int = 0

    def is_beaten_by(self, row: dict[str, Any]) -> bool:
        """Whether an epoch is better: by accuracy, then by loss."""
        return (row["val_accuracy"], -row["val_loss"]) > (self.val_accuracy, -self.val_loss)


@dataclass
class Progress:
    """Where the run stands: what a checkpoint holds beside arrays."""

    stage: int = 1
    epoch: int = 0
    """Epochs of the stage that are done."""
    epochs_done: int = 0
    """Over all stages."""
    step: int = 0
    """Steps of the epoch after those that are done."""
    totals: list[float] = field(default_factory=lambda: [0.0] * steps.TOTALS)
    """Of these steps."""
    seconds_in_steps: float = 0.0
    epochs_without_gain: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Progress":
        """What `dataclasses.asdict` and JSON made of one."""
        return cls(**state | {"best": Best(**state["best"])})

    @property
    def position(self) -> checkpoint.Position:
        return checkpoint.Position(self.epochs_done, self.step)


@dataclass(frozen=True)
class _Inputs:
    """What a stage trains, and on what."""

    network: Any
    """From the sources' inputs to logits; shares the model's variables."""
    train: Source
    validation: Source
    from_cut: bool
    """Whether the inputs are tensors inside the network, and augmented already."""


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


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
        return _Run(config, dataset, run, topology, reporter, launcher, beat).execute()


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
    return _Run(config, dataset, run, topology, reporter, "").fill_cache()


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
        self.keeper = Keeper(config.checkpoint)
        self.progress = Progress()
        self.best_arrays: checkpoint.Arrays = {}
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
        self.frozen = features.FrozenFeatures(
            config,
            self.strategy,
            topology,
            FeatureStore(folder, int(config.features.limit_gb * 1e9)),
            precision=self.precision,
            xla=self.xla,
            progress=self._report_features,
        )
        content = self.left_out.fingerprint(manifest.fingerprint)
        self.train_images = features.SplitImages(content, "train", self.train_source)
        self.validation_images = features.SplitImages(content, "validation", self.validation_source)
        self.in_memory: tuple[Source, Source] | None = None
        self.kept_cuts: dict[int, bool] = {}
        """By stage, whether it reads the tensors at its cut: decided once."""

    def execute(self) -> dict[str, Any]:
        if self.left_out.records:
            text = f"{len(self.left_out.records)} damaged records are left out; {self.run / damage.DAMAGED} lists them"
            self.reporter.emit({"kind": "warning", "text": text})
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
        where = cut.frozen_cut(self.model)
        if where is None or not self._keeps(number, where):
            return False
        self.progress.stage = number
        try:
            self._inputs(number, stage)
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
        inputs = self._inputs(number, stage)
        with self.strategy.scope():
            optimizer = steps.make_optimizer(stage)
            optimizer.build(self.model.trainable_variables)
        self.loss_scale = loss_scale = steps.LossScale.create(self.precision)
        if restored is not None:
            checkpoint.restore_optimizer(optimizer, restored)
            loss_scale.restore(restored)
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
        )
        evaluate = self._evaluation(inputs.network, inputs.validation)
        rates = stages.learning_rates(stage, plan.steps_per_epoch)
        # Counted from the planned ends of earlier stages, so that an early stop changes no later order.
        first_epoch = sum(self.config.stages[earlier].epochs for earlier in range(1, number))
        start = (first_epoch + self.progress.epoch) * plan.steps_per_epoch + self.progress.step
        iterator = self._batches(inputs.train, replace(plan, views=inputs.train.count // plan.count), start)
        pace = Pace(by_time=self.topology.workers == 1)

        def trained() -> checkpoint.Arrays:
            return checkpoint.model_arrays(self.model) | checkpoint.optimizer_arrays(optimizer) | loss_scale.arrays()

        while not self._is_finished(number):
            epoch = self.progress.epoch
            rate = rates[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
            first_step = (first_epoch + epoch) * plan.steps_per_epoch
            row = self._train_epoch(number, train_step, iterator, first_step, rate, pace, trained)
            with _timed(self.progress.seconds, "validation"):
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
        if not images:
            raise self._diverged(number, "no step was finite")
        return {
            "stage": number,
            "epoch": progress.epoch + 1,
            "epochs_done": progress.epochs_done + 1,
            "loss": total[steps.LOSS] / images,
            "accuracy": total[steps.CORRECT] / images,
            "learning_rate": float(rates[-1]),
            "skipped_steps": int(total[steps.SKIPPED]),
            "trainable_parameters": sum(int(np.prod(v.shape)) for v in self.model.trainable_variables),
            "input_wait": None if self.config.deterministic else total[steps.WAITED] / progress.seconds_in_steps,
            "images_per_second": pace.steps_per_second * self.config.global_batch_size,
            "seconds": time.perf_counter() - started,
        }

    def _check_finite(self, number: int) -> None:
        """End a run whose steps are lost to non-finite numbers, and say where."""
        skipped = int(self.progress.totals[steps.SKIPPED])
        if skipped > self.config.max_skipped_steps and not self.loss_scale.can_mend():
            raise self._diverged(number, f"{skipped} steps had a loss or gradient that is not finite")

    def _diverged(self, number: int, what: str) -> UserError:
        return UserError(
            f"training diverged: {what} in stage {number}, epoch {self.progress.epoch + 1}, until step "
            f"{self.progress.step}; lower stages.{number}.learning_rate"
        )

    def _evaluation(self, model: Any, source: Source) -> Callable[[], dict[str, float]]:
        batch_size = self.plan.batch_size
        evaluation_plan = EvaluationPlan(source.count, batch_size, self.topology.replicas)
        run_steps = steps.make_evaluation_step(self.strategy, model, self.classes, self.xla)
        iterator = self._batches(source, evaluation_plan)

        def evaluate() -> dict[str, float]:
            confusion, loss = np.zeros([self.classes] * 2, np.int64), 0.0
            for first in range(0, evaluation_plan.steps, VALIDATION_STEPS_PER_CALL):
                part = run_steps(iterator, min(VALIDATION_STEPS_PER_CALL, evaluation_plan.steps - first))
                confusion, loss = confusion + part[0], loss + part[1]
                self.beat(f"the validation after epoch {self.progress.epoch + 1} of the stage, step {first}")
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

    def _inputs(self, number: int, stage: StageConfig) -> "_Inputs":
        """What the stage reads: images, or what the frozen part makes of them, computed now where it is missing."""
        where = cut.frozen_cut(self.model)
        if where is None or not self._keeps(number, where):
            self._announce(number, stage, "images")
            limit = int(self.config.input.memory_gb * 1e9)
            with _timed(self.progress.seconds, "read"):
                self.in_memory = self.in_memory or (
                    self.train_source.in_memory(limit),
                    self.validation_source.in_memory(limit),
                )
            return _Inputs(cut.whole_network(self.model), *self.in_memory, from_cut=False)
        self._announce(number, stage, f"what the layers up to {where.name} make of them, computed once")
        later = self._later_cuts(number)
        augmentation = self.config.augmentation if stage.augment else None
        with _timed(self.progress.seconds, "features"):
            train, validation = (
                self.frozen.sources(self.model, where.name, also, images, changed)
                for images, changed, also in (
                    (self.train_images, augmentation, () if augmentation else later),
                    (self.validation_images, None, later),
                )
            )
        return _Inputs(where.above, train, validation, from_cut=True)

    def _keeps(self, number: int, where: cut.Cut) -> bool:
        """Whether stage `number` reads the tensors at its cut."""
        if number not in self.kept_cuts:
            stage = self.config.stages[number]
            use = features.use_of_cut(self.config.features, stage, where.name)
            images = self.train_source.count + self.validation_source.count
            self.kept_cuts[number] = use == "on" or (
                use == "auto" and self.frozen.pays(self.model, where, self.train_images, images, stage.epochs)
            )
        return self.kept_cuts[number]

    def _later_cuts(self, number: int) -> tuple[str, ...]:
        """Those of later stages that read the images as they are: one pass computes them all."""
        config = self.config
        names = []
        for later, stage in sorted(config.stages.items()):
            if later > number and stage.epochs and not stage.augment:
                set_trainable(self.model, stage.unfreeze_layers, trains_base_batch_norm(config))
                where = cut.frozen_cut(self.model)
                set_trainable(self.model, config.stages[number].unfreeze_layers, trains_base_batch_norm(config))
                if where is not None and self._keeps(later, where):
                    names.append(where.name)
        return tuple(names)

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
            self.best_arrays = checkpoint.model_arrays(self.model)
        if self.topology.is_chief:
            run_folder.write_history(self.run, progress.history)

    def _keep(self, trained: Callable[[], checkpoint.Arrays]) -> None:
        """Begin to write a checkpoint of this moment; the chief alone does."""
        if not self.topology.is_chief:
            return
        with _timed(self.progress.seconds, "checkpoint"):
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
            self.stop.clear()
            found = self.folder.newest(lambda text: self.reporter.emit({"kind": "warning", "text": text}))
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
            with _timed(seconds, "save"):
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
