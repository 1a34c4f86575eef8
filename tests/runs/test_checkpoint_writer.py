"""When checkpoints are written: as often as their cost allows, one after the other, and never silently not."""

import threading
from collections.abc import Callable

import pytest

from cxr_dist.config.schema import CheckpointConfig
from cxr_dist.runs.checkpoint_writer import CheckpointWriter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.5, 7.0])
def test_writing_takes_its_share_of_the_time(share: float, cost: float) -> None:
    clock = Clock()
    writer = CheckpointWriter(CheckpointConfig(max_overhead=share, background=False), clock)
    assert writer.is_due(1), "the first tells the cost"
    written = []

    def write() -> None:
        written.append(clock.now)
        clock.now += cost

    for step in range(3000):
        if writer.is_due(step):
            writer.write(write)
        clock.now += 1.0
    spent = cost * len(written)
    # In steps of a second the interval is up to one longer than it need be.
    assert spent <= share * (clock.now - 100.0) + cost
    assert len(written) >= 3000 / (max(cost / share, 1.0) + 1 + cost) - 1


@pytest.mark.parametrize("every", [1, 3, 10])
def test_by_steps_they_are_due_at_the_same_ones_for_all(every: int) -> None:
    writer = CheckpointWriter(CheckpointConfig(every_steps=every))
    for step in range(25):
        assert writer.is_due(step) == (step % every == 0)
        until = writer.steps_until_due(step)
        assert until is not None
        assert writer.is_due(step + until)
        assert not any(writer.is_due(step + earlier) for earlier in range(1, until))
    assert CheckpointWriter(CheckpointConfig()).steps_until_due(3) is None


def test_one_at_a_time_beside_the_caller() -> None:
    writer = CheckpointWriter(CheckpointConfig())
    go_on, order = threading.Event(), list[str]()

    def first() -> None:
        assert go_on.wait(120)
        order.append("first")

    writer.write(first)
    assert not writer.is_due(1), "one is being written"
    order.append("caller")
    threading.Timer(0.05, go_on.set).start()
    writer.write(lambda: order.append("second"))
    writer.wait()
    assert order == ["caller", "first", "second"]
    writer.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_reaches_the_caller(background: bool) -> None:
    writer = CheckpointWriter(CheckpointConfig(background=background))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def write_and_wait() -> None:
        writer.write(fail)
        writer.wait()

    with pytest.raises(OSError, match="No space"):
        write_and_wait()
    writer.wait()  # once
    writer.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_storage_that_fails_now_and_then_is_tried_again(background: bool) -> None:
    """Three in a row are warnings while another checkpoint follows; one that succeeds begins the count anew."""
    warnings: list[str] = []
    writer = CheckpointWriter(CheckpointConfig(background=background), warn=warnings.append)

    def fail() -> None:
        raise OSError(5, "Input/output error")

    def write(*tasks: Callable[[], None]) -> None:
        for task in tasks:
            writer.write(task)

    def fine() -> None:
        pass

    write(fail, fail, fail, fine, fail, fail, fail, fine, fine)
    assert len(warnings) == 6
    assert all("Input/output error" in text for text in warnings)
    with pytest.raises(OSError, match="Input/output"):
        write(fail, fail, fail, fail, fine)
    writer.close()


def test_what_is_no_failure_of_the_storage_is_raised_at_once() -> None:
    writer = CheckpointWriter(CheckpointConfig())
    writer.write(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        writer.write(lambda: None)
    writer.close()
