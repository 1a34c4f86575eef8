"""What the commands about jobs of a cluster do: options in, one call into orchestration, lines for people out."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING

from cxr_dist.runs.interrupt import INTERRUPTED
from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    from cxr_dist.launch.job_client import Jobs
    from cxr_dist.launch.submit import Request

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"


def submit(options: argparse.Namespace) -> None:
    """One command as a job; `options.step` is what runs, checked by the command's own parser."""
    from cxr_dist.launch import submit as submission

    request, step = _request(options), options.step
    if options.detach and request.address == "local":
        raise UserError("--detach: the cluster of --address local ends with this command; leave one of them out")
    submission_id = submission.new_id(request, step.command)
    _note_relative(options.places)
    environment = submission.prepare(request, [step])
    with submission.cluster(request.address, request.timeout_s) as jobs:
        submission.send(jobs, environment, request.version, step, submission_id)
        if options.detach:
            print(submission_id)
            _say(_how_to_follow(submission_id, jobs))
            return
        _say(f"{submission_id}: sent to {jobs.address}")
        with _left_by_ctrl_c(jobs, request.address == "local", _how_to_follow(submission_id, jobs)):
            code = submission.follow(jobs, submission_id, _write, _say)
    _exit(code)


def pipeline(options: argparse.Namespace) -> None:
    """Build, tune and evaluate as three jobs, one after the other."""
    from cxr_dist.launch import submit as submission

    request, steps = _request(options), options.steps
    name = submission.new_id(request, "pipeline")
    if options.detach:
        raise UserError(
            "--detach: a pipeline needs someone to send its next job; start it inside tmux or nohup (the same command "
            "with its --submission-id resumes)"
        )
    _note_relative(options.places)
    environment = submission.prepare(request, steps)
    print(f"pipeline {name}", flush=True)
    own = request.address == "local"
    with (
        submission.cluster(request.address, request.timeout_s) as jobs,
        _left_by_ctrl_c(jobs, own, f"To resume the pipeline: the same command with --submission-id {name}"),
    ):
        code = submission.run_pipeline(jobs, environment, request.version, steps, name, _write, _say)
    _exit(code)


def list_jobs(options: argparse.Namespace) -> None:
    from cxr_dist.launch.job_plan import job_table

    jobs = _jobs(options)
    for line in job_table(jobs.rows(), time.time(), shutil.get_terminal_size((120, 24)).columns):
        print(line)


def attach(options: argparse.Namespace) -> None:
    """Follow a job; this command's exit status is the job's."""
    from cxr_dist.launch import submit as submission

    jobs = _jobs(options)
    jobs.details(options.job)
    with _left_by_ctrl_c(jobs, False, _how_to_follow(options.job, jobs)):
        code = submission.follow(jobs, options.job, _write, _say)
    _exit(code)


def stop(options: argparse.Namespace) -> None:
    jobs = _jobs(options)
    status = jobs.stop(options.job)
    print(f"{options.job}: " + ("had ended already" if status is None else f"has ended ({status})"))


def logs(options: argparse.Namespace) -> None:
    _write(_jobs(options).logs(options.job))


def dashboards(options: argparse.Namespace) -> None:
    """Where to look at a cluster and at an experiment."""
    from cxr_dist.launch.dashboards import dashboard_lines
    from cxr_dist.launch.job_plan import ADDRESS_VARIABLES, dashboard_address

    given = options.address
    if given is None and not any(os.environ.get(name, "").startswith("http") for name in ADDRESS_VARIABLES):
        given = DEFAULT_DASHBOARD
    address = dashboard_address(given, os.environ)
    if address == "local":
        raise UserError("--address local: is for submit; give the address of a cluster that runs")
    if options.experiment is not None and not options.experiment.is_dir():
        raise UserError(f"--experiment {options.experiment}: no such folder")
    for line in dashboard_lines(address, options.experiment, os.environ, options.timeout):
        print(line)


def _request(options: argparse.Namespace) -> "Request":
    from cxr_dist.launch.job_plan import dashboard_address
    from cxr_dist.launch.submit import Request
    from cxr_dist.runs.versions import DISTRIBUTION, version_of

    return Request(
        address=dashboard_address(options.address, os.environ),
        version=version_of(DISTRIBUTION),
        submission_id=options.submission_id,
        working_dir=options.working_dir,
        runtime_env=options.runtime_env,
        timeout_s=options.timeout,
    )


def _jobs(options: argparse.Namespace) -> "Jobs":
    from cxr_dist.launch.job_client import Jobs
    from cxr_dist.launch.job_plan import check_submission_id, dashboard_address

    address = dashboard_address(options.address, os.environ)
    if address == "local":
        raise UserError("--address local: is for submit; give the address of a cluster that runs")
    if getattr(options, "job", None) is not None:
        check_submission_id(options.job)
    return Jobs(address, options.timeout)


@contextmanager
def _left_by_ctrl_c(jobs: "Jobs", own: bool, how: str) -> Iterator[None]:
    """Ctrl-C ends the following, and what is left behind is said: nothing of a cluster of our own, else the job."""
    try:
        yield
    except KeyboardInterrupt:
        if own:
            _say("stopped: the cluster of --address local ends with this command, and the job with it")
        else:
            _say(f"no longer following; the job still runs at {jobs.address}. {how}")
        raise SystemExit(INTERRUPTED) from None


def _how_to_follow(submission_id: str, jobs: "Jobs") -> str:
    at = f"{submission_id} --address {jobs.address}"
    return f"follow it: cxr-dist jobs attach {at}; stop it: cxr-dist jobs stop {at}"


def _note_relative(places: Sequence[tuple[str, object]]) -> None:
    """A job's working folder is temporary, and on another machine."""
    for name, place in places:
        if isinstance(place, PurePath) and not place.is_absolute():
            _say(
                f"note: {name} {place} is relative to the job's temporary folder on the cluster; give an absolute path"
            )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    if code:
        raise SystemExit(code)
