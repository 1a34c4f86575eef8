"""What a run tells while it runs: events, and those who listen.

The loop speaks to one `Reporter`. Events are plain data, so that a worker in another process can write
them to a file and the process at the terminal can show them.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from tfrecords_builder.errors import UserError

Event = Mapping[str, Any]


class Reporter(Protocol):
    """Takes events: `kind` is one of message, warning, stage, progress, epoch, done.

    - message, warning: `text`
    - stage: `stage`, `epochs`, `steps_per_epoch`, `text`
    - progress: `stage`, `epoch`, `step`, `steps`, `images_per_second`
    - epoch: `row`, as it stands in history.jsonl
    - done: `result`, as it stands in result.json
    """

    def emit(self, event: Event) -> None: ...


class Reporters:
    """Passes every event to each of several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def emit(self, event: Event) -> None:
        for reporter in self._reporters:
            reporter.emit(event)


class ConsoleReporter:
    """Progress bars in a terminal, plain lines otherwise."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._live = self._stream.isatty()

    def emit(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "progress":
            self._progress(event)
            return
        self._close()
        if kind in ("message", "stage"):
            self._line(event["text"])
        elif kind == "warning":
            self._line(f"warning: {event['text']}")
        elif kind == "epoch":
            self._line(epoch_line(event["row"]))

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _progress(self, event: Event) -> None:
        if not self._live:
            return
        title = f"stage {event['stage']} epoch {event['epoch']}"
        bar = self._bar
        if bar is None or (bar.desc, bar.total) != (title, event["steps"]) or event["step"] < bar.n:
            self._close()
            bar = self._bar = tqdm(total=event["steps"], desc=title, unit="step", file=self._stream, leave=False)
        bar.set_postfix_str(f"{event['images_per_second']:.1f} img/s", refresh=False)
        bar.update(event["step"] - bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def epoch_line(row: Mapping[str, Any]) -> str:
    """One line for people."""
    return (
        f"stage {row['stage']} epoch {row['epoch']}: "
        f"loss {row['loss']:.4f} accuracy {row['accuracy']:.4f} | "
        f"validation loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.4f} | "
        f"{row['images_per_second']:.1f} img/s, {row['seconds']:.0f} s" + (" *" if row["best"] else "")
    )


class TensorBoardReporter:
    """Scalars of every epoch for TensorBoard, and for its HParams page what a trial set."""

    def __init__(self, folder: Path, hparams: Mapping[str, bool | int | float | str] | None = None) -> None:
        self._folder, self._hparams = folder, hparams
        self._writer: Any = None

    def emit(self, event: Event) -> None:
        if event["kind"] != "epoch":
            return
        import tensorflow as tf

        if self._writer is None:
            # Not before: it starts TensorFlow, and a multi-worker strategy has to be made ahead of that.
            self._writer = tf.summary.create_file_writer(str(self._folder))
            if self._hparams:
                from tensorboard.plugins.hparams import api

                with self._writer.as_default():
                    api.hparams(dict(self._hparams), trial_id=self._folder.parent.name)
        row = event["row"]
        with self._writer.as_default(step=row["epochs_done"]):
            for key, value in row.items():
                if isinstance(value, float):
                    tf.summary.scalar(key, value)
        self._writer.flush()


class MLflowReporter:
    """The run in MLflow, at $MLFLOW_TRACKING_URI: its figures by epoch, and what a trial set."""

    def __init__(self, name: str, params: Mapping[str, bool | int | float | str]) -> None:
        try:
            import mlflow
        except ImportError:
            raise UserError(
                f"{MLFLOW_VARIABLE}: is set, and MLflow is not installed; install the extra mlflow, or unset it"
            ) from None
        self._client = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cxr-dist")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        # By client and number: MLflow's own notion of an active run belongs to a process, which may run many trials.
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for key, value in params.items():
            self._client.log_param(self._run, key, value)

    def emit(self, event: Event) -> None:
        if event["kind"] == "epoch":
            row = event["row"]
            for key, value in row.items():
                if isinstance(value, float):
                    self._client.log_metric(self._run, key, value, step=row["epochs_done"])
        elif event["kind"] == "done":
            self._client.set_terminated(self._run)


MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"


def run_reporters(
    tensorboard: Path, name: str, hparams: Mapping[str, bool | int | float | str] | None = None
) -> list[Reporter]:
    """Those who keep a run's figures for other programs: TensorBoard, and MLflow where it is set up.

    Raises:
        UserError: MLflow is set up and not installed.
    """
    found: list[Reporter] = [TensorBoardReporter(tensorboard, hparams)]
    if os.environ.get(MLFLOW_VARIABLE):
        found.append(MLflowReporter(name, hparams or {}))
    return found


class EventFile:
    """Appends events to a file, for another process to follow; progress at most twice a second."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._last_progress = 0.0

    def emit(self, event: Event) -> None:
        if event["kind"] == "progress":
            now = time.monotonic()
            if now - self._last_progress < 0.5:
                return
            self._last_progress = now
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


class EventFollower:
    """Reads what an `EventFile` appends and passes whole lines on."""

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self._path, self._reporter = path, reporter
        self._offset = path.stat().st_size if path.exists() else 0

    def poll(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._reporter.emit(json.loads(line))


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal, from the first image on; otherwise a line now and then, for a log."""
    live = sys.stderr.isatty()
    bar: tqdm[Any] | None = None
    spoken = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal bar, spoken
        if live:
            if bar is None:
                bar = tqdm(desc=title, unit="img", total=total, file=sys.stderr, leave=False)
            bar.update(done - bar.n)
        elif time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            print(f"{title}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


SECONDS_BETWEEN_LINES = 15.0
