"""A first stage that several trials have in common runs once: the others begin with what it left.

A checkpoint decides all that follows. So the trial that runs the stage copies its last one aside, and a trial with
equal settings copies it into its own run, where the loop goes on from it as from any other.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxr_dist import run_folder
from cxr_dist.checkpoint import CheckpointFolder, Position
from cxr_dist.config import Config
from cxr_dist.reporting import Event
from tfrecords_builder import locks
from tfrecords_builder.files import sync


def first_stage_key(config: Config, fingerprint: str, replicas: int) -> str | None:
    """Equal for trials whose first stage does the same; None where no stage follows one."""
    numbers = [number for number in sorted(config.stages) if config.stages[number].epochs]
    if len(numbers) < 2:
        return None
    tree = config.tree()
    tree["stages"] = {str(numbers[0]): config.stages[numbers[0]].model_dump(mode="json")}
    described = {"config": tree, "dataset": fingerprint, "replicas": replicas}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


class FirstStages:
    """Finished first stages of a search, by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def used_by(self, run: Path, key: str | None) -> Iterator["Publisher"]:
        """Give `run` the stage if another trial has finished it; wait if one is running it; else be the one that does.

        A run that has checkpoints goes on from its own.
        """
        checkpoints = run / run_folder.CHECKPOINTS
        if key is None or any(checkpoints.glob("*.npz")):
            yield Publisher()
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = self._folder / key
        lock = locks.acquire(self._folder / f"{key}.lock", wait_s=locks.FOREVER)
        publisher = Publisher(run, entry, lock)
        try:
            if entry.is_dir():
                _copy(entry, checkpoints)
                publisher.give_up_lock()
            yield publisher
        finally:
            publisher.give_up_lock()


class Publisher:
    """Listens to a run, and keeps its first stage for others when the next one begins."""

    def __init__(self, run: Path | None = None, entry: Path | None = None, lock: int | None = None) -> None:
        self._run, self._entry, self._lock = run, entry, lock
        self._first: int | None = None

    def emit(self, event: Event) -> None:
        if event["kind"] != "stage" or self._lock is None or self._run is None or self._entry is None:
            return
        if self._first is None:
            self._first = event["stage"]
        elif event["stage"] != self._first:
            self._publish(self._run, self._entry, self._first)
            self.give_up_lock()

    def _publish(self, run: Path, entry: Path, stage: int) -> None:
        checkpoints = run / run_folder.CHECKPOINTS
        folder = CheckpointFolder(checkpoints)
        found = folder.newest(lambda _: None)
        # Heard of from another process the event may be late, and the newest checkpoint of the stage after.
        if found is None or found[2]["stage"] != stage or entry.exists():
            return
        position, _, state = found
        best = folder.best(state["best"]["epochs_done"])
        work = entry.with_name(f".{entry.name}.{os.getpid()}")
        work.mkdir()
        for path in (checkpoints / position.file_name, best):
            shutil.copyfile(path, work / path.name)
            sync(work / path.name)
        work.rename(entry)
        sync(entry.parent)

    def give_up_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _copy(entry: Path, checkpoints: Path) -> None:
    """The best weights first: a checkpoint is looked for by its own name, and needs them."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in sorted(entry.iterdir(), key=lambda path: Position.of_file(path.name) is not None):
        copied = checkpoints / f".{path.name}.copy"
        shutil.copyfile(path, copied)
        copied.rename(checkpoints / path.name)
