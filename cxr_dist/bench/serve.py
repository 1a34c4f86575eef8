"""What HTTP, decoding and batching cost: images per second of the service beside those of the bare model.

The service is the command itself in a process of its own, and the client sends PNG files of drawn X-rays over as many
connections as keep two batches on their way. The bare model is the same classifier, in this process, on batches of
the same size that are decoded already. They take turns, so both see the same state of the machine.
"""

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np

from cxr_dist.bench.common import Medians, Round
from cxr_dist.data.image_files import read_square
from cxr_dist.inference.classifier import load_classifier
from tfrecords_builder.common.errors import UserError

HOST = "127.0.0.1"
START_LIMIT_S = 180.0
END_LIMIT_S = 60.0
ANSWER_LIMIT_S = 120.0
BATCHES_ON_THEIR_WAY = 2


def table(rounds: Sequence[Round], seconds_per_answer: Sequence[float]) -> list[str]:
    """Lines for people."""
    row = Medians.of(rounds)
    return [
        "service img/s  bare model img/s  ratio (median of rounds)  median answer",
        f"{row.ours:13.2f} {row.baseline:17.2f}  {row.ratio:.3f} ({row.rounds}){median(seconds_per_answer):29.3f} s",
    ]


def measure(
    run: Path, paths: Sequence[Path], max_batch: int, batches: int, rounds: int
) -> tuple[list[Round], list[float]]:
    """Rounds of `batches` full batches through the service and the bare model; each round's median seconds per answer.

    Args:
        run: Of a finished run.
        paths: PNG files, sent in turn.
        max_batch: Images in a step.
        rounds: That are counted; one more comes first, and counts nowhere.
    """
    classifier = load_classifier(run)
    images = np.stack([read_square(paths[index % len(paths)], classifier.image_size) for index in range(max_batch)])
    bodies = [path.read_bytes() for path in paths]
    count, measured, answers = max_batch * batches, [], []
    with _service(run, max_batch) as port:
        for _ in range(rounds + 1):
            seconds, seconds_per_answer = _send(
                port, [bodies[index % len(bodies)] for index in range(count)], max_batch
            )
            started = time.perf_counter()
            for _ in range(batches):
                classifier.probabilities(images)
            bare = time.perf_counter() - started
            measured.append(Round(count / seconds, count / bare))
            answers.append(median(seconds_per_answer))
    return measured[1:], answers[1:]


def _send(port: int, bodies: Sequence[bytes], max_batch: int) -> tuple[float, list[float]]:
    """Seconds for all, and for each, from connections that send their next image once they have an answer."""
    own = threading.local()

    def connect() -> None:
        own.connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_LIMIT_S)

    def send(body: bytes) -> float:
        started = time.perf_counter()
        own.connection.request("POST", "/predict", body, {"Content-Type": "image/png"})
        response = own.connection.getresponse()
        answer = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"the service answered {response.status}: {answer[:200]!r}")
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(BATCHES_ON_THEIR_WAY * max_batch, initializer=connect) as pool:
        took = list(pool.map(send, bodies))
    return time.perf_counter() - started, took


@contextmanager
def _service(run: Path, max_batch: int) -> Iterator[int]:
    """The port of `cxr-dist serve` in a process of its own."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    options = ["--port", str(port), "--max-batch", str(max_batch), "--max-waiting", str(4 * max_batch)]
    command = [sys.executable, "-m", "cxr_dist", "serve", str(run), "--host", HOST, *options]
    process = subprocess.Popen(command, stdout=sys.stderr)  # noqa: S603 - our own command
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise UserError("the benchmark stopped, because the service that it measures failed; see its message above")
        with suppress(OSError):  # it does not listen yet: asked again until the limit
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the service was not ready in {START_LIMIT_S:.0f} s")
