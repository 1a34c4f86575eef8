"""One stage of a run: its epochs of training and validation."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import resident
from cxr_dist.data.batch_sampler import EvaluationBatchSampler
from cxr_dist.evaluation.metrics import counts_metrics
from cxr_dist.features.stage_inputs import Inputs, StageInputs
from cxr_dist.model.resnet import FrozenBase
from cxr_dist.runs import checkpoints, run_folder
from cxr_dist.runs.checkpoint_file import Arrays
from cxr_dist.runs.ranking import SELECTION, selection_score
from cxr_dist.training import schedules, train_step as steps
from cxr_dist.training.gradients import StepSpec
from cxr_dist.training.progress import Progress
from cxr_dist.training.run_checkpoints import RunCheckpoints
from cxr_dist.training.run_context import RunContext
from cxr_dist.training.stage_state import StageState
from cxr_dist.training.steps_per_call import FixedStepsPerCall, StepsPerCall
from tfrecords_builder.common.errors import UserError


class StageRunner:
    """Trains one stage, from where the run's progress stands to the stage's end."""

    def __init__(
        self,
        number: int,
        context: RunContext,
        kept: RunCheckpoints,
        progress: Progress,
        inputs: StageInputs,
        restored: Arrays | None,
    ) -> None:
        """Freeze what the stage freezes, fetch or compute its inputs, and make its state and steps.

        Args:
            restored: Of a checkpoint within this stage, whose weights the model has; else None.
        """
        self._number, self._context, self._kept, self._progress = number, context, kept, progress
        config, plan = context.config, context.plan
        self._stage = stage = config.stages[number]
        progress.begin_stage(number)
        FrozenBase.of(stage, config).apply(context.model)
        reads = inputs.of(number)
        self._state = StageState.create(context.strategy, context.model, stage, context.precision)
        if restored is not None:
            with checkpoints.fitting(kept.resumed_path):
                self._state.restore(restored)
        self._train_step = steps.make_train_step(
            reads.network, self._state, self._step_spec(reads), resident.table_of(reads.train)
        )
        # Counted from the planned ends of earlier stages, so that an early stop changes no later order.
        self._first_step = sum(config.stages[earlier].epochs for earlier in range(1, number)) * plan.steps_per_epoch
        self._rates = schedules.learning_rates(stage, plan.steps_per_epoch)
        start = self._first_step + progress.epoch * plan.steps_per_epoch + progress.step
        copies = reads.train.count // plan.count
        self._batches = context.batches(reads.train, replace(plan, copies=copies), start)
        fixed = FixedStepsPerCall.of(context.topology.kind, reads.from_cache and not stage.unfreeze_layers)
        self._steps_per_call = StepsPerCall(fixed.training if context.topology.workers > 1 else None)
        # A microbatch a step, as more may not fit in the replica's memory.
        batch_size = plan.batch_size // plan.accumulation_steps
        self._evaluation = EvaluationBatchSampler(reads.validation.count, batch_size, context.topology.replicas)
        self._evaluation_batches = context.batches(reads.validation, self._evaluation)
        self._evaluation_steps_per_call = fixed.validation
        self._evaluation_step = steps.make_evaluation_step(
            context.strategy,
            reads.network,
            context.classes,
            context.xla,
            self._state.average,
            resident.table_of(reads.validation),
        )

    def run(self) -> None:
        """Train and validate epoch by epoch until the stage has ended."""
        progress, context, kept = self._progress, self._context, self._kept
        while not progress.has_finished(self._number, self._stage):
            row = self._train_epoch()
            with progress.timed("validation"):
                row |= self._evaluate()
            context.count_time(progress)
            row["run_seconds"] = progress.seconds["total"]
            self._end_epoch(row)
            if progress.has_finished(self._number, self._stage) or kept.writer.is_due(0):
                kept.save(self._state, progress)
            context.reporter.emit({"kind": "epoch", "row": row})
        kept.writer.wait()

    def _step_spec(self, reads: Inputs) -> StepSpec:
        config, stage, classes = self._context.config, self._stage, self._context.classes
        labels = self._context.train_source.labels
        return StepSpec(
            global_batch_size=config.global_batch_size,
            classes=classes,
            seed=config.seed,
            label_smoothing=stage.label_smoothing,
            clip_norm=stage.clip_norm,
            weight_decay=stage.weight_decay,
            augmentation=config.augmentation if stage.augment and not reads.from_cache else None,
            class_weights=schedules.class_weights(labels, classes) if stage.class_weights else None,
            accumulation_steps=config.accumulation_steps,
            xla=self._context.xla,
            # A GPU waits for the host to start 2,000 operations; a CPU gains nothing.
            xla_update=self._context.xla or self._context.topology.kind == "GPU",
            measure_wait=not config.deterministic,
        )

    def _train_epoch(self) -> dict[str, Any]:
        """Train to the end of the epoch that the progress is in.

        Returns:
            Its row of the history, without validation.
        """
        progress, context, calls, writer = self._progress, self._context, self._steps_per_call, self._kept.writer
        planned = context.plan.steps_per_epoch
        first = progress.epoch * planned
        rates = self._rates[first : first + planned]
        started = time.perf_counter()
        calls.start_epoch()
        while progress.step < planned:
            done = progress.step
            due = writer.steps_until_due(done) or planned
            count = min(calls.count, planned - done, due)
            call_started = time.perf_counter()
            totals = self._train_step.run(
                self._batches, self._first_step + first + done, rates[done : done + count], np.array(progress.totals)
            )
            spent = time.perf_counter() - call_started
            calls.record(count, spent)
            progress.add_steps(count, totals, spent)
            context.steps_computed += count
            self._check_finite()
            context.heartbeat(f"stage {self._number}, epoch {progress.epoch + 1}, step {progress.step}")
            self._kept.stop_if_requested(self._state, progress)
            if progress.step < planned and writer.is_due(progress.step):
                self._kept.save(self._state, progress)
            context.reporter.emit(
                {"kind": "progress", "stage": self._number, "epoch": progress.epoch + 1}
                | {"step": progress.step, "steps": planned}
                | {"images_per_second": calls.steps_per_second * context.config.global_batch_size}
            )
        # Resumed after its last step, an epoch has none of this process's to measure.
        steps_per_second = calls.steps_per_second or planned / progress.seconds_in_steps
        return self._row(float(rates[-1]), steps_per_second, time.perf_counter() - started)

    def _row(self, rate: float, steps_per_second: float, seconds: float) -> dict[str, Any]:
        progress, total, config = self._progress, self._progress.totals, self._context.config
        images = total[steps.COUNT]
        if not images:
            raise self._diverged("no step was finite")
        return {
            "stage": self._number,
            "epoch": progress.epoch + 1,
            "epochs_done": progress.epochs_done + 1,
            "loss": total[steps.LOSS] / images,
            "accuracy": total[steps.CORRECT] / images,
            "learning_rate": rate,
            "skipped_steps": int(total[steps.SKIPPED] - total[steps.OVERFLOWED]),
            "overflowed_steps": int(total[steps.OVERFLOWED]),
            "trainable_parameters": sum(int(np.prod(v.shape)) for v in self._context.model.trainable_variables),
            "input_wait": None if config.deterministic else total[steps.WAITED] / progress.seconds_in_steps,
            "images_per_second": steps_per_second * config.global_batch_size,
            "seconds": seconds,
        }

    def _evaluate(self) -> dict[str, float]:
        """The validation's part of an epoch's row."""
        classes, plan, at_once = self._context.classes, self._evaluation, self._evaluation_steps_per_call
        confusion: npt.NDArray[np.int64] = np.zeros((classes, classes), np.int64)
        loss = 0.0
        for first in range(0, plan.steps, at_once):
            counts, summed = self._evaluation_step(self._evaluation_batches, min(at_once, plan.steps - first))
            confusion, loss = confusion + counts, loss + summed
            self._context.heartbeat(f"the validation after epoch {self._progress.epoch + 1} of the stage, step {first}")
            self._kept.stop_if_requested(self._state, self._progress)
        if confusion.sum() != plan.count:
            raise RuntimeError(f"{confusion.sum()} images were counted, of {plan.count}")
        return {"val_loss": loss / plan.count} | {f"val_{key}": v for key, v in counts_metrics(confusion).items()}

    def _end_epoch(self, row: dict[str, Any]) -> None:
        if not np.isfinite(row["val_loss"]):
            raise self._diverged("the validation loss is not finite")
        row[SELECTION] = selection_score(row, self._context.config.selection.metric)
        self._progress.end_epoch(row)
        if row["best"]:
            self._kept.best_arrays = self._state.evaluated_arrays()
        if self._context.topology.is_chief:
            run_folder.write_history(self._context.run, self._progress.history)

    def _check_finite(self) -> None:
        """End a run whose steps are lost to non-finite numbers, and say where."""
        totals = self._progress.totals
        skipped = int(totals[steps.SKIPPED] - totals[steps.OVERFLOWED])
        if skipped > self._context.config.max_nonfinite_steps:
            raise self._diverged(f"{skipped} steps had a non-finite loss or gradient")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"training diverged: {what} in stage {self._number}, epoch {self._progress.epoch + 1}, by step "
            f"{self._progress.step}; lower stages.{self._number}.learning_rate"
        )
