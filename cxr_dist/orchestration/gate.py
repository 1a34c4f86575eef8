"""Who may join the next batch: nobody while the model works, and then no more than a batch.

`serve.batch` closes a batch when its time is over, whether or not the model is free for it. Under load that makes
many small ones that wait in a row. Behind a gate, what comes while the model works waits in one place, and goes on
together. The gate opens when all have left, and not when the model has ended: between the closing of a batch and the
model's beginning some slip in, and would else be a small batch of their own for ever, with others taking the places
of those who leave.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Gate:
    """First come, first admitted. Lives on one event loop."""

    def __init__(self, room: int) -> None:
        """Args:
        room: How many may be inside.
        """
        self._room, self._inside = room, 0
        self._open, self._working = True, False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Inside, as soon as there is room."""
        await self._enter()
        try:
            yield
        finally:
            self._inside -= 1
            self._admit()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody enters meanwhile, nor until all who are inside have left."""
        self._open, self._working = False, True
        try:
            yield
        finally:
            self._working = False
            self._admit()

    async def _enter(self) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was admitted in the same moment
                self._inside -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        self._open = self._open or not (self._working or self._inside)
        while self._waiting and self._open and self._inside < self._room:
            place = self._waiting.popleft()
            if not place.done():  # who has gone left a cancelled place
                self._inside += 1
                place.set_result(None)
