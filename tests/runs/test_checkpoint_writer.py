"""When checkpoints are written: as often as their cost allows, one after the other, and never silently not."""

import threading
from collections.abc import Callable

import pytest

from cxr_dist.config.schema import CheckpointConfig
from cxr_dist.runs.checkpoint_writer import Keeper


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.5, 7.0])
def test_writing_takes_its_share_of_the_time(share: float, cost: float) -> None:
    clock = Clock()
    keeper = Keeper(CheckpointConfig(share=share, background=False), clock)
    assert keeper.is_due(1), "the first tells the cost"
    written = []

    def write() -> None:
        written.append(clock.now)
        clock.now += cost

    for step in range(3000):
        if keeper.is_due(step):
            keeper.write(write)
        clock.now += 1.0
    spent = cost * len(written)
    # In steps of a second the interval is up to one longer than it need be.
    assert spent <= share * (clock.now - 100.0) + cost
    assert len(written) >= 3000 / (max(cost / share, 1.0) + 1 + cost) - 1


@pytest.mark.parametrize("every", [1, 3, 10])
def test_by_steps_they_are_due_at_the_same_ones_for_all(every: int) -> None:
    keeper = Keeper(CheckpointConfig(every_steps=every))
    for step in range(25):
        assert keeper.is_due(step) == (step % every == 0)
        until = keeper.steps_until_due(step)
        assert until is not None
        assert keeper.is_due(step + until)
        assert not any(keeper.is_due(step + earlier) for earlier in range(1, until))
    assert Keeper(CheckpointConfig()).steps_until_due(3) is None


def test_one_at_a_time_beside_the_caller() -> None:
    keeper = Keeper(CheckpointConfig())
    go_on, order = threading.Event(), list[str]()

    def first() -> None:
        assert go_on.wait(10)
        order.append("first")

    keeper.write(first)
    assert not keeper.is_due(1), "one is being written"
    order.append("caller")
    threading.Timer(0.05, go_on.set).start()
    keeper.write(lambda: order.append("second"))
    keeper.wait()
    assert order == ["caller", "first", "second"]
    keeper.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_reaches_the_caller(background: bool) -> None:
    keeper = Keeper(CheckpointConfig(background=background))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def write_and_wait() -> None:
        keeper.write(fail)
        keeper.wait()

    with pytest.raises(OSError, match="No space"):
        write_and_wait()
    keeper.wait()  # once
    keeper.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_storage_that_fails_now_and_then_is_tried_again(background: bool) -> None:
    """Three in a row are warnings while another checkpoint follows; one that succeeds begins the count anew."""
    warnings: list[str] = []
    keeper = Keeper(CheckpointConfig(background=background), warn=warnings.append)

    def fail() -> None:
        raise OSError(5, "Input/output error")

    def write(*tasks: Callable[[], None]) -> None:
        for task in tasks:
            keeper.write(task)

    def fine() -> None:
        pass

    write(fail, fail, fail, fine, fail, fail, fail, fine, fine)
    assert len(warnings) == 6
    assert all("Input/output error" in text for text in warnings)
    with pytest.raises(OSError, match="Input/output"):
        write(fail, fail, fail, fail, fine)
    keeper.close()


def test_what_is_no_failure_of_the_storage_is_raised_at_once() -> None:
    keeper = Keeper(CheckpointConfig())
    keeper.write(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        keeper.write(lambda: None)
    keeper.close()
