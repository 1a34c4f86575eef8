"""Connected to a Ray cluster: the one at an address, or one of our own on this machine.

Before Ray is asked, a call of our own finds out whether what answers there is a cluster and takes our token. Ray itself
would try for 20 s, write C++ log lines meanwhile, and say in the end that it cannot connect.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cxr_dist.compat import ray_address_on_this_machine
from cxr_dist.distributed.devices import BACKEND, ONEDNN, QUIET
from cxr_dist.launch.ray_tokens import HOW_TO_SET, ask_for_tokens, token_sent
from tfrecords_builder.common.errors import UserError, one_line

OWN_CLUSTER = "local"
CONNECT_TIMEOUT_S = 10.0
CLIENT = "ray://"
CLIENT_PORT = 10001
"""Ray Client's, where an address names none."""
# A call of each kind of server, with its request as protobuf: of the head's GCS, and of Ray Client (PING).
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive", b""
_PING = "/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06"
_NEEDED = f"give a cluster's, HOST:6379 or {CLIENT}HOST:{CLIENT_PORT}"
WITHOUT_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
"""Variables of a cluster's processes: an address where nothing answers.

Ray Train asks the dashboard whether its controller lives. Where there is none, it looks for its address for 40 s, and
the end of each run waits 12 s for that.
"""


def resolved_address(address: str | None) -> str:
    """The address that was given, or $RAY_ADDRESS, or `OWN_CLUSTER`.

    Said outright: without an address, Ray would join whatever cluster was last started on this machine.
    """
    return address or os.environ.get("RAY_ADDRESS") or OWN_CLUSTER


@contextmanager
def connected(address: str | None, verbose: bool) -> Iterator[None]:
    """Connected to the cluster at `address` or $RAY_ADDRESS, or to one of our own on this machine.

    Raises:
        UserError: no cluster answers at the address, or it cannot be used; names where the address comes from.
    """
    import logging

    named, address = _named(address), resolved_address(address)
    if address == OWN_CLUSTER:
        ask_for_tokens()
    elif address != "auto":
        check_cluster(address, named)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_LOGGING", "1" if verbose else "0")
    # Inside a job Ray merges the job's variables with ours, and by itself refuses those that both name. The job's are
    # part of this process's environment, so that what is given of them below is what the job says.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    import ray

    level = logging.INFO if verbose else logging.ERROR
    # A worker may import TensorFlow, to unpickle what it is given, before it runs a line of ours.
    variables = {ONEDNN: "1", BACKEND: "tensorflow"} | ({} if verbose else QUIET)
    if address == OWN_CLUSTER:
        variables |= WITHOUT_DASHBOARD
    variables = {name: os.environ.get(name, value) for name, value in variables.items()}
    try:
        if address == "auto":
            check_cluster(ray_address_on_this_machine(), named, is_looked_up=True)
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=False if address == OWN_CLUSTER else None,
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"{named}: the Ray cluster there cannot be used ({one_line(error)})") from None
    if not verbose:
        for name in ("ray", "ray.train", "ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _named(address: str | None) -> str:
    """Where `resolved_address` takes its answer from, and the answer."""
    variable = os.environ.get("RAY_ADDRESS")
    if variable and address in (None, "", "auto"):  # `auto` is the variable's, where it is set
        return f"RAY_ADDRESS {variable}"
    return f"--address {resolved_address(address)}"


def check_cluster(address: str, named: str, *, is_looked_up: bool = False) -> None:
    """Refuse an address where no Ray cluster answers, or one that does not take this process's token.

    Args:
        address: HOST:PORT, or ray://HOST[:PORT] of Ray Client.
        named: What the user gave, for the error.
        is_looked_up: Whether the address was not given but found, as for `auto`.

    Raises:
        UserError: says which of these it is, and what to give instead.
    """
    host, port = _host_and_port(address, named)
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{named}: no server answers there ({one_line(error)}); give the address of a running Ray cluster"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true") or "RAY_ENABLE_K8S_TOKEN_AUTH" in os.environ:
        return  # certificates, or tokens of Kubernetes, which Ray alone knows to present
    token = token_sent(is_looked_up=is_looked_up)
    status = _status_of_call(host, port, address.startswith(CLIENT), token)
    if status == "UNAUTHENTICATED":
        state = "has another token" if token else "requires a token"
        raise UserError(f"{named}: the cluster {state}; {HOW_TO_SET}")
    if status in ("UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"):
        raise UserError(f"{named}: the server there is not a Ray cluster; {_NEEDED}")


def _host_and_port(address: str, named: str) -> tuple[str, int]:
    """Of an address that Ray takes.

    Raises:
        UserError: it is of another kind, such as the URL of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{named}: is the address of a dashboard; {_NEEDED}, or send the command as a job with "
            f"`cxr-dist submit --address {address} -- COMMAND`"
        )
    text = address.removeprefix(CLIENT).partition("?")[0].rstrip("/") if address.startswith(CLIENT) else address
    if address.startswith(CLIENT) and not text.rpartition("]")[2].count(":"):
        text += f":{CLIENT_PORT}"
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(f"{named}: is not the address of a Ray cluster; {_NEEDED}")
    return host.strip("[]"), int(port)


def _status_of_call(host: str, port: int, is_client: bool, token: str | None) -> str:
    """The name of the gRPC status with which a cheap call ends: OK, UNAUTHENTICATED, UNIMPLEMENTED, ..."""
    import grpc

    method, request = _PING if is_client else _CHECK_ALIVE
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(request, timeout=CONNECT_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
