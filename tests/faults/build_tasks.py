"""The tasks of a build, slowed down, with a line in a log for everything that they do: what a killer goes by.

A line is `PID WHAT NUMBER-OR-NAME`: `decode` (an image of the part), `whole` (the part is on the disk), `record` (of
the shard). The log lies beside the dataset. Where a killer has named a line, the processes that have come to it
wait for the kill: on a busy machine the killer may be slower than the build.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tfrecords_builder.format import tfrecord
from tfrecords_builder.images import decode as images
from tfrecords_builder.writing import parts, writer

LOG = "log.txt"
FATAL_LINE = "fatal-line.txt"
"""A file with the number of the line at which a process is to be killed, from 1. It is removed after the kill."""
SLOW_S = 0.01
WAIT_S = 300.0


def ingest(task: writer.IngestTask) -> parts.Part | parts.EncodedImage:
    log = Log(task.folder)
    decode, write = images.decode_gray, parts.write_part

    def slow_decode(data: bytes, path: Path) -> images.Decoded:
        log.add("decode", task.number)
        return decode(data, path)

    def logged_write(*arguments: Any) -> parts.Part:
        part = write(*arguments)
        log.add("whole", task.number)
        return part

    with mock.patch.object(images, "decode_gray", slow_decode), mock.patch.object(parts, "write_part", logged_write):
        return writer.ingest(task)


def write_shard(task: writer.ShardTask) -> writer.WrittenShard:
    log = Log(task.folder)
    write = tfrecord.RecordWriter.write

    def slow_write(self: tfrecord.RecordWriter, payload: bytes) -> int:
        log.add("record", task.name)
        self._file.flush()  # so that a kill leaves a part of the shard
        return write(self, payload)

    with mock.patch.object(tfrecord.RecordWriter, "write", slow_write):
        return writer.write_shard(task)


class Log:
    """Of the build with this work folder."""

    def __init__(self, work: Path) -> None:
        self._path = work.parent.parent / LOG
        self._fatal = self._path.with_name(FATAL_LINE)

    def add(self, what: str, which: object) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{os.getpid()} {what} {which}\n".encode())
        os.close(descriptor)
        time.sleep(SLOW_S)
        self._wait_for_kill()

    def _wait_for_kill(self) -> None:
        limit = time.monotonic() + WAIT_S
        while time.monotonic() < limit:
            try:
                fatal = int(self._fatal.read_text())
            except FileNotFoundError:
                return
            if len(self.lines()) < fatal:
                return
            time.sleep(SLOW_S)

    def name_fatal(self, number: int) -> None:
        """The writer of this line waits to be killed."""
        self._fatal.parent.mkdir(parents=True, exist_ok=True)
        self._fatal.write_text(str(number))

    def forget_fatal(self) -> None:
        self._fatal.unlink()

    def lines(self) -> list[list[str]]:
        text = self._path.read_text() if self._path.exists() else ""
        whole, _, _ = text.rpartition("\n")  # the last line may be in the middle of being written
        return [line.split() for line in whole.splitlines()]


@contextmanager
def logged_tasks() -> Iterator[None]:
    """Builds in this block do these tasks."""
    from tfrecords_builder import build

    with mock.patch.object(build, "ingest", ingest), mock.patch.object(build, "write_shard", write_shard):
        yield
