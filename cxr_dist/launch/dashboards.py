"""Where to look: addresses of Ray's dashboard and metrics, of Grafana and Prometheus, and TensorBoard's command."""

import json
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from cxr_dist.launch.ray_tokens import known_token
from cxr_dist.runs import run_folder
from tfrecords_builder.common.errors import one_line

DISCOVERY = "/api/prometheus/sd"
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"  # noqa: S108 - where Ray puts it on the head
TIMEOUT_S = 5.0


def dashboard_lines(address: str, experiment: Path | None) -> list[str]:
    """One line for each thing to look at, with what is known of it now."""
    lines = _ray_lines(address)
    for name, variable in (("Grafana", "RAY_GRAFANA_HOST"), ("Prometheus", "RAY_PROMETHEUS_HOST")):
        lines.append(f"{name}: {os.environ.get(variable) or f'not configured (${variable} is not set)'}")
    if experiment is None:
        return [*lines, "TensorBoard: tensorboard --logdir EXPERIMENT (or a run's folder)"]
    scalars = experiment / run_folder.TENSORBOARD
    command = shlex.join(["tensorboard", "--logdir", str(scalars if scalars.is_dir() else experiment)])
    return [*lines, f"TensorBoard: {command}"]


def _ray_lines(address: str) -> list[str]:
    try:
        version = _read(address + "/api/version")["ray_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"Ray dashboard: {address} (not available: {one_line(error)})"]
    lines = [
        f"Ray dashboard: {address} (available, Ray {version})",
        f"Ray metrics for Prometheus: {address}{DISCOVERY} (on the head: {DISCOVERY_FILE})",
    ]
    try:
        targets = [target for group in _read(address + DISCOVERY) for target in group["targets"]]
    except (OSError, ValueError, KeyError, TypeError):
        return lines  # a Ray that does not list them
    return lines + [f"Ray metrics of a process: http://{target}/metrics" for target in targets]


def _read(url: str) -> Any:
    """The JSON there, asked for with the token that Ray's tools would send."""
    token = known_token()
    request = Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310 - http, checked
    with urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return json.load(answer)
