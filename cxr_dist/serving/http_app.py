"""What the service says to a request. Knows HTTP and limits, and of the model only a function.

    POST /predict  an image as the body -> class, abstained, probabilities     GET /health  GET /ready
    GET /metrics   for Prometheus                                              GET /, /docs a page about all this

Every error is JSON with `error`, and costs no other request anything: bodies are bounded before and while they are
read, pixels before they are decoded, and what waits for the model by a number.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.image_files import decode_square
from cxr_dist.inference.classifier import Prediction
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decode import ImageError, TooLargeError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

TYPES = {
    "image/png": Path("upload.png"),
    "image/jpeg": Path("upload.jpg"),
    "application/dicom": Path("upload.dcm"),
}
"""Content types, and names of such files."""
BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
MAX_HELD_BYTES = 1 << 29
"""Of all bodies that are being read or decoded."""


@dataclass(frozen=True)
class Limits:
    """What a service takes on. A request beyond is refused, in words and at once."""

    max_batch: int = 16
    """Images in a step of the model."""
    batch_wait_s: float = 0.01
    """How long the first image of a batch waits for others while the model is idle."""
    batches_at_once: int = 2
    """In the model; the second takes what the first leaves idle."""
    max_body_bytes: int = 64 << 20
    max_waiting: int = 64
    """Requests at a time, from their first byte to their answer; 503 beyond."""
    body_timeout_s: float = 20.0
    """To send a body in; 408 beyond."""
    answer_timeout_s: float = 60.0
    """From there to the answer; 504 beyond."""
    decoders: int = 2
    """Threads that decode."""


class RefusedError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class HttpApp:
    """Requests in, responses out. Lives on one event loop; decodes in threads of its own."""

    def __init__(
        self,
        answer: Callable[[npt.NDArray[np.uint8]], Awaitable[Prediction]],
        image_size: int,
        class_names: tuple[str, ...],
        limits: Limits,
    ) -> None:
        """Args:
        answer: Of the model, for uint8 [S, S].
        """
        self._answer, self._image_size, self._class_names, self._limits = answer, image_size, class_names, limits
        self._pool = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")
        self._waiting = self._held = 0
        self._metrics = _Metrics(lambda: self._waiting)
        self.count_batch = self._metrics.count_batch

    async def respond(self, request: "Request") -> "Response":
        """Never raises but when the client has gone."""
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

        method, path = request.method, request.url.path.rstrip("/") or "/"
        if path == "/predict" and method == "POST":
            started = time.perf_counter()
            try:
                body, status = asdict(await self._predict(request)), 200
            except RefusedError as refused:
                body, status = {"error": refused.reason}, refused.status
            self._metrics.count(status, time.perf_counter() - started)
            return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 503 else None)
        if method not in ("GET", "HEAD"):
            known = path in ("/", "/docs", "/health", "/ready", "/metrics", "/predict")
            return JSONResponse({"error": "POST /predict is all that can be posted"}, 405 if known else 404)
        if path == "/health":
            return JSONResponse({"status": "alive"})
        if path == "/ready":
            ready = self._waiting < self._limits.max_waiting
            return JSONResponse({"status": "ready" if ready else "busy"}, 200 if ready else 503)
        if path == "/metrics":
            return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")
        if path in ("/", "/docs"):
            return HTMLResponse(self._page(), headers={"Content-Security-Policy": "default-src 'none'"})
        if path == "/predict":
            return JSONResponse({"error": "POST an image to /predict"}, 405, headers={"Allow": "POST"})
        return JSONResponse({"error": "there is GET /docs, and POST /predict"}, 404)

    async def _predict(self, request: "Request") -> Prediction:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in TYPES:
            raise RefusedError(415, f"send the image as the body, with Content-Type {', '.join(TYPES)}")
        if self._waiting >= self._limits.max_waiting:
            raise RefusedError(503, "too many requests are waiting; send this one again later")
        self._waiting += 1
        try:
            body = await _within(self._limits.body_timeout_s, 408, "the body took too long", self._read(request))
            return await _within(
                self._limits.answer_timeout_s,
                504,
                "the answer took too long; send it again",
                self._answered(body, kind),
            )
        finally:
            self._waiting -= 1

    async def _read(self, request: "Request") -> bytes:
        limit = self._limits.max_body_bytes
        claimed = request.headers.get("content-length", "")
        if claimed.isdecimal() and int(claimed[:20]) > limit:
            raise RefusedError(413, f"the body has {claimed[:20]} bytes; at most {limit:,} are taken")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held += len(part)
                if len(body) > limit:
                    raise RefusedError(413, f"the body has more than {limit:,} bytes")
                if self._held > MAX_HELD_BYTES:
                    raise RefusedError(503, "too many bytes are waiting; send this one again later")
            return bytes(body)
        finally:
            self._held -= len(body)

    async def _answered(self, body: bytes, kind: str) -> Prediction:
        self._held += len(body)
        try:
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(self._pool, decode_square, body, self._image_size, TYPES[kind])
        except TooLargeError as error:
            raise RefusedError(413, error.reason) from None
        except ImageError as error:
            raise RefusedError(422, error.reason) from None
        except UserError as error:
            raise RefusedError(415, str(error)) from None
        except MemoryError:
            raise RefusedError(503, "there is no memory for this image now") from None
        finally:
            self._held -= len(body)
        try:
            return await self._answer(image)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            import logging

            logging.getLogger("ray.serve").exception("the model failed")
            raise RefusedError(500, "the model failed on this image; the service's log says why") from error

    def _page(self) -> str:
        from html import escape

        limits, names = self._limits, ", ".join(map(escape, self._class_names))
        return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>cxr-dist</title>
<h1>Chest X-ray classifier</h1>
<p><b>Not for diagnosis.</b> Classes: {names}. Images are seen at {self._image_size} pixels.</p>
<pre>curl --data-binary @image.png -H 'Content-Type: image/png' http://HOST:PORT/predict</pre>
<p>Content types: {", ".join(TYPES)}; at most {limits.max_body_bytes:,} bytes.
The answer is JSON: <code>predicted</code>, <code>abstained</code> (the class is not to be relied on),
<code>probabilities</code> by class. An answer that does not abstain may be wrong: the threshold guarantees nothing.</p>
<p>Errors are JSON with <code>error</code>: 408 the body took too long, 413 too many bytes or pixels, 415 another type,
422 no whole image, 503 busy, 504 no answer in {limits.answer_timeout_s:g} s.</p>
<p>Also: <code>GET /health</code>, <code>GET /ready</code>, <code>GET /metrics</code> (Prometheus).</p></html>"""


async def _within(seconds: float, status: int, reason: str, work: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise RefusedError(status, reason) from None


class _Metrics:
    """Of this process, in Prometheus's text format."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cxr_dist_requests", "Requests to /predict by status", ["status"], registry=self._registry
        )
        self._seconds = Histogram("cxr_dist_answer_seconds", "From request to answer", registry=self._registry)
        self._batches = Histogram(
            "cxr_dist_batch_images", "Images in a step", buckets=BATCH_BUCKETS, registry=self._registry
        )
        self._model_seconds = Counter(
            "cxr_dist_model_seconds", "Of all steps, of which some are at once", registry=self._registry
        )
        Gauge("cxr_dist_waiting", "Requests at this moment", registry=self._registry).set_function(waiting)

    def count(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def count_batch(self, images: int, seconds: float) -> None:
        """Of a step of the model."""
        self._batches.observe(images)
        self._model_seconds.inc(seconds)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
