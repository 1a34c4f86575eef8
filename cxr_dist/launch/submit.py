"""Commands as jobs of a Ray cluster, thin over Ray's public `JobSubmissionClient`.

`ray job submit --working-dir . -- cxr-dist ...` does the same. What this adds: a cluster of this machine's own for one
job, and following a job that already runs, so that a pipeline can be started again. In a job, Ray sets RAY_ADDRESS to
the job's cluster, which `train` and `tune` join.
"""

import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cxr_dist.config.loading import read_yaml
from cxr_dist.launch.ray_tokens import HOW_TO_SET, ask_for_tokens
from tfrecords_builder.common.errors import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

LOCAL = "local"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
"""For a cluster that was just started to accept a job."""
POLL_S = 1.0
CHECK_EVERY_S = 15.0
"""While a job's log is silent: a machine that vanishes closes no connection."""


def dashboard_address(given: str | None) -> str:
    """The URL of a cluster's dashboard, or `local`; from the environment where none is given.

    Raises:
        UserError: it is no http address.
    """
    address = given or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), "")
    if address == LOCAL:
        return LOCAL
    try:
        url = urlsplit(address)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        given_words = f" {address}: is not the address of a dashboard" if address else ""
        raise UserError(f"--address{given_words}: give http://HOST:8265 of the cluster's dashboard, or local")
    if url.username or url.password:
        raise UserError(
            "--address: contains a name or password, which others could read; use a token in $RAY_AUTH_TOKEN"
        )
    return address.rstrip("/")


def entrypoint(command: Sequence[str]) -> str:
    """The shell line of a job that runs a command of this program."""
    return shlex.join(["python", "-m", "cxr_dist", *command])


def job_environment(working_dir: str | None, file: Path | None) -> dict[str, Any]:
    """Ray's `runtime_env`, as `ray job submit` makes it of its two options.

    Raises:
        UserError: the file is no YAML mapping, or the folder does not exist.
    """
    environment = read_yaml(file) if file else {}
    if working_dir is not None:
        environment["working_dir"] = working_dir
    folder = environment.get("working_dir")
    if folder is not None and "://" not in str(folder) and not Path(folder).exists():
        raise UserError(f"--working-dir {folder}: no such folder")
    return environment


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`.

    Raises:
        UserError: no dashboard of Ray answers there, or it asks for another token.
    """

    def __init__(self, address: str) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self.address = address
        os.environ[ADDRESS_VARIABLES[0]] = address  # Ray prefers the variable to the argument
        logging.getLogger("ray").setLevel(logging.ERROR)
        url = urlsplit(address)
        try:
            # Ray's client has no timeout of its own.
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((str(url.hostname), port), CONNECT_TIMEOUT_S).close()
            self._client = JobSubmissionClient(address)
        except AuthenticationError:
            raise UserError(f"--address {address}: the cluster rejects the token; {HOW_TO_SET}") from None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--address {address}: no Ray dashboard answers there ({one_line(error)})") from None

    def send(self, line: str, environment: dict[str, Any], wait_s: float = 0.0) -> str:
        """Start the shell line as a job; its id.

        Args:
            wait_s: How long to try. A cluster answers some seconds before it accepts jobs.

        Raises:
            UserError: the cluster refuses the job, or the environment is not one of Ray's.
        """
        until = time.monotonic() + wait_s
        while True:
            try:
                return str(self._client.submit_job(entrypoint=line, runtime_env=environment))
            except (ValueError, TypeError) as error:
                raise UserError(f"--runtime-env, --working-dir: Ray rejects them ({one_line(error)})") from None
            except (RuntimeError, OSError) as error:
                if time.monotonic() > until:
                    raise UserError(f"--address {self.address}: rejects the job ({one_line(error)})") from None
            time.sleep(POLL_S)

    def running(self, line: str) -> str | None:
        """The id of a job that runs this shell line now."""
        for job in self._client.list_jobs():
            if job.entrypoint == line and job.submission_id and not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def follow(self, job: str, write: Callable[[str], None]) -> int:
        """Write a job's log from its beginning until the job ends; the exit status of its command.

        Raises:
            UserError: the connection to the cluster was lost.
        """
        import aiohttp

        try:
            return exit_status(asyncio.run(self._follow(job, write)))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise UserError(
                f"--address {self.address}: the connection was lost while {job} was running ({one_line(error)}); "
                f"if the cluster still runs: {self.ray_command('logs --follow', job)}"
            ) from None

    async def _follow(self, job: str, write: Callable[[str], None]) -> "JobDetails":
        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        tailing = asyncio.create_task(tail())
        while not (await asyncio.wait({tailing}, timeout=CHECK_EVERY_S))[0]:
            await asyncio.to_thread(self._client.get_job_status, job)  # raises if the cluster is gone
        await tailing
        while not (details := await asyncio.to_thread(self._client.get_job_info, job)).status.is_terminal():
            await asyncio.sleep(POLL_S)
        return details

    def ray_command(self, words: str, job: str) -> str:
        """The line for a shell that does something with a job, by Ray's own tool."""
        return f"ray job {words} --address {self.address} {job}"


def exit_status(details: "JobDetails") -> int:
    """Of the command that ran as a job: 0, 2, 143 (stopped on request), or 1 for all else."""
    if details.status.value == "SUCCEEDED":
        return 0
    code = details.driver_exit_code
    return code if details.status.value == "FAILED" and code in (2, 128 + signal.SIGTERM) else 1


@contextmanager
def cluster(address: str) -> Iterator[Jobs]:
    """The jobs of the cluster at an address of `dashboard_address`; for `local`, of one that ends with the context."""
    if address != LOCAL:
        yield Jobs(address)
        return
    ask_for_tokens()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The `python` of a job is this one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    import ray

    try:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"--address local: Ray cannot start a cluster on this machine ({one_line(error)})") from None
    try:
        if not context.dashboard_url:
            raise UserError("--address local: Ray's dashboard did not start; see /tmp/ray/session_latest/logs")
        yield Jobs(f"http://{context.dashboard_url}")
    finally:
        ray.shutdown()
