"""Workers of the builder as Ray tasks: a source on shared storage is decoded by all machines of a cluster."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tfrecords_builder.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT_PER_CPU = 4
"""Enough that no processor waits, few enough that results do not pile up before an earlier, slow one."""


class RayPool:
    """Runs functions over tasks on the cluster that this process is connected to, results in order.

    A task whose machine is lost is run again elsewhere: it writes its file under another name and renames it, so
    twice is as good as once.
    """

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(task)` for each task, in order.

        Raises:
            UserError: What `function` raised, or that a task could not be run at all.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        waiting: deque[Any] = deque()
        pending = iter(tasks)
        try:
            for task in pending:
                waiting.append(remote.remote(task))
                if len(waiting) >= IN_FLIGHT_PER_CPU * max(cpus, 1):
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except RayTaskError as error:
            # Ray's own text is a traceback from the worker; the cause is what the function raised.
            raise error.cause from None
        except RayError as error:
            raise UserError(
                f"--launcher ray: a task could not be run ({' '.join(str(error).split())[:200]}); start the same "
                "command again to go on"
            ) from None
        finally:
            for reference in waiting:
                ray.cancel(reference)
