"""The routes in this process, without a cluster."""

import asyncio
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_dist.inference.classifier import Prediction
from cxr_dist.serving.http_app import Predictions, make_app
from cxr_dist.serving.limits import Limits

SIZE = 4


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (SIZE, SIZE), value).save(buffer, "PNG")
    return buffer.getvalue()


async def classify(image: npt.NDArray[np.uint8]) -> Prediction:
    """A model that names an image by its first pixel, and fails on 13."""
    if image[0, 0] == 13:
        raise ValueError("unlucky")
    return Prediction(str(image[0, 0]), False, {"a": 1.0})


@dataclass
class Response:
    status: int
    headers: dict[bytes, bytes]
    body: bytes


async def ask(app: Any, method: str, path: str, body: bytes = b"") -> Response:
    """One request to an ASGI application."""
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "headers": [(b"content-type", b"image/png")]}
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start, *parts = messages
    return Response(start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in parts))


async def post(values: list[int], limits: Limits) -> list[Response]:
    """The answers for images of these values, sent together, and the metrics after them."""
    released = asyncio.Event()
    if len(values) <= limits.max_waiting:
        released.set()

    async def classify_when_released(image: npt.NDArray[np.uint8]) -> Prediction:
        await released.wait()
        return await classify(image)

    async def send(value: int) -> Response:
        response = await ask(app, "POST", "/predict", png(value))
        released.set()  # the first answer is a refusal, as the others wait
        return response

    app = make_app(Predictions(classify_when_released, SIZE, limits), ("a",), SIZE)
    responses = await asyncio.gather(*map(send, values))
    return [*responses, await ask(app, "GET", "/metrics")]


def test_a_model_that_fails_costs_one_request_alone() -> None:
    *responses, metrics = asyncio.run(post([1, 13, 2], Limits()))
    assert [response.status for response in responses] == [200, 500, 200]
    assert [json.loads(responses[place].body)["predicted"] for place in (0, 2)] == ["1", "2"]
    assert json.loads(responses[1].body) == {"error": "the model failed on this image; see the log of the service"}
    assert b'cxr_dist_requests_total{status="500"} 1.0' in metrics.body


def test_what_is_beyond_the_limit_is_refused_and_may_come_again() -> None:
    *responses, metrics = asyncio.run(post([1, 2, 3], Limits(max_waiting=2)))
    assert sorted(response.status for response in responses) == [200, 200, 503]
    refused = next(response for response in responses if response.status == 503)
    assert refused.headers[b"retry-after"] == b"1"
    assert b"cxr_dist_waiting 0.0" in metrics.body
