"""Addresses of Ray clusters: what answers there is found out before Ray tries for long."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest

from cxr_dist.launch import ray_connection
from cxr_dist.launch.ray_connection import check_cluster, connected
from tfrecords_builder.common.errors import UserError

TOKEN = "right"
SERVICES = {"": "/ray.rpc.NodeInfoGcsService/CheckAlive", "ray://": "/ray.rpc.RayletDriver/ClusterInfo"}


class Head(grpc.GenericRpcHandler):
    """One method of Ray's, which asks for a token or does not."""

    def __init__(self, method: str, asks: bool) -> None:
        self._method, self._asks = method, asks

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method != self._method:
            return None
        bearer = dict(call.invocation_metadata).get("authorization")

        def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
            if self._asks and bearer != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def head(method: str, asks: bool) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head(method, asks)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray_connection, "CONNECT_TIMEOUT_S", 120.0)


@pytest.mark.parametrize("kind", SERVICES)
@pytest.mark.parametrize(
    ("asks", "mode", "token", "answer"),
    [
        (False, None, None, None),
        (False, "token", TOKEN, None),
        (True, "token", TOKEN, None),
        (True, "TOKEN", TOKEN, None),
        (True, "token", "wrong", "has another token"),
        (True, "token", None, "requires a token"),
        (True, None, TOKEN, "requires a token"),
        (True, "disabled", TOKEN, "requires a token"),
        (True, None, None, "requires a token"),
    ],
)
def test_tokens(
    kind: str, asks: bool, mode: str | None, token: str | None, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with head(SERVICES[kind], asks) as port:
        address = f"{kind}127.0.0.1:{port}"
        if answer is None:
            check_cluster(address, f"--address {address}")
            return
        with pytest.raises(UserError) as caught, connected(address, verbose=False):
            pytest.fail("it connected")
    text = str(caught.value)
    assert text.startswith(f"--address {address}: the cluster {answer}; ")
    for variable in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        assert variable in text
    assert token is None or f" {token} " not in text


def test_a_token_is_found_for_a_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray does for `auto`, and for no address that is given."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with head(SERVICES[""], asks=True) as port:
        check_cluster(f"127.0.0.1:{port}", "--address auto", is_looked_up=True)


class Web(BaseHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def something_else(kind: str) -> Iterator[int]:
    if kind in SERVICES:
        with head(SERVICES[kind], asks=True) as port:
            yield port
        return
    if kind == "web":
        server = HTTPServer(("127.0.0.1", 0), Web)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
        server.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never says a word
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("form", "there"), [("", "web"), ("ray://", "web"), ("", "silent"), ("", "ray://"), ("ray://", "")]
)
def test_what_answers_is_no_cluster_of_that_kind(form: str, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if there == "silent":
        monkeypatch.setattr(ray_connection, "CONNECT_TIMEOUT_S", 2.0)
    with something_else(there) as port:
        address = f"{form}127.0.0.1:{port}"
        with pytest.raises(UserError) as caught, connected(address, verbose=False):
            pytest.fail("it connected")
    assert str(caught.value).startswith(f"--address {address}: the server there is not a Ray cluster; give ")
    assert "HOST:6379 or ray://HOST:10001" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "http://head:8265",
            ["is the address of a dashboard", "HOST:6379", "submit --address http://head:8265 -- COMMAND"],
        ),
        ("https://head", ["is the address of a dashboard", "ray://HOST:10001"]),
        ("head", ["is not the address of a Ray cluster", "HOST:6379"]),
        ("ftp://head:21", ["is not the address of a Ray cluster"]),
        (":6379", ["is not the address of a Ray cluster"]),
        ("ray://nowhere.invalid", ["no server answers there"]),
        ("127.0.0.1:99999", ["no server answers there"]),
    ],
)
@pytest.mark.parametrize("way", ["--address", "RAY_ADDRESS", "auto"])
def test_addresses_that_cannot_be(address: str, words: list[str], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as they were given: as an option, as the variable, or as the variable that `auto` stands for."""
    given = {"--address": address, "RAY_ADDRESS": None, "auto": "auto"}[way]
    if way != "--address":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught, connected(given, verbose=False):
        pytest.fail("it connected")
    text = str(caught.value)
    assert text.startswith(f"{'RAY_ADDRESS' if way != '--address' else way} {address}: ")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("head:6379", ("head", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("ray://head", ("head", 10001)),
        ("ray://head:1", ("head", 1)),
        ("ray://[::1]", ("::1", 10001)),
        ("ray://[::1]:2/?a=b", ("::1", 2)),
    ],
)
def test_addresses_that_can(address: str, expected: tuple[str, int]) -> None:
    assert ray_connection._host_and_port(address, "") == expected
