"""A trained model behind HTTP: a Ray Serve application on a cluster of this machine's own.

One replica holds the model. Its event loop reads requests, threads decode, and what has been decoded goes through the
model in batches (`serve.batch`).
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.inference.classifier import Classifier, Prediction, load_classifier
from cxr_dist.launch.ray_connection import OWN_CLUSTER, connected
from cxr_dist.runs.calibration_file import read_calibration
from cxr_dist.runs.run_folder import read_finished, weights_file
from cxr_dist.runs.typical_images import read_typical
from cxr_dist.serving.limits import Limits
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.installation import install_command
from tfrecords_builder.common.seal import check_seal

NAME = "cxr-dist"
_BESIDE = 32
"""Requests for pages, or such as are refused, beside those for the model."""
_TO_THE_END_S = 10.0
Load = Callable[[Path], Classifier]


@contextmanager
def serving(
    run: Path, host: str, port: int, limits: Limits, *, load: Load = load_classifier, verbose: bool = False
) -> Iterator[str]:
    """The address of a service that answers while the context lasts.

    Args:
        run: Of a finished run.
        load: Makes the classifier, in the replica's process.

    Raises:
        UserError: the run cannot be used, the address cannot be had, or Ray Serve is not installed.
    """
    _check_run(run)
    _check_address(host, port)
    try:
        with connected(OWN_CLUSTER, verbose):
            from ray import serve

            level = "INFO" if verbose else "ERROR"
            logging.getLogger("ray.serve").setLevel(level)
            # Longer than all that the replica itself allows, so that its words come first.
            timeout_s = limits.body_timeout_s + limits.answer_timeout_s + _TO_THE_END_S
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port, "request_timeout_s": timeout_s},
                logging_config={"log_level": level, "enable_access_log": verbose},
            )
            try:
                serve.run(_application(run.resolve(), limits, load), name=NAME, route_prefix="/")
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                serve.shutdown()
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; install it: {install_command('serve')}") from None


def _application(run: Path, limits: Limits, load: Load) -> Any:
    import ray
    from ray import serve

    def build() -> Any:
        """In the replica's process."""
        from cxr_dist.serving.http_app import Predictions, make_app

        classifier = load(run)
        size = classifier.image_size
        for count in (1, limits.max_batch):  # what is slow the first time is done before the first request
            classifier.probabilities(np.zeros((count, size, size), np.uint8))
        threads = ThreadPoolExecutor(limits.concurrent_batches, thread_name_prefix="model")

        @serve.batch(
            max_batch_size=limits.max_batch,
            batch_wait_timeout_s=limits.batch_wait_s,
            max_concurrent_batches=limits.concurrent_batches,
        )
        async def classify(images: list[npt.NDArray[np.uint8]]) -> Sequence[Prediction]:
            started, loop = time.perf_counter(), asyncio.get_running_loop()
            answers = await loop.run_in_executor(threads, classifier.predict, np.stack(images))
            predictions.metrics.count_batch(len(images), time.perf_counter() - started)
            return answers

        predictions = Predictions(classify, size, limits)
        return make_app(predictions, classifier.class_names, size)

    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    deployment: Any = serve.deployment(
        name="classifier",
        num_replicas=1,
        max_ongoing_requests=limits.max_waiting + _BESIDE,
        max_queued_requests=_BESIDE,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
        graceful_shutdown_timeout_s=_TO_THE_END_S,
    )(serve.ingress(build)())
    return deployment.bind()


def _check_run(run: Path) -> None:
    """What the replica would fail at, minutes and retries later."""
    finished = read_finished(run)
    read_calibration(run)
    read_typical(run)
    model = weights_file(finished.folder) or finished.folder
    try:
        check_seal(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: cannot be loaded ({one_line(error)}); train the run again") from None


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: is not available ({one_line(error)}); give another") from None
