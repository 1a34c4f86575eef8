"""Batches of what comes while the model works.

A batch begins when it is full, or when the model is idle and the first in it has waited a moment for others. A full
one also begins beside another that is at work: it takes the cores that the other leaves idle, when one of them is
busy with HTTP and the rest would wait for it, or when the other is between two steps. Beside another, only full ones
do: else what comes one by one would never be a batch.

`serve.batch` closes a batch by the clock alone, whether or not the model is free for it. Under load that makes many
small ones that wait in a row.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """First come, first served. Lives on one event loop; what it calls runs in threads of its own."""

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], *, most: int, wait_s: float, at_once: int
    ) -> None:
        """Args:
        work: Results for items, in their order. Called from several threads.
        most: Items in a batch.
        wait_s: How long the first of a batch waits for others while nothing is at work.
        at_once: Batches at work.
        """
        self._work, self._most, self._wait_s, self._at_once = work, most, wait_s, at_once
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="model")
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._working: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def result(self, item: Item) -> Result:
        """Of `item`, in a batch with others. Who is cancelled before the batch begins leaves no trace.

        Raises:
            Exception: what `work` raised, for all of the batch.
        """
        place: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, place))
        self._begin_what_may()
        return await place

    def _begin_what_may(self, *, waited: bool = False) -> None:
        """Args:
        waited: Whether the first in line has waited its moment.
        """
        first = self._waiting[0] if self._waiting else None
        self._waiting = deque(each for each in self._waiting if not each[1].done())  # who is done was cancelled
        if not waited and not (self._waiting and self._waiting[0] is first):
            self._stop_timer()  # it was of one who has left
        while len(self._waiting) >= self._most and len(self._working) < self._at_once:
            self._begin()
        if not self._waiting or self._working:
            self._stop_timer()
        elif waited:
            self._begin()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._time_is_over)

    def _time_is_over(self) -> None:
        self._timer = None
        self._begin_what_may(waited=True)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._working.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._working.discard(task)
        self._begin_what_may()

    async def _run(self, batch: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        items, places = [item for item, _ in batch], [place for _, place in batch]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self._work, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except BaseException as error:
            for place in places:
                if not place.done():  # for those who wait to handle; what ends the process is not theirs
                    place.set_exception(error if isinstance(error, Exception) else RuntimeError("the work was ended"))
            if not isinstance(error, Exception):
                raise
        else:
            for place, result in zip(places, results, strict=True):
                if not place.done():
                    place.set_result(result)
