"""Options of the commands about jobs. Those of a command that becomes a job are read off that command's own parser."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_dist.cli import jobs as job_commands
from cxr_dist.launch.job_plan import Step, pipeline_steps

Parsers = Mapping[str, argparse.ArgumentParser]
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
SUBMITTED = {"train": ("--address", "auto"), "tune": ("--address", "auto"), "evaluate": ()}
"""The commands that can be one job, and what each is told so that its driver joins the job's cluster."""
_KEPT_BACK = {"--help", "--address", "--launcher"}
_ON_THE_CLUSTER = "Paths are those of the cluster's machines, and are passed on as they are: give absolute ones."
_BY_HAND = "Ray's own tool does as well: ray job submit --working-dir . -- python -m cxr_dist %s ..."


class _Forward(argparse.Action):
    """Keeps what was given as it was given, to be passed on: options and then names."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = [values] if isinstance(values, str) else list(values or [])
        options, names = getattr(namespace, "forwarded", None) or ([], [])
        if option_string is None:
            namespace.forwarded = (options, [*names, *given])
        elif len(given) == 1 and given[0].startswith("-"):
            namespace.forwarded = ([*options, f"{option_string}={given[0]}"], names)
        else:
            namespace.forwarded = ([*options, option_string, *given], names)


def forward_options(parser: argparse.ArgumentParser, command: argparse.ArgumentParser, without: set[str]) -> None:
    """Let `parser` take what `command` takes, unread, except the options in `without`; names too, unless those hold
    `names`."""
    for action in command._actions:
        if without & set(action.option_strings) or ("names" in without and not action.option_strings):
            continue
        details: dict[str, Any] = {"nargs": action.nargs, "help": action.help, "metavar": action.metavar}
        if action.option_strings:
            default = None if action.default is argparse.SUPPRESS else action.default
            if details["help"] and details["help"] is not argparse.SUPPRESS:
                details["help"] = details["help"].replace("%(default)s", str(default))
            if action.choices is not None and action.metavar is None:
                details["metavar"] = "{" + ",".join(map(str, action.choices)) + "}"
            details["required"] = action.required
            if not isinstance(details["metavar"], str) and action.nargs != 0:
                details["metavar"] = action.dest.upper()
            details["dest"] = "forwarded"
        names = action.option_strings or ["forwarded"]
        parser.add_argument(*names, action=_Forward, default=argparse.SUPPRESS, **details)


def forwarded(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The options and the names that were given."""
    return getattr(options, "forwarded", None) or ([], [])


def _step(command: str, options: argparse.Namespace) -> Step:
    flags, names = forwarded(options)
    mark = ["--"] if any(name.startswith("-") for name in names) else []
    return Step(command, [*SUBMITTED[command], *flags, *mark, *names])


def _places(options: argparse.Namespace) -> list[tuple[str, object]]:
    """What of a command's options is written or read on the cluster, whatever it runs from."""
    found = ((name, getattr(options, name, None)) for name in ("dataset", "run", "out", "source", "images"))
    return [(name if name != "out" else "--out", place) for name, place in found if place is not None]


def add_submit(command: Command, commands: Parsers) -> None:
    """`submit` with one subcommand for each of `commands` that can be a job, and `pipeline`."""
    submit = command("submit", job_commands.submit, "run a command as a job of a Ray cluster, and follow it")
    kinds = submit.add_subparsers(dest="submitted", required=True, metavar="COMMAND")
    for name in SUBMITTED:
        if name in commands:
            _add_kind(kinds, name, commands[name])
    if "tune" in commands:
        _add_pipeline(kinds, commands)


def _add_kind(kinds: Any, name: str, own: argparse.ArgumentParser) -> None:
    def run(options: argparse.Namespace) -> None:
        options.step = _step(name, options)
        options.places = _places(own.parse_args(options.step.arguments))
        job_commands.submit(options)

    text = f"{name} as a job: takes what {name} takes. {_ON_THE_CLUSTER}"
    kind = kinds.add_parser(name, help=f"{name} as a job", description=text, epilog=_BY_HAND % name)
    kind.set_defaults(action=run)
    forward_options(kind, own, _KEPT_BACK | {"-h"})
    _add_sending(kind)


def _add_pipeline(kinds: Any, commands: Parsers) -> None:
    def run(options: argparse.Namespace) -> None:
        flags, _ = forwarded(options)
        steps = pipeline_steps(options.source, options.dataset, options.out, options.image_size, flags)
        options.places = []
        for step in steps:
            parsed = commands[step.command].parse_args(step.arguments)
            options.places += [place for place in _places(parsed) if place not in options.places]
        options.steps = steps
        job_commands.pipeline(options)

    text = (
        "build on the head, tune, evaluate: three jobs, each sent when the one before has succeeded. Started again "
        f"with the same --submission-id it goes on. {_ON_THE_CLUSTER}"
    )
    kind = kinds.add_parser("pipeline", help="build, tune and evaluate as three jobs", description=text)
    kind.set_defaults(action=run)
    kind.add_argument("source", metavar="SOURCE", help="labelled images, as build takes them")
    kind.add_argument("dataset", metavar="DATASET", help="where build writes; an existing one is used")
    kind.add_argument("--out", required=True, metavar="EXPERIMENT", help="the experiment's folder")
    kind.add_argument("--image-size", metavar="PX", help="stored size, as build takes it")
    forward_options(kind, commands["tune"], _KEPT_BACK | {"-h", "--out", "--no-evaluation", "names"})
    _add_sending(kind)


def _add_sending(parser: argparse.ArgumentParser) -> None:
    sending = parser.add_argument_group("how it is sent")
    _add_address(sending, ", or local: a cluster of its own, stopped at the end")
    sending.add_argument("--detach", action="store_true", help="do not follow the job; print its id")
    sending.add_argument(
        "--working-dir", type=Path, metavar="DIR", help="code for the job, less .rayignore (default: this checkout)"
    )
    sending.add_argument(
        "--runtime-env", type=Path, metavar="YAML", help="more of Ray's runtime_env: pip, env_vars (no secrets), ..."
    )
    sending.add_argument("--submission-id", metavar="ID", help="(default: made of the command and the time)")


def _add_address(parser: Any, more: str = "") -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"http://HOST:8265 of the cluster's dashboard{more} (default: $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS)",
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="limit on connecting (default: %(default)s)"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds above 0")
    return seconds


def add_jobs(command: Command) -> None:
    """`jobs list|attach|stop|logs` and `dashboards`."""
    jobs = command("jobs", job_commands.list_jobs, "jobs of a Ray cluster: list, attach, stop, logs")
    kinds = jobs.add_subparsers(dest="about", required=True, metavar="WHAT")
    for name, run, text in (
        ("list", job_commands.list_jobs, "all jobs that were submitted"),
        ("attach", job_commands.attach, "follow a job; the exit status is the job's"),
        ("stop", job_commands.stop, "stop a job, and wait until it has"),
        ("logs", job_commands.logs, "print what a job has written"),
    ):
        kind = kinds.add_parser(name, help=text, description=text)
        kind.set_defaults(action=run)
        if name != "list":
            kind.add_argument("job", metavar="ID")
        _add_address(kind)

    dashboards = command("dashboards", job_commands.dashboards, "where to look at a cluster and an experiment")
    _add_address(dashboards)
    dashboards.add_argument("--experiment", type=Path, metavar="DIR", help="of an experiment, or of a run")
