"""A real cluster that asks for a token: who has it joins, and who has not is told so at once."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports

pytestmark = pytest.mark.ray
TOKEN = "0123456789abcdef" * 4
LIMIT_S = 480.0
JOIN = """
import sys
from cxr_dist.launch.ray_connection import check_cluster, connected
from tfrecords_builder.common.errors import UserError
address = sys.argv[1]
try:
    if address.startswith("ray://"):  # whose own start of a driver takes a minute
        check_cluster(address, f"--address {address}")
        print("accepted")
    else:
        with connected(address, verbose=False):
            import ray
            print("joined", int(ray.cluster_resources()["CPU"]))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Of the head and of Ray Client."""
    head, agent, agent_grpc, client = free_ports(4)
    log = tmp_path_factory.mktemp("head") / "log"
    options = {
        "port": head,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "num-cpus": 2,
        "include-dashboard": "false",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        )
    try:
        for port in (head, client):
            wait_for(port, process, log)
        yield head, client
    finally:
        # Asked to end, it takes half a minute.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=LIMIT_S)


def wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=30).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)


def join(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_S)


@pytest.mark.parametrize(("form", "answer"), [("127.0.0.1:{0}", "joined 2\n"), ("ray://127.0.0.1:{1}", "accepted\n")])
def test_who_has_the_token_joins(form: str, answer: str, ports: tuple[int, int]) -> None:
    joined = join(form.format(*ports), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert joined.stdout == answer, joined.stderr


@pytest.mark.parametrize("form", ["127.0.0.1:{0}", "ray://127.0.0.1:{1}"])
def test_who_has_not_is_told_so_in_a_line(form: str, ports: tuple[int, int]) -> None:
    address = form.format(*ports)
    for variables, answer in (
        ({}, "requires a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, "has another token"),
    ):
        refused = join(address, **variables)
        assert refused.returncode == 1
        assert refused.stdout == ""
        (line,) = refused.stderr.splitlines()
        assert line.startswith(f"error: --address {address}: the cluster {answer}; set RAY_AUTH_MODE=token, and ")
