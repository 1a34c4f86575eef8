"""Run functions over tasks in processes, results in order; in this process when one worker is asked for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from tfrecords_builder.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Worker processes, started when first needed. A context manager.

    Processes are spawned, not forked: a fork copies locks that other threads hold (Arrow's, TensorFlow's).
    On leaving, tasks that have not begun are dropped and the processes have ended.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers: must be at least 1, not {workers}")
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_child)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(task)` for each task, in order; `function` must be importable by name.

        Raises:
            UserError: A worker process was killed.
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        futures: list[Future[Any]] = []
        try:
            futures = [self._executor.submit(function, task) for task in tasks]
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "workers: a worker process ended early, perhaps killed for want of memory; try again with --workers 1"
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def prepare_child() -> None:
    """Called first in a process that serves its parent: it ends with it, and leaves Ctrl-C to it."""
    # Ctrl-C reaches the whole process group. The parent alone answers it: it stops handing out tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    # A parent that is killed tells its workers nothing, and they would wait for tasks for ever.
    parent.join()
    os._exit(1)
