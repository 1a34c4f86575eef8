"""Commands as jobs of a cluster, through Ray's job API: one job, or a pipeline of three that can be gone on with.

What a job runs is a plain command line, so Ray's own tool does as well: ``ray job submit --working-dir . --
python -m cxr_dist train ...``; a driver that a job starts joins the job's cluster.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.launch.job_client import Jobs
from cxr_dist.launch.job_environment import job_environment
from cxr_dist.launch.job_plan import (
    LOCAL,
    Decision,
    Step,
    check_no_secret,
    check_submission_id,
    decide,
    exit_status,
    made_up_id,
)
from cxr_dist.launch.ray_tokens import ask_for_tokens, known_token
from tfrecords_builder.common.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """How a job is sent, whatever it runs."""

    address: str
    version: str
    """Of this program, for the job's metadata."""
    submission_id: str | None = None
    working_dir: Path | None = None
    runtime_env: Path | None = None
    timeout_s: float = 30.0


def prepare(request: Request, steps: Sequence[Step]) -> dict[str, Any]:
    """The runtime environment of the jobs, checked with what they run, before anything is started or sent.

    Raises:
        UserError: the environment cannot be made, or something in a job is a secret.
    """
    if request.address == LOCAL:
        ask_for_tokens()
    environment = job_environment(request.working_dir, request.runtime_env)
    texts = [str(environment), *(step.entrypoint for step in steps)]
    check_no_secret(environment.get("env_vars") or {}, texts, known_token())
    return environment


PORT_LIMIT_S = 10.0
"""For a cluster of this machine that was just stopped to leave its port."""


def _check_agent_port() -> None:
    """Refuse where another cluster's agent listens: `ray.init` gives its agent one port, and no job runs without it.

    A cluster that was just stopped is given the time to go.

    Raises:
        UserError: the port is taken, and stays so.
    """
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    until = time.monotonic() + PORT_LIMIT_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"--address local: port {DEFAULT_DASHBOARD_AGENT_LISTEN_PORT} is taken ({error.strerror}), "
                        "by another Ray cluster most likely; give its address, or wait until it has ended"
                    ) from None
        time.sleep(0.5)


@contextmanager
def own_cluster() -> Iterator[str]:
    """A cluster of this machine, its dashboard on the loopback interface, tokens asked for; stopped at the end."""
    ask_for_tokens()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The `python` of a job is to be this one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    import ray

    _check_agent_port()
    try:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--address local: a cluster could not be started here ({reason})") from None
    try:
        if not context.dashboard_url:
            raise UserError("--address local: the cluster's dashboard did not start; see /tmp/ray/session_latest/logs")
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


@contextmanager
def cluster(address: str, timeout_s: float) -> Iterator[Jobs]:
    """The jobs of the cluster at an address of `dashboard_address`, or of one started for the occasion."""
    if address == LOCAL:
        with own_cluster() as url:
            yield Jobs(url, timeout_s)
        return
    yield Jobs(address, timeout_s)


def send(
    jobs: Jobs,
    environment: dict[str, Any],
    version: str,
    step: Step,
    submission_id: str,
    pipeline: str | None = None,
) -> None:
    """Start a step as a job, in an environment that `prepare` made.

    Raises:
        UserError: the id is taken, or the cluster refuses the job.
    """
    metadata = {"command": step.command, "version": version} | ({"pipeline": pipeline} if pipeline else {})
    jobs.submit(step.entrypoint, submission_id, environment, metadata)


def new_id(request: Request, command: str) -> str:
    """The id that was given, or one that says what and when."""
    return check_submission_id(request.submission_id or made_up_id(command, time.time()))


def follow(jobs: Jobs, submission_id: str, write: Callable[[str], None], say: Say) -> int:
    """Show a job's log until it ends; its exit status."""
    details = jobs.follow(submission_id, write)
    status = details.status.value
    code = exit_status(status, details.driver_exit_code)
    if status == "STOPPED":
        say(f"{submission_id}: was stopped")
    elif code:
        reason = f"exit status {details.driver_exit_code}"
        if details.driver_exit_code is None:
            reason = " ".join((details.message or "no reason given").split())[:400]
        say(f"{submission_id}: failed ({reason})")
    return code


def run_pipeline(
    jobs: Jobs,
    environment: dict[str, Any],
    version: str,
    steps: Sequence[Step],
    name: str,
    write: Callable[[str], None],
    say: Say,
) -> int:
    """Run the steps as jobs, each when the one before has succeeded, from where an earlier start under this name is.

    Returns:
        0, or the exit status of the step that failed.

    Raises:
        UserError: what ran under this name before was another pipeline.
    """
    for step in steps:
        rows = {row.submission_id: row for row in jobs.rows()}
        decision = decide(f"{name}-{step.command}", {identity: row.status for identity, row in rows.items()})
        _check_same(name, step, decision, {identity: row.entrypoint for identity, row in rows.items()})
        if decision.action == "skip":
            say(f"{decision.submission_id}: has succeeded already")
            continue
        if decision.action == "submit":
            send(jobs, environment, version, step, decision.submission_id, name)
        say(f"{decision.submission_id}: {step.command} " + ("runs already" if decision.action == "attach" else "sent"))
        code = follow(jobs, decision.submission_id, write, say)
        if code:
            say(f"to resume from here: the same command with --submission-id {name}")
            return code
    return 0


def _check_same(name: str, step: Step, decision: Decision, entrypoints: dict[str, str]) -> None:
    """A step that was done with other arguments made something else."""
    if decision.action != "submit" and entrypoints[decision.submission_id] != step.entrypoint:
        raise UserError(
            f"--submission-id {name}: {decision.submission_id} ran other arguments "
            f"({entrypoints[decision.submission_id]}); give the same ones, or another id"
        )
