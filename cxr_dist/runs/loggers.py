"""What a run tells while it runs: events, and those who listen.

The loop speaks to one `Reporter`. Events are plain data, so that a worker in another process can write
them to a file and the process at the terminal can show them.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cxr_dist.runs.events import EndState, Event, Reporter
from cxr_dist.runs.run_folder import TENSORBOARD
from tfrecords_builder.common.errors import UserError, reading
from tfrecords_builder.common.files import write_json
from tfrecords_builder.common.installation import install_command


class ConsoleReporter(Reporter):
    """Progress bars in a terminal or a notebook, plain lines otherwise."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._live = _shows_bars(self._stream)

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

    def close(self, state: EndState) -> None:
        self._close()

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _progress(self, event: Event) -> None:
        if not self._live:
            return
        title = f"stage {event['stage']} epoch {event['epoch']}"
        bar = self._bar
        if bar is None or (bar.desc, bar.total) != (title, event["steps"]) or event["step"] < bar.n:
            self._close()
            bar = self._bar = _bar(total=event["steps"], desc=title, unit="step", file=self._stream, leave=False)
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


class TensorBoardReporter(Reporter):
    """Scalars of every epoch for TensorBoard; an epoch that a resumed run repeats is there already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._last = 0

    def emit(self, event: Event) -> None:
        if event["kind"] != "epoch":
            return
        import tensorflow as tf
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        if self._writer is None:
            # Not before: it starts TensorFlow, and a multi-worker strategy has to be made ahead of that.
            paths = self._folder.glob("*tfevents*")
            steps = (event.step for path in paths for event in EventFileLoader(str(path)).Load())
            self._last = max(steps, default=0)
            self._writer = tf.summary.create_file_writer(str(self._folder))
        row = event["row"]
        if row["epochs_done"] <= self._last:
            return
        with self._writer.as_default(step=row["epochs_done"]):
            for key, value in row.items():
                if isinstance(value, float):
                    tf.summary.scalar(key, value)
        self._writer.flush()

    def close(self, state: EndState) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


MLFLOW = "mlflow.json"
"""In a run's folder: the number of the run in MLflow."""
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"


class MLflowReporter(Reporter):
    """The run in MLflow, at $MLFLOW_TRACKING_URI: its figures by epoch, and what a trial set.

    The run's folder keeps the number of the run there, which a resumed run then continues.
    """

    def __init__(self, run: Path, name: str, params: Mapping[str, bool | int | float | str]) -> None:
        self._client, known = _mlflow_run(run)
        self._last = 0
        if known is not None:
            self._run = known.info.run_id
            self._client.update_run(self._run, status="RUNNING")
            self._last = max((point.step for point in self._client.get_metric_history(self._run, "loss")), default=0)
            return
        name_of_experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cxr-dist")
        experiment = self._client.get_experiment_by_name(name_of_experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name_of_experiment)
        # By client and number: MLflow's own notion of an active run belongs to a process, which may run many trials.
        self._run = self._client.create_run(number, run_name=name).info.run_id
        write_json(run / MLFLOW, {"run_id": self._run})
        for key, value in params.items():
            self._client.log_param(self._run, key, value)

    def emit(self, event: Event) -> None:
        if event["kind"] != "epoch" or event["row"]["epochs_done"] <= self._last:
            return
        for key, value in event["row"].items():
            if isinstance(value, float):
                self._client.log_metric(self._run, key, value, step=event["row"]["epochs_done"])

    def close(self, state: EndState) -> None:
        self._client.set_terminated(self._run, state.upper())


def end_mlflow_run(run: Path, state: EndState) -> None:
    """End the run in MLflow whose own process was killed; nothing where it has ended, or MLflow is not set up."""
    if not os.environ.get(MLFLOW_VARIABLE) or not (run / MLFLOW).is_file():
        return
    client, known = _mlflow_run(run)
    if known is not None and known.info.status == "RUNNING":
        client.set_terminated(known.info.run_id, state.upper())


def _mlflow_run(run: Path) -> tuple[Any, Any]:
    """A client of MLflow, and the run that the folder names as the server has it; None where it has none."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError(
            f"{MLFLOW_VARIABLE}: is set, but MLflow is not installed; unset it, or install MLflow: "
            f"{install_command('mlflow')}"
        ) from None
    client, path = MlflowClient(), run / MLFLOW
    if not path.is_file():
        return client, None
    with reading(path, "remove it to start a new run in MLflow"):
        number = json.loads(path.read_text(encoding="utf-8"))["run_id"]
    try:
        return client, client.get_run(number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return client, None


def run_reporters(run: Path, name: str, params: Mapping[str, bool | int | float | str] | None = None) -> list[Reporter]:
    """Those who keep a run's figures for other programs: TensorBoard, and MLflow where it is set up.

    Args:
        run: The run's folder.
        name: Of the run, in MLflow.
        params: What a trial sets, for MLflow.

    Raises:
        UserError: MLflow is set up and not installed.
    """
    reporters: list[Reporter] = [TensorBoardReporter(run / TENSORBOARD)]
    if os.environ.get(MLFLOW_VARIABLE):
        reporters.append(MLflowReporter(run, name, params or {}))
    return reporters


@contextmanager
def progress_bar(title: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal or a notebook, from the first `unit` on; otherwise a line now and then, for a log."""
    live = _shows_bars(sys.stderr)
    bar: tqdm[Any] | None = None
    spoken = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal bar, spoken
        if live:
            if bar is None:
                bar = _bar(desc=title, unit=f" {unit}", total=total, file=sys.stderr, leave=False)
            bar.update(done - bar.n)
        elif time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            print(f"{title}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _shows_bars(stream: IO[str]) -> bool:
    return stream.isatty() or in_notebook()


def _bar(**options: Any) -> "tqdm[Any]":
    """A progress bar that suits where it is shown."""
    if not in_notebook():
        return tqdm(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where Jupyter's widgets are not installed, the bar is of letters
        from tqdm.auto import tqdm as bar

    return bar(**options)


SECONDS_BETWEEN_LINES = 15.0
