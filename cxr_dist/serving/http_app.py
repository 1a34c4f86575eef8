"""The HTTP interface of the service: FastAPI routes, limits and metrics. Knows of the model only a function.

Every error is JSON with `error`, and costs no other request anything: bodies are bounded before and while they are
read, pixels before they are decoded, and what waits for the model by a number.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from cxr_dist.data.image_files import decode_square
from cxr_dist.inference.classifier import Prediction
from cxr_dist.serving.limits import Limits
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decoded import ImageError, TooLargeError

Image = npt.NDArray[np.uint8]
TYPES = ("image/png", "image/jpeg", "image/tiff", "image/bmp", "image/webp", "application/dicom")
"""Content types that the description of the routes names. What a body is, its bytes say."""
FORM = "multipart/form-data"
_NAME = Path("upload")
BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
MAX_HELD_BYTES = 1 << 29
"""Of all bodies that are being read or decoded."""
ERRORS = {
    408: "The body arrived too slowly.",
    413: "The body has too many bytes, or the image too many pixels.",
    415: "The file needs a library that is not installed.",
    422: "The body is not a complete image, or a form without a file.",
    503: "The service is busy; send the request again later.",
    504: "The prediction took too long.",
}


class Predictions:
    """Answers for requests. Lives on one event loop; decodes in threads of its own."""

    def __init__(self, classify: Callable[[Image], Awaitable[Prediction]], image_size: int, limits: Limits) -> None:
        """Args:
        classify: The model, for uint8 [S, S].
        """
        self._classify, self._image_size, self._limits = classify, image_size, limits
        self._decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")
        self._waiting = self._held_bytes = 0
        self.metrics = Metrics(lambda: self._waiting)

    @property
    def is_busy(self) -> bool:
        return self._waiting >= self._limits.max_waiting

    async def predict(self, request: Request) -> Prediction:
        """The answer for the image that is the request's body.

        Raises:
            HTTPException: the request is refused.
        """
        if self.is_busy:
            raise _busy("too many requests are waiting")
        limits = self._limits
        self._waiting += 1
        try:
            body = await _within(limits.body_timeout_s, 408, "the body arrived too slowly", self._read(request))
            answer = self._answer(body, request.headers.get("content-type", ""))
            result: Prediction = await _within(
                limits.answer_timeout_s, 504, "the prediction took too long; send the request again", answer
            )
            return result
        finally:
            self._waiting -= 1

    async def _read(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise HTTPException(413, f"the body has {declared[:20]} bytes; at most {limit:,} are accepted")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held_bytes += len(part)
                if len(body) > limit:
                    raise HTTPException(413, f"the body has more than {limit:,} bytes")
                if self._held_bytes > MAX_HELD_BYTES:
                    raise _busy("too many bytes are waiting")
            return bytes(body)
        finally:
            self._held_bytes -= len(body)

    def _decode(self, body: bytes, content_type: str) -> Image:
        return decode_square(image_in(body, content_type), self._image_size, _NAME)

    async def _answer(self, body: bytes, content_type: str) -> Prediction:
        self._held_bytes += len(body)
        try:
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(self._decoders, self._decode, body, content_type)
        except TooLargeError as error:
            raise HTTPException(413, error.reason) from None
        except ImageError as error:
            raise HTTPException(422, error.reason) from None
        except UserError as error:
            raise HTTPException(415, str(error)) from None
        except MemoryError:
            raise _busy("there is not enough memory for this image now") from None
        finally:
            self._held_bytes -= len(body)
        try:
            return await self._classify(image)
        except Exception as error:
            logging.getLogger("ray.serve").exception("the model failed")
            raise HTTPException(500, "the model failed on this image; see the log of the service") from error


def image_in(body: bytes, content_type: str) -> bytes:
    """The image of a request: the first file of a form, else the body as it is.

    Args:
        body: Of the request.
        content_type: Its header.

    Raises:
        HTTPException: a form without a file.
    """
    if content_type.partition(";")[0].strip().lower() != FORM:
        return body
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode("latin-1") + body)
    for part in message.iter_parts() if message.is_multipart() else ():
        if part.get_filename() is not None:
            content = part.get_payload(decode=True)
            return content if isinstance(content, bytes) else b""
    raise HTTPException(422, "the form holds no file; send the image as a file of the form, or as the body")


def make_app(predictions: Predictions, class_names: Sequence[str], image_size: int) -> FastAPI:
    """The routes; `/` and `/openapi.json` are generated from them."""
    app = FastAPI(
        title="Chest X-ray classifier",
        docs_url=None,  # FastAPI's pages load their scripts from the internet
        redoc_url=None,
        description=f"**Not for diagnosis.** Classes: {', '.join(class_names)}. Size: {image_size} pixels. "
        "If `abstained` is true, do not rely on the class; `reason` says why. Other predictions may be wrong too.",
    )
    file = {"type": "string", "format": "binary"}
    binary, form = {"schema": file}, {"schema": {"type": "object", "properties": {"file": file}}}

    @app.post(
        "/predict",
        summary="Classify one image",
        responses={status: {"description": text} for status, text in ERRORS.items()},
        openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(TYPES, binary) | {FORM: form}}},
    )
    async def predict(request: Request) -> Prediction:
        started, status = time.perf_counter(), 500
        try:
            answer = await predictions.predict(request)
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            predictions.metrics.count(status, time.perf_counter() - started)
        return answer

    @app.get("/health", summary="Whether the service is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Whether the service takes another request", responses={503: {"description": "Busy."}})
    async def ready() -> JSONResponse:
        return JSONResponse({"status": "busy"}, 503) if predictions.is_busy else JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(predictions.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", summary="The routes")
    async def root() -> dict[str, Any]:
        return {
            "service": app.title,
            "notice": "Not for diagnosis.",
            "routes": {f"{method} {path}": summary for method, path, summary in routes},
        }

    found = [route for route in app.routes if isinstance(route, APIRoute)]
    routes = [(method, route.path, route.summary) for route in found for method in route.methods or ()]
    routes.append(("GET", "/openapi.json", "The interface as an OpenAPI schema"))

    @app.exception_handler(StarletteHTTPException)
    async def refuse(_request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return app


def _busy(reason: str) -> HTTPException:
    return HTTPException(503, f"{reason}; send the request again later", {"Retry-After": "1"})


async def _within(seconds: float, status: int, reason: str, work: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise HTTPException(status, reason) from None


class Metrics:
    """Of this process, in Prometheus's text format."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("cxr_dist_requests", "Requests to /predict by status", ["status"], registry=registry)
        self._seconds = Histogram("cxr_dist_answer_seconds", "Time from request to response", registry=registry)
        self._batches = Histogram(
            "cxr_dist_batch_images", "Images in a batch", buckets=BATCH_BUCKETS, registry=registry
        )
        self._model_seconds = Counter(
            "cxr_dist_model_seconds", "Total time of all batches, which may overlap", registry=registry
        )
        Gauge("cxr_dist_waiting", "Requests in progress", registry=registry).set_function(waiting)

    def count(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def count_batch(self, images: int, seconds: float) -> None:
        """Of a step of the model."""
        self._batches.observe(images)
        self._model_seconds.inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
