"""Jobs of a real cluster of this machine, which asks for a token: sent, followed, stopped, and gone on with."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
TOKEN = secrets.token_hex(32)
SERVE = """
import sys
from cxr_dist.launch.submit import own_cluster

with own_cluster() as url:
    print(url, flush=True)
    sys.stdin.read()
"""
CHAIN = """
import json, sys
from cxr_dist.launch.job_client import Jobs
from cxr_dist.launch.job_plan import Step
from cxr_dist.launch.submit import Request, prepare, run_pipeline
from pathlib import Path

url, environment, name, steps = sys.argv[1:]
request, steps = Request(url, "1", runtime_env=Path(environment)), [Step(*step) for step in json.loads(steps)]
say = lambda line: print("SAID", line, flush=True)
sys.exit(run_pipeline(Jobs(url), prepare(request, steps), "1", steps, name, sys.stdout.write, say))
"""
SLEEP = """
import sys
from cxr_dist.launch.job_client import Jobs

Jobs(sys.argv[1]).submit("echo begun; sleep 600", sys.argv[2], {}, {})
"""
DETAILS = """
import sys
from cxr_dist.launch.job_client import Jobs

jobs = Jobs(sys.argv[1])
print([jobs.details(row.submission_id).model_dump_json() for row in jobs.rows()])
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | changes


def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    line = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(**changes))


def run(*arguments: object, timeout_s: float = 120, **changes: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **changes)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def mended_by_the_user(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


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
        assert self.url.startswith("http://127.0.0.1:"), self.process.communicate(timeout=30)

    def cxr_dist(self, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        return run("-m", "cxr_dist", *arguments, "--address", self.url, **changes)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    yield running
    if running.process.poll() is None:
        try:
            running.process.communicate("", timeout=60)
        finally:
            running.kill()


@pytest.fixture(scope="module")
def user_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variables that the driver sets for its workers too: Ray merges both, or refuses."""
    path = tmp_path_factory.mktemp("environment") / "runtime_env.yaml"
    path.write_text('env_vars: {TF_ENABLE_ONEDNN_OPTS: "0", GRPC_VERBOSITY: ERROR}\n')
    return path


@pytest.mark.nightly
def test_a_pipeline_on_phantoms(phantom_source: Path, tmp_path: Path) -> None:
    """Build, tune and evaluate on a cluster of the command's own, from the command line.

    The first of this file: the cluster of the others leaves no room for one.
    """
    experiment, space = tmp_path / "experiment", tmp_path / "space.yaml"
    space.write_text(SPACE)
    done = run(
        *("-m", "cxr_dist", "submit", "pipeline", phantom_source, tmp_path / "dataset", "--out", experiment),
        *("--image-size", 32, "--config", space, "--address", "local"),
        timeout_s=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((experiment / "evaluation" / "metrics.json").read_text())
    best = json.loads((experiment / "best.json").read_text())
    assert metrics["n"] == 12
    assert best["trial"] in (0, 1)


def test_the_jobs_exit_status_is_the_commands(cluster: Cluster) -> None:
    arguments = ("evaluate", "/no such run", "--out", "/nowhere", "--submission-id", "bad")
    done = cluster.cxr_dist("submit", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[-1] == "error: /no such run: no such folder; give the folder of a run"
    assert done.stderr.splitlines()[-1] == "bad: failed (exit status 2)"
    assert "--submission-id bad: is taken" in mended_by_the_user(cluster.cxr_dist("submit", *arguments))
    assert cluster.cxr_dist("jobs", "logs", "bad").stdout == done.stdout


@pytest.mark.nightly
def test_a_chain_goes_on_after_the_step_that_failed(
    cluster: Cluster, user_environment: Path, phantom_source: Path, tmp_path: Path
) -> None:
    """The first step joins the job's cluster and has its tasks run there, under variables that both sides name."""
    build = ["--launcher", "ray", "--address", "auto", "--image-size", "32", str(phantom_source), str(tmp_path / "d")]
    steps = [("build", build), ("verify", [str(tmp_path / "e")])]

    def chain(*steps: tuple[str, list[str]]) -> subprocess.CompletedProcess[str]:
        return run("-c", CHAIN, cluster.url, user_environment, "chain", json.dumps(steps))

    first = chain(*steps)
    assert first.returncode == 2, first.stdout + first.stderr
    assert "12 shards" in first.stdout
    (tmp_path / "d").rename(tmp_path / "e")
    second = chain(*steps)
    assert second.returncode == 0, second.stdout + second.stderr
    said = [line.removeprefix("SAID ") for line in second.stdout.splitlines() if line.startswith("SAID ")]
    assert said == ["chain-build: has succeeded already", "chain-verify-2: verify sent"]
    assert not (tmp_path / "d").exists(), "built once"
    other = chain(("build", [*build, "--seed=1"]))
    assert "UserError: --submission-id chain: chain-build ran other arguments" in other.stderr


def test_a_token_is_asked_for_and_stays_secret(cluster: Cluster) -> None:
    wrong = mended_by_the_user(cluster.cxr_dist("jobs", "list", RAY_AUTH_TOKEN="f" * 64))
    assert f"--address {cluster.url}: the cluster has another token (403)" in wrong
    missing = mended_by_the_user(cluster.cxr_dist("jobs", "list", RAY_AUTH_MODE="disabled"))
    assert "asks for a token (401)" in missing
    details = run("-c", DETAILS, cluster.url)
    assert '"submission_id":"bad"' in details.stdout, details.stderr
    assert TOKEN not in details.stdout
    assert TOKEN not in wrong + missing


def test_jobs_are_listed_left_and_stopped(cluster: Cluster) -> None:
    assert run("-c", SLEEP, cluster.url, "sleeper").returncode == 0
    following = start("-m", "cxr_dist", "jobs", "attach", "sleeper", "--address", cluster.url)
    wait_for("begun", following)
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=60)
    assert following.returncode == 130
    assert f"the job still runs at {cluster.url}" in said
    assert f"cxr-dist jobs stop sleeper --address {cluster.url}" in said
    listed = cluster.cxr_dist("jobs", "list").stdout.splitlines()
    assert listed[0].split()[:2] == ["id", "status"]
    assert listed[-1].split()[:2] == ["sleeper", "RUNNING"]
    assert cluster.cxr_dist("jobs", "stop", "sleeper").stdout == "sleeper: has ended (STOPPED)\n"
    ended = cluster.cxr_dist("jobs", "attach", "sleeper")
    assert (ended.returncode, ended.stderr) == (1, "sleeper: was stopped\n")
    assert "knows no such job" in mended_by_the_user(cluster.cxr_dist("jobs", "stop", "other"))
    assert f"Ray dashboard: {cluster.url} (answers" in cluster.cxr_dist("dashboards").stdout


def test_a_cluster_that_dies_ends_the_following(cluster: Cluster) -> None:
    """The last of this file: the cluster is gone after it."""
    assert run("-c", SLEEP, cluster.url, "lost").returncode == 0
    following = start("-m", "cxr_dist", "jobs", "attach", "lost", "--address", cluster.url)
    wait_for("begun", following)
    cluster.kill()
    _, said = following.communicate(timeout=90)
    assert following.returncode == 2
    assert said.startswith(f"error: --address {cluster.url}: the cluster was lost while lost ran")
    assert len(said.splitlines()) == 1


SPACE = """
base: smoke
search: {trials: 2, sampler: random, scheduler: off, parameters: {model.dropout: {low: 0.0, high: 0.5}}}
stages: {1: {epochs: 1}, 2: {epochs: 0}}
"""


def test_a_second_cluster_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # the cluster of these tests has it
            taken.bind(("127.0.0.1", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
            taken.listen()
        done = run("-m", "cxr_dist", "submit", "evaluate", tmp_path, "--out", tmp_path / "out", "--address", "local")
    assert f"port {DEFAULT_DASHBOARD_AGENT_LISTEN_PORT} is taken" in mended_by_the_user(done)
