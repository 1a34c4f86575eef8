"""Jobs of a real cluster of this machine, which asks for a token: sent, followed, left, and found again."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
TOKEN = secrets.token_hex(32)
LIMIT_S = 480.0
SERVE = """
import sys
from cxr_dist.launch.submit import cluster

with cluster("local") as jobs:
    jobs.send("true", {}, wait_s=300)  # accepts jobs from now on
    print(jobs.address, flush=True)
    sys.stdin.read()
"""
SLEEP = """
import sys
from cxr_dist.launch.submit import Jobs

jobs = Jobs(sys.argv[1])
job = jobs.running("echo begun; sleep 600") or jobs.send("echo begun; sleep 600", {})
print(job, flush=True)
try:
    jobs.follow(job, lambda text: print(text, end="", flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""
SPACE = """
base: smoke
search: {trials: 2, sampler: random, scheduler: off, parameters: {model.dropout: {low: 0.0, high: 0.5}}}
stages: {1: {epochs: 1}, 2: {epochs: 0}}
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | changes


def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    line = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(**changes))


def run(*arguments: object, timeout_s: float = LIMIT_S, **changes: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **changes)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(line: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"ended without {line!r}: {process.stderr and process.stderr.read()}")


class Cluster:
    """A cluster in a process of its own; Ray ends all of it when that process ends, even by SIGKILL."""

    def __init__(self) -> None:
        self.process = start("-c", SERVE)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.process.communicate(timeout=LIMIT_S)

    def kill(self) -> None:
        """All of it, and first those who would still tell of a job that its processes are gone."""
        with suppress(psutil.NoSuchProcess):
            parts = psutil.Process(self.process.pid).children(recursive=True)
            for part in sorted(parts, key=lambda part: "dashboard" not in name_of(part)):
                with suppress(psutil.NoSuchProcess):
                    part.kill()
        self.process.kill()
        self.process.wait(timeout=LIMIT_S)


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    yield running
    if running.process.poll() is None:
        try:
            running.process.communicate("", timeout=LIMIT_S)
        finally:
            running.kill()


@pytest.mark.nightly
def test_a_pipeline_on_phantoms(phantom_source: Path, tmp_path: Path) -> None:
    """Build, search and evaluation as jobs of a cluster of the command's own, which the search joins.

    The first of this file: the cluster of the others leaves no room for one.
    """
    experiment, space = tmp_path / "experiment", tmp_path / "space.yaml"
    space.write_text(SPACE)
    done = run(
        *("-m", "cxr_dist", "pipeline", phantom_source, tmp_path / "dataset", "--out", experiment),
        *("--image-size", 32, "--config", space, "--address", "local"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((experiment / "evaluation" / "metrics.json").read_text())
    best = json.loads((experiment / "best.json").read_text())
    assert metrics["n"] == 12
    assert best["trial"] in (0, 1)


def test_the_jobs_log_and_exit_status_are_the_commands(cluster: Cluster, tmp_path: Path) -> None:
    """The job has the folder and the variables that were given; its command finds the code there."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "cxr_dist.py").write_text(
        "import os, sys; print(os.environ['GIVEN']); sys.exit('error: mine')"
    )
    (tmp_path / "env.yaml").write_text("env_vars: {GIVEN: hello, PYTHONPATH: ''}\n")
    at = ("-m", "cxr_dist", "submit", "--address", cluster.url)
    own = ("--working-dir", tmp_path / "code", "--runtime-env", tmp_path / "env.yaml")
    done = run(*at, *own, "--", "verify", "/d")
    assert done.stdout.splitlines()[-2:] == ["hello", "error: mine"], done.stderr
    assert done.returncode == 1
    done = run(*at, "--", "evaluate", "/no such run", "--out", "/nowhere", RAY_ADDRESS="http://elsewhere:1")
    assert done.stdout.splitlines()[-1] == "error: /no such run: no such folder; give the folder of a run"
    assert done.stderr.splitlines()[-1].endswith(": evaluate failed (exit status 2)")
    assert done.returncode == 2


def test_a_token_is_asked_for(cluster: Cluster) -> None:
    at = ("-m", "cxr_dist", "submit", "--address", cluster.url, "--", "verify", "/d")
    for changes in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        done = run(*at, **changes)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [done.stderr.strip()]
        assert done.stderr.startswith(f"error: --address {cluster.url}: the cluster rejects the token")
        assert TOKEN not in done.stderr
    assert (
        f"Ray dashboard: {cluster.url} (available"
        in run("-m", "cxr_dist", "dashboards", "--address", cluster.url).stdout
    )


def test_following_ends_by_ctrl_c_and_with_the_cluster(cluster: Cluster) -> None:
    """A job that was left is found again. The last of this file: the cluster is gone after it."""
    following = start("-c", SLEEP, cluster.url)
    assert following.stdout is not None
    job = following.stdout.readline()
    wait_for("begun", following)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=LIMIT_S)
    assert following.returncode == 130, errors
    again = start("-c", SLEEP, cluster.url)
    assert again.stdout is not None
    assert again.stdout.readline() == job
    wait_for("begun", again)
    cluster.kill()
    _, errors = again.communicate(timeout=LIMIT_S)
    assert f"UserError: --address {cluster.url}: the connection was lost while {job.strip()} was running" in errors
    assert f"ray job logs --follow --address {cluster.url} {job.strip()}" in errors
