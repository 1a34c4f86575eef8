"""The routes in this process, without a cluster."""

import asyncio
import io
import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from cxr_dist.inference.classifier import Prediction
from cxr_dist.serving import http_app
from cxr_dist.serving.http_app import Predictions, image_in, make_app
from cxr_dist.serving.limits import Limits

SIZE = 4


@given(content=st.binary(max_size=300), name=st.sampled_from(["a.png", "ä b.dcm", ""]))
def test_a_file_in_a_form_is_found_to_the_byte(content: bytes, name: str) -> None:
    boundary = "-----x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n'
    body = (
        f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
    )
    assert image_in(body, f"Multipart/Form-Data; boundary={boundary}") == content
    assert image_in(content, "image/png") == content


def test_a_form_is_taken_apart_beside_the_loop_that_serves_others(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(body: bytes, content_type: str) -> bytes:
        threads.append(threading.current_thread())
        return image_in(body, content_type)

    monkeypatch.setattr(http_app, "image_in", noted)
    [response, _] = asyncio.run(post([1], Limits()))
    assert response.status == 200
    assert threading.main_thread() not in threads
    assert threads


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


def test_the_root_lists_all_routes_and_no_page_needs_the_internet() -> None:
    async def pages(*paths: str) -> list[Response]:
        app = make_app(Predictions(classify, SIZE, Limits()), ("a",), SIZE)
        return [await ask(app, "GET", path) for path in paths]

    root, schema, *missing = asyncio.run(pages("/", "/openapi.json", "/docs", "/redoc"))
    assert root.status == 200
    routes = json.loads(root.body)["routes"]
    described = {
        f"{method.upper()} {path}" for path, methods in json.loads(schema.body)["paths"].items() for method in methods
    }
    assert set(routes) == described | {"GET /openapi.json"}
    assert {"POST /predict", "GET /", "GET /health", "GET /ready", "GET /metrics"} <= set(routes)
    assert all(routes.values())
    assert [page.status for page in missing] == [404, 404]
