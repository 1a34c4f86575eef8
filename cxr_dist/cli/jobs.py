"""The commands `submit` and `pipeline`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_dist.cli.options import Command, add_config_options, positive
from cxr_dist.cli.tune import DEFAULT_SEARCH, SEARCH_HELP, run_apart
from cxr_dist.runs.interrupt import INTERRUPTED
from tfrecords_builder.common.errors import UserError


def add_parsers(command: Command) -> None:
    submit_parser = command("submit", submit, "run a command of cxr-dist as a job of a Ray cluster and follow its log")
    submit_parser.usage = "cxr-dist submit [OPTIONS] --address URL -- COMMAND..."
    _add_job_options(submit_parser, "$RAY_API_SERVER_ADDRESS or $RAY_ADDRESS")
    submit_parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="command with its options, such as -- train /shared/dataset --out /shared/run; give absolute paths",
    )

    steps = command(
        "pipeline",
        pipeline,
        "build, tune and evaluate in turn; resumes when it is started again",
    )
    steps.add_argument("source", metavar="SOURCE", help="folder of labelled images, as for build")
    steps.add_argument("dataset", metavar="DATASET", help="folder or address of the dataset that is built")
    steps.add_argument(
        "--out",
        required=True,
        metavar="EXPERIMENT",
        help="folder of the search; the evaluation is written to its folder evaluation",
    )
    steps.add_argument(
        "--image-size", type=positive, metavar="PX", help="width and height of a stored image (default: 224)"
    )
    add_config_options(steps, SEARCH_HELP, DEFAULT_SEARCH)
    steps.add_argument("--launcher", choices=["ray", "local"], help="launcher of the search (default: ray)")
    _add_job_options(steps, "three processes of this machine")


def _add_job_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"cluster's dashboard (http://HOST:8265), or local for a cluster of its own (default: {default})",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="folder of code to send with the job, without files in .rayignore"
    )
    parser.add_argument(
        "--runtime-env",
        type=Path,
        metavar="YAML",
        help="file with the job's Ray runtime environment",
    )


def submit(options: argparse.Namespace) -> None:
    """Run one command as a job; the exit status is the command's."""
    from cxr_dist.launch.submit import dashboard_address

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    words = words[1:] if words[:1] == ["cxr-dist"] else words
    if not words:
        raise UserError("COMMAND: give the command of the job after --, such as: -- train DATASET --out RUN")
    options.check_command(words)
    _run_jobs(options, dashboard_address(options.address), [words])


def pipeline(options: argparse.Namespace) -> None:
    """Run the steps in turn; each resumes, or does nothing, when it is started again."""
    steps = pipeline_steps(options)
    for step in steps:
        options.check_command(step)
    if options.address is None:
        if options.working_dir or options.runtime_env:
            raise UserError("--working-dir, --runtime-env: need --address; add it, or leave them out")
        for step in steps:
            if status := run_apart(step):
                _say(f"{step[0]} failed with exit status {status}; start the same command again to resume")
                raise SystemExit(status if status > 0 else 1)
        return
    for name in ("source", "dataset", "out"):
        path = getattr(options, name)
        if "://" not in path and not Path(path).is_absolute():
            raise UserError(f"{path}: is relative, and a job runs in another folder; give an absolute path")
    from cxr_dist.launch.submit import dashboard_address

    _run_jobs(options, dashboard_address(options.address), steps)


def pipeline_steps(options: argparse.Namespace) -> list[list[str]]:
    """The command lines of build, tune and evaluate. Names that begin with a dash come after `--`."""
    size = [f"--image-size={options.image_size}"] if options.image_size else []
    search = [f"--config={options.config}", *(f"--set={override}" for override in options.overrides)]
    search += [f"--launcher={options.launcher}"] if options.launcher else []
    evaluation = options.out.rstrip("/") + "/evaluation"
    return [
        ["build", *size, "--", options.source, options.dataset],
        ["tune", "--no-evaluation", f"--out={options.out}", *search, "--", options.dataset],
        ["evaluate", f"--out={evaluation}", "--", options.out],
    ]


def _run_jobs(options: argparse.Namespace, address: str, commands: Sequence[Sequence[str]]) -> None:
    """The commands as jobs, each sent when the one before has succeeded; a step that runs already is followed."""
    from cxr_dist.launch import submit as launch

    environment = launch.job_environment(options.working_dir, options.runtime_env)
    is_own = address == launch.LOCAL
    with launch.cluster(address) as jobs:
        for command in commands:
            line = launch.entrypoint(command)
            job = jobs.running(line) if len(commands) > 1 else None
            if job is None:
                job = jobs.send(line, environment, launch.START_TIMEOUT_S if is_own else 0.0)
            _say(f"{job}: {command[0]} is running at {jobs.address}")
            try:
                status = jobs.follow(job, lambda text: print(text, end="", flush=True))
            except KeyboardInterrupt:
                left = "the cluster of --address local stops, and the job with it"
                if not is_own:
                    left = (
                        f"the job continues; to stop it: {jobs.ray_command('stop', job)}; "
                        f"to follow it: {jobs.ray_command('logs --follow', job)}"
                    )
                _say(f"no longer following; {left}")
                raise SystemExit(INTERRUPTED) from None
            if status:
                _say(f"{job}: {command[0]} failed (exit status {status})")
                raise SystemExit(status)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
