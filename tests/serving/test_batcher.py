"""Batches: who is in which, beside which, and what becomes of those who leave."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress

import pytest

from cxr_dist.serving.batcher import Batcher


class Model:
    """Doubles numbers, when it is let."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.working = self.most_working = 0
        self._turns = threading.Semaphore(0 if held else 10**6)
        self._lock = threading.Lock()

    def let(self, batches: int = 1) -> None:
        self._turns.release(batches)

    def __call__(self, items: Sequence[int]) -> list[int]:
        with self._lock:
            self.batches.append(list(items))
            self.working += 1
            self.most_working = max(self.most_working, self.working)
        self._turns.acquire(timeout=20)
        with self._lock:
            self.working -= 1
        if -1 in items:
            raise ValueError("no number")
        return [2 * item for item in items]


async def until(model: Model, batches: int) -> None:
    async with asyncio.timeout(10):
        while len(model.batches) < batches:
            await asyncio.sleep(0.001)


async def settle() -> None:
    await asyncio.sleep(0.05)


def ask(batcher: Batcher[int, int], *items: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(batcher.result(item)) for item in items]


def test_everyone_gets_the_own_result() -> None:
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model, most=4, wait_s=0.001, at_once=2)

        async def client(first: int) -> None:
            for item in range(first, first + 30):
                assert await batcher.result(item) == 2 * item

        await asyncio.gather(*(client(1000 * number) for number in range(7)))
        assert sorted(item for batch in model.batches for item in batch) == sorted(
            1000 * number + each for number in range(7) for each in range(30)
        )
        assert max(len(batch) for batch in model.batches) <= 4
        assert model.most_working <= 2

    asyncio.run(scenario())


def test_one_alone_waits_for_no_full_batch() -> None:
    async def scenario() -> None:
        batcher = Batcher(Model(), most=4, wait_s=0.001, at_once=1)
        async with asyncio.timeout(5):
            assert await batcher.result(1) == 2
            assert await batcher.result(2) == 4

    asyncio.run(scenario())


def test_those_who_come_together_are_a_batch() -> None:
    async def scenario() -> None:
        model = Model()
        await asyncio.gather(*ask(Batcher(model, most=4, wait_s=0.1, at_once=2), 1, 2, 3))
        assert model.batches == [[1, 2, 3]]

    asyncio.run(scenario())


def test_beside_a_batch_at_work_only_a_full_one_begins() -> None:
    async def scenario() -> None:
        model = Model(held=True)
        batcher = Batcher(model, most=3, wait_s=0.001, at_once=2)
        tasks = ask(batcher, 1)
        await until(model, 1)
        tasks += ask(batcher, 2, 3)
        await settle()
        assert model.batches == [[1]]
        tasks += ask(batcher, 4)
        await until(model, 2)
        assert model.batches == [[1], [2, 3, 4]]
        tasks += ask(batcher, 5, 6, 7)
        await settle()
        assert len(model.batches) == 2, "a third began"
        model.let(3)
        assert await asyncio.gather(*tasks) == [2, 4, 6, 8, 10, 12, 14]
        assert model.batches == [[1], [2, 3, 4], [5, 6, 7]]

    asyncio.run(scenario())


def test_a_batch_that_began_small_makes_no_later_ones_small() -> None:
    """As many clients as two batches hold, each of whom asks again when it is answered."""

    async def scenario() -> None:
        model = Model(held=True)
        batcher = Batcher(model, most=4, wait_s=0.001, at_once=2)

        async def client() -> None:
            for item in range(5):
                await batcher.result(item)

        clients = [asyncio.create_task(client())]
        await until(model, 1)
        clients += [asyncio.create_task(client()) for _ in range(7)]
        for _ in range(20):
            await settle()
            model.let()
        await asyncio.gather(*clients)
        sizes = [len(batch) for batch in model.batches]
        assert sizes[0] == 1
        assert sizes[1:-1] == [4] * (len(sizes) - 2)

    asyncio.run(scenario())


def test_who_leaves_before_the_batch_begins_costs_nothing() -> None:
    async def scenario() -> None:
        model = Model(held=True)
        batcher = Batcher(model, most=3, wait_s=0.001, at_once=1)
        tasks = ask(batcher, 1)
        await until(model, 1)
        tasks += ask(batcher, 2, 3, 4, 5)
        await settle()
        tasks[1].cancel()
        tasks[0].cancel()  # its batch is at work
        await settle()
        model.let(5)
        assert await asyncio.gather(*tasks[2:]) == [6, 8, 10]
        assert model.batches == [[1], [3, 4, 5]]
        with suppress(asyncio.CancelledError):
            await tasks[0]
        assert await batcher.result(6) == 12

    asyncio.run(scenario())


def test_a_failure_is_that_batch_s_alone() -> None:
    async def scenario() -> None:
        batcher = Batcher(Model(), most=2, wait_s=0.05, at_once=1)
        results = await asyncio.gather(*ask(batcher, -1, 1, 2, 3), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError, int, int]
        assert await batcher.result(4) == 8

    asyncio.run(scenario())


def test_results_that_are_too_few_are_no_results() -> None:
    async def scenario() -> None:
        short: Batcher[int, int] = Batcher(lambda items: list(items)[1:], most=2, wait_s=0.001, at_once=1)
        with pytest.raises(RuntimeError, match="0 results for 1 items"):
            await short.result(1)

    asyncio.run(scenario())
