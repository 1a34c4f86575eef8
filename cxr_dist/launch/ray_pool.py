"""Workers of the builder as Ray tasks: a source on shared storage is decoded by all machines of a cluster."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from tfrecords_builder.common.pool import lost_task

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT_PER_CPU = 4
"""Enough that no processor waits, few enough that results do not pile up before an earlier, slow one."""
PAUSES_S = (0.0, 1.0, 10.0)
"""Before each further attempt at a task that was lost: a machine that is short of memory gets some time."""
STOP_S = 30.0
"""For tasks that are in progress when a build fails."""


class RayPool:
    """Runs functions over tasks on the cluster that this process is connected to, results in order.

    A task whose process or machine is lost runs again elsewhere, and the lost one may still be running: functions must
    leave the same whatever the number of attempts, also at the same time.
    """

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(task)` for each task, in order.

        Raises:
            UserError: What `function` raised, or that no attempt at a task came to its end.
        """
        import ray

        # The attempts are counted here: Ray itself has no bound for processes that its memory monitor ends, so an
        # image that takes all memory would be tried for ever.
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        waiting: deque[tuple[Task, Any]] = deque()
        pending = iter(tasks)
        try:
            while True:
                for task in islice(pending, IN_FLIGHT_PER_CPU * max(cpus, 1) - len(waiting)):
                    waiting.append((task, remote.remote(task)))
                if not waiting:
                    return
                yield _result(remote, *waiting.popleft())
        finally:
            references = [reference for _, reference in waiting]
            for reference in references:
                ray.cancel(reference)
            if references:  # what they write is in nobody's way then
                ray.wait(references, num_returns=len(references), timeout=STOP_S)


def _result(remote: Any, task: Task, reference: Any) -> Any:
    """The result of the task, of a further attempt if the first one was lost."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    lost: RayError | None = None
    for pause_s in (*PAUSES_S, None):
        try:
            return ray.get(reference)
        except RayTaskError as error:
            # Ray's own text is a traceback from the worker; the cause is what the function raised.
            raise error.cause from None
        except RayError as error:
            lost = error
        if pause_s is not None:
            time.sleep(pause_s)
            reference = remote.remote(task)
    raise lost_task(task, len(PAUSES_S) + 1, " ".join(str(lost).split())[:200]) from None
