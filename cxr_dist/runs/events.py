"""What a run tells while it runs: events, who listens, and the file between processes."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from cxr_dist.runs.stop_request import StoppedError

Event = Mapping[str, Any]


EndState = Literal["finished", "failed", "killed"]
"""How a run's process left it; `killed` is ended on request, or stopped early by a search."""


class Reporter(Protocol):
    """Takes events: `kind` is one of message, warning, stage, progress, epoch, done.

    - message, warning: `text`
    - stage: `stage`, `epochs`, `steps_per_epoch`, `text`
    - progress: `stage`, `epoch`, `step`, `steps`, `images_per_second`
    - epoch: `row`, as it stands in history.jsonl
    - done: `result`, as it stands in result.json
    """

    def emit(self, event: Event) -> None: ...

    def close(self, state: EndState) -> None:
        """Take no more events; called once, by whoever made the reporter."""
        return  # nothing to close, unless a class says otherwise


@contextmanager
def closing(reporter: Reporter) -> Iterator[None]:
    """Close `reporter` at the end, with how the end came about."""
    try:
        yield
    except BaseException as error:
        is_request = isinstance(error, StoppedError) or not isinstance(error, Exception)
        try:
            reporter.close("killed" if is_request else "failed")
        except Exception as problem:  # noqa: BLE001 - the error that ended the run is the one to raise
            error.add_note(f"and its reporters could not be closed: {problem}")
        raise
    reporter.close("finished")


class Reporters(Reporter):
    """Passes every event to each of several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def emit(self, event: Event) -> None:
        for reporter in self._reporters:
            reporter.emit(event)

    def close(self, state: EndState) -> None:
        with ExitStack() as held:  # each, whatever happens to another
            for reporter in self._reporters:
                held.callback(reporter.close, state)


class EventFile(Reporter):
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

    def close(self, state: EndState) -> None:
        self._file.close()


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
