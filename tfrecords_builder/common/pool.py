"""Run functions over tasks in processes, results in order; in this process when one worker is asked for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.interrupts import interrupts_held

Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3
"""At a task whose process is killed while it runs alone: a process may be killed for no fault of its task."""


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
        self._workers = workers
        self._executor = _executor(workers) if workers > 1 else None

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(task)` for each task, in order; `function` must be importable by name.

        When a process is killed, which of the tasks in progress it was for is not known. So the first of them runs
        again alone: it ends, or it is to blame. Then the rest goes on in new processes. Every loss is followed by a
        task that ends, so the number of losses is bounded.

        Raises:
            UserError: A task's process was killed ATTEMPTS times while it ran alone.
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        futures: list[Future[Any]] = []
        try:
            futures = [_submit(self._executor, function, task) for task in tasks]
            for number, task in enumerate(tasks):
                try:
                    result = futures[number].result()
                except BrokenProcessPool:
                    self._executor.shutdown()
                    result = _run_alone(function, task)
                    self._executor = _executor(self._workers)
                    for later in range(number + 1, len(tasks)):
                        if not _is_done(futures[later]):
                            futures[later] = _submit(self._executor, function, tasks[later])
                yield result
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def lost_task(task: object, attempts: int, why: str) -> UserError:
    """What to tell the user when no attempt at a task came to its end."""
    return UserError(
        f"{task}: the process was lost {attempts} times ({why}); if a file is the cause, replace it; decoded "
        "images are kept: start the same command again to resume"
    )


def _executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=prepare_child)


def _submit(executor: ProcessPoolExecutor, function: Callable[[Task], Result], task: Task) -> Future[Any]:
    """The future of a task, also where the pool is broken already."""
    try:
        with interrupts_held():  # submitting starts processes
            return executor.submit(function, task)
    except BrokenProcessPool as error:
        lost: Future[Any] = Future()
        lost.set_exception(error)
        return lost


def _run_alone(function: Callable[[Task], Result], task: Task) -> Result:
    """`function(task)`, in a process of its own while no other runs."""
    for _ in range(ATTEMPTS):
        with _executor(1) as executor:
            try:
                return _submit(executor, function, task).result()
            except BrokenProcessPool:
                continue
    raise lost_task(task, ATTEMPTS, "killed while it ran alone, perhaps out of memory")


def _is_done(future: Future[Any]) -> bool:
    """Whether a future of a broken pool has a result, or an error of the task's own."""
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


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
