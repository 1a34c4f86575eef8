"""Where to look: addresses of Ray's dashboard and metrics, of Grafana and Prometheus, and TensorBoard's command."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from cxr_dist.launch.job_client import Jobs
from cxr_dist.runs import run_folder
from tfrecords_builder.common.errors import UserError

DISCOVERY = "/api/prometheus/sd"
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"  # noqa: S108 - where Ray puts it on the head


def dashboard_lines(
    address: str, experiment: Path | None, environment: Mapping[str, str], timeout_s: float = 5.0
) -> list[str]:
    """One line for each thing to look at, with what is known of it now."""
    lines = _ray_lines(address, timeout_s)
    for name, variable in (("Grafana", "RAY_GRAFANA_HOST"), ("Prometheus", "RAY_PROMETHEUS_HOST")):
        lines.append(f"{name}: {environment.get(variable) or f'not configured (${variable} is not set)'}")
    if experiment is None:
        lines.append("TensorBoard: tensorboard --logdir EXPERIMENT (or a run's folder)")
    else:
        lines.append(f"TensorBoard: {tensorboard_command(experiment)}")
    return lines


def tensorboard_command(folder: Path) -> str:
    """The line for a shell that shows a run, or all runs below an experiment's folder."""
    scalars = folder / run_folder.TENSORBOARD
    return shlex.join(["tensorboard", "--logdir", str(scalars if scalars.is_dir() else folder)])


def _ray_lines(address: str, timeout_s: float) -> list[str]:
    try:
        jobs = Jobs(address, timeout_s)
        version = jobs.get("/api/version")["ray_version"]
    except UserError as error:
        return [f"Ray dashboard: {address} (not usable: {str(error).partition(': ')[2]})"]
    lines = [f"Ray dashboard: {address} (answers, Ray {version})"]
    try:
        groups = jobs.get(DISCOVERY)
        targets = [target for group in groups for target in group.get("targets", [])]
    except (UserError, AttributeError, TypeError):
        targets = []
    lines.append(f"Ray metrics, for Prometheus to discover: {address}{DISCOVERY} (on the head: {DISCOVERY_FILE})")
    return lines + [f"Ray metrics of a process: http://{target}/metrics" for target in targets]
