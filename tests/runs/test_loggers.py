"""What people and other processes are told."""

import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr_dist.runs import loggers
from cxr_dist.runs.events import EventFile, EventFollower, Reporters, closing
from cxr_dist.runs.loggers import ConsoleReporter, end_mlflow_run, run_reporters
from cxr_dist.runs.stop_request import StoppedError
from tfrecords_builder.common.errors import UserError

ROW = {
    "stage": 2, "epoch": 3, "epochs_done": 6, "loss": 0.123456, "accuracy": 0.9, "val_loss": 0.5, "val_accuracy": 0.875,
    "images_per_second": 12.34, "seconds": 61.2, "best": True,
}  # fmt: skip


def progress(step: int, steps: int = 10, epoch: int = 1) -> dict[str, Any]:
    return {"kind": "progress", "stage": 1, "epoch": epoch, "step": step, "steps": steps, "images_per_second": 9.87}


EVENTS: list[dict[str, Any]] = [
    {"kind": "message", "text": "resuming from epoch-00003.safetensors"},
    {"kind": "stage", "stage": 1, "epochs": 2, "text": "stage 1: head"},
    progress(1),
    progress(10),
    {"kind": "warning", "text": "damaged"},
    {"kind": "epoch", "row": ROW},
    progress(1, epoch=2),
    {"kind": "epoch", "row": ROW | {"best": False}},
    {"kind": "done", "result": {"workers": 1}},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)

    def close(self, state: str) -> None:
        pass


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream)
    for event in EVENTS:
        reporter.emit(event)
    text = stream.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text), "no control characters"
    epoch = "stage 2 epoch 3: loss 0.1235 accuracy 0.9000 | validation loss 0.5000 accuracy 0.8750 | 12.3 img/s, 61 s"
    assert text.splitlines() == [
        "resuming from epoch-00003.safetensors", "stage 1: head", "warning: damaged", f"{epoch} *", epoch
    ]  # fmt: skip


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Bar(loggers.tqdm):  # type: ignore[misc, type-arg]
        """Draws at every update: a real one waits a tenth of a second."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, mininterval=0, miniters=1)
            made.append(self)

    monkeypatch.setattr(loggers, "tqdm", Bar)
    stream = Terminal()
    reporter = ConsoleReporter(stream)
    for event in [progress(1), progress(4), progress(10)]:
        reporter.emit(event)
    assert len(made) == 1, "one bar an epoch, or neither speed nor time left would be known"
    drawn = stream.getvalue()
    for words in ("\rstage 1 epoch 1", "4/10", "10/10", "9.9 img/s"):
        assert words in drawn
    # The bar is wiped before a line is written, so that the line stands alone.
    reporter.emit({"kind": "warning", "text": "damaged"})
    rest = stream.getvalue()[len(drawn) :]
    wiped, line = rest.rsplit("\r", 1)
    assert (wiped.replace("\r", "").strip(" "), line) == ("", "warning: damaged\n")
    for number, event in enumerate([progress(1, epoch=2), progress(1, 20, epoch=2), progress(20, 20, epoch=2)]):
        reporter.emit(event)
        assert len(made) == 2 + min(number, 1), "another epoch, another number of steps"
    reporter.emit(progress(3, 20, epoch=2))  # the same title once more: the features of another split
    assert len(made) == 4
    assert made[-1].n == 3
    reporter.emit({"kind": "done", "result": {}})
    assert all(bar.disable for bar in made), "closed"


def test_a_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Though its stderr is no terminal. IPython at a terminal is none, either."""
    shell = SimpleNamespace(config={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not loggers.in_notebook()
    shell.config["IPKernelApp"] = {}
    assert loggers.in_notebook()
    made: list[dict[str, Any]] = []

    class Bar:
        n = 0

        def __init__(self, **options: Any) -> None:
            made.append(options)

        def update(self, number: int) -> None:
            self.n += number

        def close(self) -> None:
            made.append({"closed": self.n})

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    with loggers.progress_bar("build") as progress:
        progress(1, 4)
        progress(3, 4)
    assert [made[0]["desc"], made[0]["total"], made[1:]] == ["build", 4, [{"closed": 3}]]
    assert capsys.readouterr() == ("", "")


def test_several_reporters_hear_everything() -> None:
    recorders = [Recorder(), Recorder()]
    for event in EVENTS:
        Reporters(recorders).emit(event)
    assert all(recorder.events == EVENTS for recorder in recorders)


# Between processes


def test_a_follower_passes_on_what_was_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(loggers.time, "monotonic", lambda: float(next(clock)))
    path, recorder = tmp_path / "events.jsonl", Recorder()
    follower = EventFollower(path, recorder)
    follower.poll()  # before there is a file
    writer = EventFile(path)
    for number, event in enumerate(EVENTS):
        writer.emit(event)
        if number % 3 == 0:
            follower.poll()
    follower.poll()
    follower.poll()
    assert recorder.events == EVENTS


def test_a_partial_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path, recorder = tmp_path / "events.jsonl", Recorder()
    follower = EventFollower(path, recorder)
    events = [{"kind": "message", "text": text} for text in ("première", "zweite", "third")]
    data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode()
    for end in range(len(data) + 1):  # byte by byte, also inside a character
        path.write_bytes(data[:end])
        follower.poll()
        assert recorder.events == events[: data[:end].count(b"\n")]
    assert recorder.events == events


def test_a_follower_starts_where_it_was_made(tmp_path: Path) -> None:
    """An interrupted run left events: they were shown then."""
    path, recorder = tmp_path / "events.jsonl", Recorder()
    EventFile(path).emit(EVENTS[0])
    follower = EventFollower(path, recorder)
    EventFile(path).emit(EVENTS[1])
    follower.poll()
    assert recorder.events == [EVENTS[1]]


def test_progress_is_thinned_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now)
    writer = EventFile(tmp_path / "events.jsonl")
    for step in range(100):
        writer.emit(progress(step, 100))
        now += 0.1
        if step % 10 == 0:
            writer.emit({"kind": "message", "text": str(step)})
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "progress"]
    assert 15 <= len(steps) <= 21, "10 s at two a second"
    assert steps == sorted(steps)
    assert [line["text"] for line in lines if line["kind"] == "message"] == [str(step) for step in range(0, 100, 10)]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow

    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return mlflow.MlflowClient(address)


def mlflow_runs(client: Any) -> dict[str, Any]:
    """By name; two of one name fail."""
    runs = client.search_runs([client.get_experiment_by_name("cxr-dist").experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert len(found) == len(runs), "a run is there twice"
    return found


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [
        {"kind": "epoch", "row": {"epochs_done": number, "loss": 1.0 / number, "val_accuracy": number / 100}}
        for number in numbers
    ]


def reported(run: Path, *numbers: int, error: BaseException | None = None, params: Any = None) -> None:
    """A process of a run: its epochs, and its end."""
    owned = Reporters(run_reporters(run, run.name, params))
    with suppress(*([type(error)] if error else [])), closing(owned):
        for event in rows(*numbers):
            owned.emit(event)
        if error is not None:
            raise error


def test_mlflow_has_a_run_for_each_trial_with_what_it_set_and_its_curve(tmp_path: Path, mlflow_client: Any) -> None:
    for number in (1, 2):
        reported(tmp_path / f"trial-{number}", 1, 2, params={"model.dropout": number / 10})
    found = mlflow_runs(mlflow_client)
    assert set(found) == {"trial-1", "trial-2"}
    assert found["trial-2"].data.params == {"model.dropout": "0.2"}
    assert found["trial-2"].info.status == "FINISHED"
    curve = mlflow_client.get_metric_history(found["trial-2"].info.run_id, "val_accuracy")
    assert [(point.step, point.value) for point in curve] == [(1, 0.01), (2, 0.02)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("diverged"), "FAILED"),
        (UserError("damaged"), "FAILED"),
        (StoppedError("on request"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(0), "KILLED"),
    ],
)
def test_mlflow_hears_how_a_run_ended(
    tmp_path: Path, mlflow_client: Any, error: BaseException | None, status: str
) -> None:
    reported(tmp_path / "run", 1, error=error)
    assert mlflow_runs(mlflow_client)["run"].info.status == status


def test_a_resumed_run_is_the_same_one_and_each_epoch_is_there_once(tmp_path: Path, mlflow_client: Any) -> None:
    """Killed without a word, then failed, then finished: a checkpoint may be older than the last epoch reported."""
    run = tmp_path / "run"
    for reporter in run_reporters(run, "run"):
        for event in rows(1, 2, 3):
            reporter.emit(event)
    assert mlflow_runs(mlflow_client)["run"].info.status == "RUNNING"
    end_mlflow_run(run, "failed")  # whoever started the process that was killed
    assert mlflow_runs(mlflow_client)["run"].info.status == "FAILED"
    end_mlflow_run(run, "killed")
    assert mlflow_runs(mlflow_client)["run"].info.status == "FAILED", "it had ended"
    reported(run, 2, 3, 4, error=ValueError("lost"))
    reported(run, 4, 5)
    found = mlflow_runs(mlflow_client)["run"]
    assert found.info.status == "FINISHED"
    curve = mlflow_client.get_metric_history(found.info.run_id, "val_accuracy")
    assert [(point.step, point.value) for point in curve] == [(number, number / 100) for number in range(1, 6)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    # Files of the same second are read in any order.
    assert sorted(event.step for event in events.Tensors("val_accuracy")) == [1, 2, 3, 4, 5]


def test_a_run_that_the_server_does_not_know_is_a_new_one_there(tmp_path: Path, mlflow_client: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    reported(run, 1)
    assert mlflow_runs(mlflow_client)["run"].info.status == "FINISHED"
    end_mlflow_run(tmp_path / "never", "failed")


def test_every_reporter_is_closed_and_the_first_error_is_raised(tmp_path: Path) -> None:
    closed: list[str] = []

    class Closed(Recorder):
        def __init__(self, name: str) -> None:
            self._name = name

        def close(self, state: str) -> None:
            closed.append(f"{self._name} {state}")
            raise OSError("no server")

    with pytest.raises(ValueError, match="diverged") as raised, closing(Reporters([Closed("a"), Closed("b")])):
        raise ValueError("diverged")
    assert sorted(closed) == ["a failed", "b failed"]
    assert "could not be closed: no server" in raised.value.__notes__[0]


def test_mlflow_that_is_set_up_and_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="unset it, or install MLflow: pip install"):
        run_reporters(tmp_path, "run")
