"""What a service takes on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """A request beyond one of them is refused at once, and the refusal says why."""

    max_batch: int = 16
    """Images in a step of the model."""
    batch_wait_s: float = 0.01
    """How long the first image of a batch waits for others."""
    concurrent_batches: int = 2
    """In the model; the second takes the cores that the first leaves idle."""
    max_body_bytes: int = 64 << 20
    max_waiting: int = 64
    """Requests at a time, from their first byte to their answer; 503 beyond."""
    body_timeout_s: float = 20.0
    """To send a body in; 408 beyond."""
    answer_timeout_s: float = 60.0
    """From there to the answer; 504 beyond."""
    decoders: int = 2
    """Threads that decode."""
