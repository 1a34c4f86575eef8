"""What trials have in common on the disk: base weights, and first stages.

A first stage that several trials have in common runs once. A checkpoint decides all that follows. So the trial that
runs the stage puts its last one aside, and a trial with equal settings takes it into its own run, where the loop
resumes from it as from any other.

Files are shared by hard links: they are never changed in place, and each run's folder stays complete by itself.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import BASE_PATTERN, CheckpointFolder, Position
from cxr_dist.runs.events import Event, Reporter, Reporters
from tfrecords_builder.common import locks
from tfrecords_builder.common.files import move_durably, sync


class SharedBase(Reporter):
    """Listens to a run, and lets the trials of a search have one file of the base weights that they start from."""

    def __init__(self, folder: Path, run: Path) -> None:
        self._folder, self._checkpoints = folder, run / run_folder.CHECKPOINTS
        self._is_shared = False

    @contextmanager
    def used(self) -> Iterator["SharedBase"]:
        """Give the run what other trials have written; the run keeps what has the name of its own weights."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(BASE_PATTERN):
            if not (self._checkpoints / path.name).exists():
                _link(path, self._checkpoints / path.name)
        try:
            yield self
        finally:
            self._share()

    def emit(self, event: Event) -> None:
        if event["kind"] == "epoch" and not self._is_shared:
            self._share()

    def _share(self) -> None:
        """Give others what the run has written; of two that wrote the same, the first is kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._checkpoints.glob(BASE_PATTERN):
            shared = self._folder / path.name
            self._is_shared = path.samefile(shared) if shared.exists() else _link(path, shared)
            if not self._is_shared:
                self._is_shared = _link(shared, path)


_NO_LINKS = frozenset((errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.ENOENT))
"""ENOENT: another trial removed the file meanwhile."""


def _link(source: Path, target: Path) -> bool:
    """Give a whole file a second name, in place of what has that name; False where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    temporary.replace(target)
    sync(target.parent)
    return True


def _copy(source: Path, target: Path) -> None:
    """By a link where the file system has them."""
    if not _link(source, target):
        copied = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        shutil.copyfile(source, copied)
        move_durably(copied, target)


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
    def used_by(self, run: Path, key: str | None) -> Iterator[Reporter]:
        """Give `run` the stage if another trial has finished it; wait if one is running it; else be the one that does.

        A run that has checkpoints goes on from its own.
        """
        checkpoints = run / run_folder.CHECKPOINTS
        if key is None or CheckpointFolder(checkpoints).newest_position() is not None:
            yield Reporters([])
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        publisher = _Publisher(checkpoints, self._folder / key)
        try:
            if publisher.entry.is_dir():
                checkpoints.mkdir(parents=True, exist_ok=True)
                # The checkpoint last: it is looked for by its own name, and needs the other files.
                files = sorted(publisher.entry.iterdir(), key=lambda path: Position.of_file(path.name) is not None)
                for path in files:
                    _copy(path, checkpoints / path.name)
                publisher.give_up_lock()
            yield publisher
        finally:
            publisher.give_up_lock()


class _Publisher(Reporter):
    """Listens to a run while it holds the lock of its first stage, and keeps the stage for others when it has ended."""

    def __init__(self, checkpoints: Path, entry: Path) -> None:
        self._checkpoints, self.entry = checkpoints, entry
        self._lock = locks.acquire(entry.with_name(f"{entry.name}.lock"), wait_s=locks.FOREVER)
        self._stage: int | None = None

    def emit(self, event: Event) -> None:
        if event["kind"] != "stage" or self._lock is None:
            return
        if self._stage is None:
            self._stage = event["stage"]
        elif event["stage"] != self._stage:
            self._publish()
            self.give_up_lock()

    def _publish(self) -> None:
        folder = CheckpointFolder(self._checkpoints)
        newest = folder.newest(lambda _: None)
        # Heard of from another process the event may be late, and the newest checkpoint of the stage after.
        if newest is None or newest.state["stage"] != self._stage or self.entry.exists():
            return
        work = self.entry.with_name(f".{self.entry.name}.{os.getpid()}")
        work.mkdir()
        for path in folder.files_of(newest.position):
            _copy(path, work / path.name)
        work.rename(self.entry)
        sync(self.entry.parent)

    def give_up_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
