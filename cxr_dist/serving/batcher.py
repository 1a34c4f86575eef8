"""Batches of what comes while the model works.

A batch begins when it is full, or when the model is idle and the first in it has waited a moment for others. A full
one also begins beside another that is at work: it takes the cores that the other leaves idle, when one of them is
busy with HTTP and the rest would wait for it, or when the other is between two steps. Beside another, only full ones
do: else what comes one by one would never be a batch.

`serve.batch` closes a batch by the clock alone, whether or not the model is free for it. Under load that makes many
small ones that wait in a row.
"""

import asyncio
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
        self._waiting: dict[asyncio.Future[Result], Item] = {}
        """By the place of each, in the order in which they came."""
        self._working: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def result(self, item: Item) -> Result:
        """Of `item`, in a batch with others. Who is cancelled before the batch begins leaves no trace.

        Raises:
            Exception: what `work` raised, for all of the batch.
        """
        place: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[place] = item
        self._begin_what_may()
        try:
            return await place
        finally:
            self._waiting.pop(place, None)  # of one who was cancelled

    def _begin_what_may(self) -> None:
        while len(self._waiting) >= self._most and len(self._working) < self._at_once:
            self._begin()
        if self._working or not self._waiting:
            self._stop_timer()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._time_is_over)

    def _time_is_over(self) -> None:
        self._timer = None
        if self._waiting:  # or all have left meanwhile
            self._begin()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        batch = {place: self._waiting.pop(place) for place in list(self._waiting)[: self._most]}
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._working.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._working.discard(task)
        self._begin_what_may()

    async def _run(self, batch: dict["asyncio.Future[Result]", Item]) -> None:
        items, loop = list(batch.values()), asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self._work, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
            for place, result in zip(batch, results, strict=True):
                if not place.done():
                    place.set_result(result)
        except Exception as error:  # noqa: BLE001 - it is for those who wait to handle
            for place in batch:
                if not place.done():
                    place.set_exception(error)
        finally:
            for place in batch:
                place.cancel()  # where it has come to neither: nobody waits for ever
