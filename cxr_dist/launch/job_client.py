"""The job API of one cluster: every call has a limit, and every refusal is one line that says what to do."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cxr_dist.launch.job_environment import quiet_ray
from cxr_dist.launch.job_plan import ADDRESS_VARIABLES, Row, ended
from cxr_dist.launch.ray_tokens import HOW_TO_SET
from tfrecords_builder.common.errors import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

RECONNECTIONS = 5
PAUSE_S = 2.0
AGENT_LIMIT_S = 60.0
"""For a cluster that has just started to be ready for jobs."""
NO_AGENT = "No available agent"
SILENCE_S = 15.0
"""After so long without a line of the log, the cluster is asked whether it is still there."""
STOP_LIMIT_S = 60.0


class UnreachableError(UserError):
    """Nothing usable answers at the address, now."""


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given."""
    held = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`.

    Raises:
        UserError: No dashboard of Ray answers there within `timeout_s`, or it asks for another token.
    """

    def __init__(self, address: str, timeout_s: float = 30.0) -> None:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": timeout_s} | options)

        quiet_ray()
        self.address = address
        with self._explained(), _without_addresses():
            try:
                self._client = Client(address)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--address {address}: what answers there is no Ray dashboard") from error

    @contextmanager
    def _explained(self, job: str | None = None) -> Iterator[None]:
        """Ray's errors, and those of what it uses, as lines for people."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(_about_token(self.address, str(error))) from None
        except requests.HTTPError as error:
            answer = error.response.status_code if error.response is not None else 0
            if answer >= 500:
                raise UnreachableError(f"--address {self.address}: the dashboard fails ({one_line(error)})") from None
            raise UserError(f"--address {self.address}: what answers there is no Ray dashboard ({answer})") from None
        except requests.exceptions.JSONDecodeError:
            raise UserError(f"--address {self.address}: what answers there is no Ray dashboard") from None
        except (requests.RequestException, OSError) as error:
            reason = "in time" if isinstance(error, requests.Timeout) else f"({type(error).__name__})"
            raise UnreachableError(
                f"--address {self.address}: no dashboard answers there {reason}; is the cluster up, and the port open?"
            ) from None
        except RuntimeError as error:
            raise self._refusal(str(error), job) from None

    def _refusal(self, text: str, job: str | None) -> UserError:
        """What a RuntimeError of Ray's client means; it knows no other type."""
        if "Version check returned 404" in text:
            return UserError(f"--address {self.address}: what answers there is no Ray dashboard")
        if "already exists" in text:
            return UserError(f"--submission-id {job}: is taken; leave it out, or follow it with `cxr-dist jobs attach`")
        if "status code 404" in text:
            return UserError(f"{job}: the cluster at {self.address} knows no such job; see `cxr-dist jobs list`")
        said = " ".join(text.split())
        # The line of a traceback that says something is its last.
        line = (
            f"--address {self.address}: the cluster refused ({said[:80]} ... {said[-160:]})"
            if len(said) > 240
            else (f"--address {self.address}: the cluster refused ({said})")
        )
        return UnreachableError(line) if "status code 5" in text else UserError(line)

    def submit(
        self, entrypoint: str, submission_id: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Upload the working_dir where the cluster has not got it, and start a job.

        Raises:
            UserError: the id is taken, or the cluster refuses the job.
        """
        if submission_id in self.states():
            raise self._refusal("already exists", submission_id)
        until = time.monotonic() + AGENT_LIMIT_S
        while True:
            try:
                with self._explained(submission_id):
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env=dict(runtime_env),
                        metadata=dict(metadata),
                    )
                return
            except (ValueError, TypeError) as error:
                raise UserError(f"--runtime-env: {one_line(error)}") from None
            except UnreachableError as error:
                # A cluster answers before the process that starts its jobs does.
                if NO_AGENT not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(PAUSE_S)

    def details(self, job: str) -> "JobDetails":
        """The state of a job.

        Raises:
            UserError: the cluster knows no such job.
        """
        with self._explained(job):
            return self._client.get_job_info(job)

    def rows(self) -> list[Row]:
        """All jobs that were submitted."""
        with self._explained():
            found = self._client.list_jobs()
        seconds = [(job.start_time and job.start_time / 1e3, job.end_time and job.end_time / 1e3) for job in found]
        return [
            Row(job.submission_id, job.status.value, start, end, job.entrypoint)
            for job, (start, end) in zip(found, seconds, strict=True)
            if job.submission_id
        ]

    def states(self) -> dict[str, str]:
        """The states of all jobs by their ids."""
        return {row.submission_id: row.status for row in self.rows()}

    def logs(self, job: str) -> str:
        """All that a job has written."""
        with self._explained(job):
            return self._client.get_job_logs(job)

    def get(self, endpoint: str) -> Any:
        """What the dashboard says at an address of its own, parsed from JSON."""
        with self._explained():
            answer = self._client._do_request("GET", endpoint)
            answer.raise_for_status()
            return answer.json()

    def stop(self, job: str, limit_s: float = STOP_LIMIT_S) -> str | None:
        """Stop a job and wait until it has; its last state, None when it had ended before.

        Raises:
            UserError: it has not within `limit_s`.
        """
        if ended(self.details(job).status.value):
            return None
        with self._explained(job):
            self._client.stop_job(job)
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            status = self.details(job).status.value
            if ended(status):
                return str(status)
            time.sleep(0.5)
        raise UserError(f"{job}: has not stopped within {limit_s:.0f} s; look at it with `cxr-dist jobs logs {job}`")

    def follow(self, job: str, write: Callable[[str], None]) -> "JobDetails":
        """Hand on what a job writes until it ends, from the beginning; its last state.

        Raises:
            UserError: the cluster was lost, and not found again by a few reconnections.
        """
        return asyncio.run(self._follow(job, _Output(write)))

    async def _follow(self, job: str, output: "_Output") -> "JobDetails":
        import aiohttp

        failures = 0
        while True:
            before = output.shown
            try:
                details = await asyncio.to_thread(self.details, job)
                await self._tail(job, output)
                details = await asyncio.to_thread(self.details, job)
            except (UnreachableError, aiohttp.ClientError, OSError, RuntimeError) as error:
                failures = 1 if output.shown > before else failures + 1
                if failures > RECONNECTIONS:
                    raise UserError(
                        f"--address {self.address}: the cluster was lost while {job} ran, and {RECONNECTIONS} "
                        f"reconnections failed ({one_line(error)}); if it comes back: cxr-dist jobs attach {job}"
                    ) from None
                await asyncio.sleep(PAUSE_S)
                continue
            failures = 0
            if ended(details.status.value):
                return details
            # The log's end was told before the job's: its connection was cut in good order. Begin another.
            await asyncio.sleep(PAUSE_S / 2)

    async def _tail(self, job: str, output: "_Output") -> None:
        """One connection to the log, which begins it anew; returns at its end."""
        stream = aiter(self._client.tail_job_logs(job))
        output.rewind()
        pending: asyncio.Future[str | None] | None = None
        over = False
        try:
            while True:
                pending = asyncio.ensure_future(anext(stream, None))
                while not (await asyncio.wait({pending}, timeout=SILENCE_S))[0]:
                    # A machine that vanishes closes no connection.
                    status = (await asyncio.to_thread(self.details, job)).status.value
                    if ended(status) and over:
                        return
                    over = ended(status)
                text = pending.result()
                if text is None:
                    return
                output.feed(text)
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await pending
            await stream.aclose()


class _Output:
    """Text that comes several times over, shown once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.shown = 0
        self._write = write
        self._position = 0

    def rewind(self) -> None:
        """The text begins anew."""
        self._position = 0

    def feed(self, text: str) -> None:
        known = max(0, self.shown - self._position)
        self._position += len(text)
        if len(text) > known:
            self.shown = self._position
            self._write(text[known:])


def _about_token(address: str, text: str) -> str:
    if text.startswith("Authentication failed"):
        return f"--address {address}: the cluster has another token (403); {HOW_TO_SET}"
    if text.startswith("Authentication required"):
        return f"--address {address}: the cluster asks for a token (401); {HOW_TO_SET}"
    return f"--address {address}: RAY_AUTH_MODE is token, and there is none; {HOW_TO_SET}"
