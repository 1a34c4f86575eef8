"""A task that ends its process at one image, as a decoder does that crashes or takes all memory."""

import os
import signal

from tfrecords_builder.writing.parts import EncodedImage, Part
from tfrecords_builder.writing.writer import IngestTask, ingest

POISON = "TEST_POISON"
"""Names the image's file."""


def poisoned_ingest(task: IngestTask) -> Part | EncodedImage:
    if any(file.path.endswith(os.environ[POISON]) for file in task.images):
        os.kill(os.getpid(), signal.SIGKILL)
    return ingest(task)
