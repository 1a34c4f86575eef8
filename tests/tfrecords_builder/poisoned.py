"""Tasks that end their process at one image, as a decoder does that crashes or takes all memory."""

import os
import signal
from pathlib import Path
from unittest import mock

from tfrecords_builder.writing.parts import EncodedImage, Part
from tfrecords_builder.writing.writer import IngestTask, ingest

POISON = "TEST_POISON"
"""Names the image's file."""


def poisoned_ingest(task: IngestTask) -> Part | EncodedImage:
    if is_poisoned(task):
        os.kill(os.getpid(), signal.SIGKILL)
    return ingest(task)


def half_written_ingest(task: IngestTask) -> Part | EncodedImage:
    """The process ends when the data of the poisoned part has its place and the index has not."""
    replace = Path.replace

    def kill_at_index(self: Path, target: Path) -> Path:
        if target.suffix == ".json":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    if not is_poisoned(task):
        return ingest(task)
    with mock.patch.object(Path, "replace", kill_at_index):
        return ingest(task)


def is_poisoned(task: IngestTask) -> bool:
    return any(file.path.endswith(os.environ[POISON]) for file in task.images)
