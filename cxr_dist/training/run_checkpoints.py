"""What a run keeps while it trains, and goes on from: checkpoints and the best weights."""

from dataclasses import asdict
from pathlib import Path

from cxr_dist.distributed import collectives
from cxr_dist.model.resnet import base_of, load_base_weights
from cxr_dist.runs import checkpoints, run_folder
from cxr_dist.runs.checkpoint_file import Arrays
from cxr_dist.runs.checkpoint_writer import CheckpointWriter
from cxr_dist.runs.stop_request import StoppedError, StopRequest
from cxr_dist.training.progress import Progress
from cxr_dist.training.run_context import RunContext
from cxr_dist.training.stage_state import StageState


class RunCheckpoints:
    """Saves and restores the state of one run; every worker restores, the chief saves."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._stop = StopRequest(context.run)
        self._path = context.run / run_folder.CHECKPOINTS
        self._folder = checkpoints.CheckpointFolder(self._path, context.config.checkpoint.keep)
        self.writer = CheckpointWriter(context.config.checkpoint, warn=context.warn)
        self.best_arrays: Arrays = {}
        """The weights of the best epoch so far."""
        self.resumed_from: str | None = None
        """Name of the checkpoint that the run went on from."""

    def restore(self) -> tuple[Progress, Arrays | None]:
        """Load the newest checkpoint, or the pretrained weights of a new run, into the model.

        All workers take the chief's checkpoint: what they read meanwhile may have changed.

        Returns:
            Where the run stands, and the checkpoint's arrays; None of a new run.
        """
        context, newest = self._context, None
        if context.topology.is_chief:
            self._folder.clean()
            newest = self._folder.newest(context.warn, set_aside=True)
        own = newest.position if newest else checkpoints.Position(-1)
        epochs_done, step = collectives.broadcast_from_chief(
            context.strategy, context.topology, (own.epochs_done, own.step)
        )
        if epochs_done < 0:
            load_base_weights(context.model, context.config.model.weights)
            if context.topology.is_chief:
                self._folder.start_from(checkpoints.model_arrays(base_of(context.model)))
            return Progress(), None
        checkpoint = newest or self._folder.load(checkpoints.Position(epochs_done, step))
        self.resumed_from = checkpoint.position.file_name
        with checkpoints.fitting(self.resumed_path):
            checkpoints.restore_model(context.model, checkpoint.arrays)
            progress = Progress.of_state(checkpoint.state)
        self.best_arrays = checkpoint.best_arrays
        context.reporter.emit({"kind": "message", "text": f"resuming from {self.resumed_path}"})
        return progress, checkpoint.arrays

    @property
    def resumed_path(self) -> Path:
        return self._path / str(self.resumed_from)

    def restore_best(self) -> None:
        checkpoints.restore_model(self._context.model, self.best_arrays)

    def save(self, state: StageState, progress: Progress) -> None:
        """Begin to write a checkpoint of this moment; the chief alone does."""
        if not self._context.topology.is_chief:
            return
        with progress.timed("checkpoint"):
            self._context.count_time(progress)
            # All of it as it is now: it is written while the training goes on.
            position, written = progress.position, asdict(progress)
            arrays, best, best_arrays = state.arrays(), progress.best.epochs_done, self.best_arrays
            self.writer.write(lambda: self._folder.save(position, arrays, written, best, best_arrays))

    def stop_if_requested(self, state: StageState, progress: Progress) -> None:
        """End the run, with a checkpoint, when that was requested; the other workers end with the chief."""
        if not (self._context.topology.is_chief and self._stop.is_made()):
            return
        self.save(state, progress)
        self.writer.wait()
        kind = self._stop.take() or StoppedError
        raise kind(f"{self._context.run}: stopped with a checkpoint; start the same command again to resume")
