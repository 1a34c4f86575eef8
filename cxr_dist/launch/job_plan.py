"""What is sent to a cluster's job API, and what its answers mean: pure, so that it is tested without a cluster."""

import re
import shlex
import signal
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from tfrecords_builder.common.errors import UserError

LOCAL = "local"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NEEDED = "give the cluster's dashboard, http://HOST:8265"
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


def dashboard_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL of a dashboard without a slash at its end, or `local`.

    Raises:
        UserError: none is given, or what is given is an address of another kind.
    """
    if given is None:
        found = (environment.get(name, "") for name in ADDRESS_VARIABLES)
        given = next((address for address in found if address.startswith(("http://", "https://"))), None)
    if given is None:
        names = " nor ".join(f"${name}" for name in ADDRESS_VARIABLES)
        raise UserError(f"--address: {_NEEDED}, or local (neither {names} is an http address)")
    if given == LOCAL:
        return LOCAL
    if given.startswith("ray://"):
        raise UserError(f"--address {given}: is of Ray Client, which jobs do not use; {_NEEDED}")
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(
            f"--address {given}: is not of a dashboard; {_NEEDED} (host:port is what --address of train takes)"
        )
    if parts.username or parts.password:
        raise UserError("--address: holds a name or password, which others could read; tokens go into $RAY_AUTH_TOKEN")
    return given.rstrip("/")


def entrypoint(command: str, arguments: Sequence[str]) -> str:
    """The shell's line of a job; whatever characters the arguments hold, the command gets them as they are."""
    return shlex.join(["python", "-m", "cxr_dist", command, *arguments])


def exit_status(status: str, driver_exit_code: int | None) -> int:
    """The exit status of the command that ran as a job: 0, 2, 143 (stopped on request), or 1 for all else."""
    if status == "SUCCEEDED":
        return 0
    return driver_exit_code if status == "FAILED" and driver_exit_code in (2, 128 + signal.SIGTERM) else 1


def ended(status: str) -> bool:
    """Whether a job in this state stays in it."""
    return status in _ENDED


def check_submission_id(submission_id: str) -> str:
    """The id, which becomes part of addresses and of names of files.

    Raises:
        UserError: it holds anything but letters, digits, dots, dashes and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", submission_id):
        raise UserError(
            f"--submission-id {submission_id!r}: use letters, digits, and . _ - inside, at most 128 of them"
        )
    return submission_id


def made_up_id(command: str, now: float) -> str:
    """An id that says what and when (UTC)."""
    return time.strftime(f"{command}-%Y%m%d-%H%M%S", time.gmtime(now))


@dataclass(frozen=True)
class Step:
    """One command to run as a job."""

    command: str
    arguments: Sequence[str]

    @property
    def entrypoint(self) -> str:
        return entrypoint(self.command, self.arguments)


def pipeline_steps(
    source: str, dataset: str, experiment: str, image_size: str | None = None, tune_options: Sequence[str] = ()
) -> list[Step]:
    """The jobs of a pipeline, in their order. Names that begin with a dash come after `--`."""
    size = [f"--image-size={image_size}"] if image_size is not None else []
    evaluation = experiment.rstrip("/") + "/evaluation"
    return [
        Step("build", ["--launcher", "local", *size, "--", source, dataset]),
        Step("tune", ["--address", "auto", "--no-evaluation", f"--out={experiment}", *tune_options, "--", dataset]),
        Step("evaluate", [f"--out={evaluation}", "--", experiment]),
    ]


@dataclass(frozen=True)
class Decision:
    """What to do about a step that may have run before."""

    action: Literal["skip", "attach", "submit"]
    submission_id: str


def attempt(step_id: str, number: int) -> str:
    """The submission id of a step's attempt, counted from 1."""
    return step_id if number == 1 else f"{step_id}-{number}"


def decide(step_id: str, states: Mapping[str, str]) -> Decision:
    """What a step needs, from the states of all jobs by their ids: its last attempt alone counts."""
    numbers = [number for number in range(1, len(states) + 1) if attempt(step_id, number) in states]
    pattern = re.compile(re.escape(step_id) + r"-([2-9]|[1-9]\d+)")
    numbers += [int(found[1]) for found in map(pattern.fullmatch, states) if found]
    if not numbers:
        return Decision("submit", step_id)
    last = attempt(step_id, max(numbers))
    if not ended(states[last]):
        return Decision("attach", last)
    if states[last] == "SUCCEEDED":
        return Decision("skip", last)
    return Decision("submit", attempt(step_id, max(numbers) + 1))


def check_size(folder: str, files: Iterable[tuple[str, int]], limit: int) -> int:
    """The bytes of the files of a working_dir, given as (path inside it, size).

    Raises:
        UserError: they are more than `limit`; names the largest entries.
    """
    entries: dict[str, int] = {}
    for path, size in files:
        top = path.split("/")[0] + ("/" if "/" in path else "")
        entries[top] = entries.get(top, 0) + size
    total = sum(entries.values())
    if total > limit:
        largest = sorted(entries.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
        named = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in largest)
        raise UserError(
            f"--working-dir {folder}: {total / 1e6:,.0f} MB, and the cluster takes {limit / 1e6:,.0f} MB; leave data "
            f"out with .rayignore (the largest: {named})"
        )
    return total


_SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "APIKEY"}
_SECRET_ENDS = ("ACCESS_KEY", "API_KEY", "PRIVATE_KEY")


def check_no_secret(environment: Mapping[str, object], texts: Iterable[str], token: str | None) -> None:
    """Refuse what everyone who may see a job would read: names of secrets among its variables, the token anywhere.

    Raises:
        UserError: names the variable.
    """
    for name in environment:
        words = name.upper().split("_")
        is_place = words[-1] in ("PATH", "FILE", "DIR")
        if not is_place and (_SECRET_WORDS & set(words) or name.upper().endswith(_SECRET_ENDS)):
            raise UserError(
                f"--runtime-env: env_vars.{name}: all who see the job could read it; set it on the cluster's machines"
            )
    if token and any(token in text for text in [*texts, *map(str, environment.values())]):
        raise UserError("the job would hold the cluster's token, for all who see it to read; leave it out")


@dataclass(frozen=True)
class Row:
    """What a list says of a job; times in seconds since 1970."""

    submission_id: str
    status: str
    start: float | None
    end: float | None
    entrypoint: str


def job_table(rows: Collection[Row], now: float, width: int) -> list[str]:
    """Lines of at most `width` letters (where the ids allow), the job that began last at the end."""
    head = ("id", "status", "start (UTC)", "duration", "command")
    cells = [head]
    for row in sorted(rows, key=lambda row: (row.start or now, row.submission_id)):
        start, seconds = "", ""
        if row.start is not None:
            start = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.start))
            whole = max(0, int((row.end if row.end is not None else now) - row.start))
            seconds = f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
        command = " ".join(row.entrypoint.split()).removeprefix("python -m ")
        cells.append((row.submission_id, row.status, start, seconds, command))
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    room = max(20, width - sum(widths) - 8)
    lines = []
    for cell in cells:
        text = cell[4] if len(cell[4]) <= room else cell[4][: room - 3] + "..."
        lines.append(
            "  ".join([*(part.ljust(size) for part, size in zip(cell[:4], widths, strict=True)), text]).rstrip()
        )
    return lines
