"""Jobs and pipelines without a cluster: what would be sent, and a small server that answers as Ray's dashboard does."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from cxr_dist.cli import jobs as cli_jobs, main
from cxr_dist.launch import submit
from cxr_dist.launch.dashboards import dashboard_lines
from tfrecords_builder.common.errors import UserError

TOKEN = "0123456789abcdef0123456789abcdef"
HOSTILE = [
    "plain",
    "with space",
    "quote'",
    'double"',
    "$HOME",
    "`id`",
    "a;b",
    "new\nline",
    "-dash",
    "*",
    "\\",
    "é☃",
    "#",
]
"""Names of files that a shell, or a parser of options, could take for something else."""


@pytest.fixture(autouse=True)
def no_cluster_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in submit.ADDRESS_VARIABLES:
        monkeypatch.setenv(name, "")  # also undoes what `Jobs` sets
        monkeypatch.delenv(name)


class Sent(Exception):  # noqa: N818 - not an error
    """The commands that would have become jobs."""


@pytest.fixture
def stopped_before_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_options: object, _address: str, commands: list[list[str]]) -> None:
        raise Sent(commands)

    monkeypatch.setattr(cli_jobs, "_run_jobs", stop)


def commands_sent(*words: str) -> list[list[str]]:
    with pytest.raises(Sent) as caught:
        main.main(words)
    commands: list[list[str]] = caught.value.args[0]
    return commands


@pytest.mark.usefixtures("stopped_before_sending")
@pytest.mark.parametrize("text", HOSTILE)
def test_a_job_runs_the_command_as_it_was_given(text: str) -> None:
    command = ["train", f"--out={text}", f"--set=k={text}", "--", text]
    for program in ([], ["cxr-dist"]):
        assert commands_sent("submit", "--address", "http://h:1", "--", *program, *command) == [command]
    assert shlex.split(submit.entrypoint(command)) == ["python", "-m", "cxr_dist", *command]


@pytest.mark.usefixtures("stopped_before_sending")
@pytest.mark.parametrize("text", HOSTILE)
def test_a_pipeline_builds_tunes_and_evaluates(text: str) -> None:
    words = [f"--out=/e/{text}", "--image-size", "64", f"--set=k={text}", "--config=c.yaml", "--launcher", "local"]
    sent = commands_sent("pipeline", "--address", "http://h:1", *words, "--", f"/s/{text}", f"/d/{text}")
    build, tune, evaluate = (main.build_parser().parse_args(command) for command in sent)
    assert (str(build.source), str(build.dataset), build.image_size) == (f"/s/{text}", f"/d/{text}", 64)
    assert (str(tune.dataset), tune.out, tune.overrides) == (f"/d/{text}", Path(f"/e/{text}"), [f"k={text}"])
    assert (tune.config, tune.launcher, tune.evaluation) == (Path("c.yaml"), "local", False)
    assert (evaluate.run, evaluate.out) == (Path(f"/e/{text}"), Path(f"/e/{text}/evaluation"))


AT = ["--address", "http://h:1"]


@pytest.mark.usefixtures("stopped_before_sending")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", *AT], "COMMAND: give the command of the job after --"),
        (["submit", *AT, "--"], "COMMAND: give the command of the job after --"),
        (["submit", *AT, "--", "trian", "/d"], "invalid choice: 'trian'"),
        (["submit", *AT, "--", "train", "/d", "--out", "/r", "--wrkers", "3"], "unrecognized arguments: --wrkers 3"),
        (["submit", *AT, "--", "train", "/d"], "the following arguments are required: --out"),
        (["submit", "--", "verify", "/d"], "--address: give http://HOST:8265 of the cluster's dashboard, or local"),
        (
            ["submit", "--address", "h:6379", "--", "verify", "/d"],
            "--address h:6379: is not the address of a dashboard",
        ),
        (["pipeline", "/s", "/d", "--out", "/e", "--image-size", "big"], "--image-size: big: must be"),
        (
            ["pipeline", "/s", "d", "--out", "/e", *AT],
            "d: is relative, and a job runs in another folder; give an absolute path",
        ),
        (["pipeline", "/s", "/d", "--out", "/e", "--working-dir", "."], "--working-dir, --runtime-env: need --address"),
        (["dashboards", "--address", "local"], "--address local: applies to submit only"),
    ],
)
def test_mistakes_end_before_anything_is_sent(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(words)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_local_pipeline_stops_at_the_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(command: list[str]) -> int:
        ran.append(command[0])
        return {"build": 0, "tune": 2}[command[0]]

    monkeypatch.setattr(cli_jobs, "run_apart", run)
    with pytest.raises(SystemExit) as caught:
        main.main(["pipeline", "s", "d", "--out", "e"])
    assert (caught.value.code, ran) == (2, ["build", "tune"])
    assert capsys.readouterr().err == "tune failed with exit status 2; start the same command again to resume\n"


def test_exit_statuses() -> None:
    codes = {("SUCCEEDED", 0): 0, ("FAILED", 2): 2, ("FAILED", 1): 1, ("FAILED", 137): 1, ("FAILED", None): 1}
    codes |= {("STOPPED", None): 1, ("STOPPED", 2): 1, ("FAILED", 143): 143, ("FAILED", 130): 1}
    for (status, code), expected in codes.items():
        details = JobDetails(
            type=JobType.SUBMISSION,
            status=JobStatus(status),
            entrypoint="x",
            driver_exit_code=code,
            driver_node_id=None,
        )
        assert submit.exit_status(details) == expected


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit.dashboard_address("http://h:8265/") == "http://h:8265"
    assert submit.dashboard_address("https://[::1]/ray") == "https://[::1]/ray"
    for bad in ("ray://h:10001", "h:6379", "auto", "http://", "http://h:port", "ftp://h", "http://me:pw@h:1"):
        with pytest.raises(UserError, match=r"^--address"):
            submit.dashboard_address(bad)
    monkeypatch.setenv("RAY_ADDRESS", "http://h")
    assert submit.dashboard_address("local") == "local"
    assert submit.dashboard_address(None) == "http://h"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://i")
    assert submit.dashboard_address(None) == "http://i"


def test_the_environment_is_the_users(tmp_path: Path) -> None:
    file, code = tmp_path / "e.yaml", tmp_path / "code"
    assert submit.job_environment(None, None) == {}
    file.write_text("pip: [einops]\nenv_vars: {A: '1'}\nworking_dir: s3://b/code.zip\n")
    assert submit.job_environment(None, file)["working_dir"] == "s3://b/code.zip"
    with pytest.raises(UserError, match=f"--working-dir {code}: no such folder"):
        submit.job_environment(str(code), file)
    code.mkdir()
    merged = {"pip": ["einops"], "env_vars": {"A": "1"}, "working_dir": str(code)}
    assert submit.job_environment(str(code), file) == merged
    for text, message in (("[1, 2]", "not a mapping"), ("a: [", "is not YAML")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"^{file}: .*{message}"):
            submit.job_environment(None, file)


class Dashboard(BaseHTTPRequestHandler):
    """Answers what the test says, by path; everything else with 404."""

    answers: dict[str, tuple[int, Any]]
    asked: list[str]

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, {}))
        self.asked.append(self.headers.get("Authorization", ""))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "*")
    version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
    Dashboard.answers, Dashboard.asked = {"/api/version": (200, version)}, []
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b"<html>"), "no Ray dashboard answers there"),
        ((200, b"<html>"), "no Ray dashboard answers there"),
        ((200, []), "no Ray dashboard answers there"),
        ((503, b"down"), "no Ray dashboard answers there"),
        ((401, b"Unauthorized"), "rejects the token"),
        ((403, b"Forbidden"), "rejects the token"),
    ],
)
def test_what_is_no_cluster_of_ours_is_refused(dashboard: str, answer: tuple[int, Any], message: str) -> None:
    Dashboard.answers["/api/version"] = answer
    with pytest.raises(UserError, match=f"^--address {dashboard}: .*{message}") as caught:
        submit.Jobs(dashboard)
    assert "\n" not in str(caught.value)


def test_a_cluster_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^--address http://127\.0\.0\.1:9: no Ray dashboard answers there \(.*refused"
    ):
        submit.Jobs("http://127.0.0.1:9")


def test_refused_jobs_and_environments(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    jobs = submit.Jobs(dashboard)
    Dashboard.answers["/api/jobs/"] = (500, b"Traceback:\nno agent")
    with pytest.raises(UserError, match=r"rejects the job .*no agent"):
        jobs.send("x", {})
    with pytest.raises(UserError, match="--runtime-env"):
        jobs.send("x", {"env_vars": 3})


def test_a_step_that_runs_already_is_found(dashboard: str) -> None:
    jobs = submit.Jobs(dashboard)
    rows = [
        {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": status,
            "entrypoint": entrypoint,
            "driver_node_id": None,
        }
        for name, status, entrypoint in (("a", "FAILED", "x"), ("b", "RUNNING", "y"), ("c", "RUNNING", "x"))
    ]
    Dashboard.answers["/api/jobs/"] = (200, rows)
    assert (jobs.running("x"), jobs.running("y"), jobs.running("z")) == ("c", "b", None)


def test_dashboards(dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://g:3000")
    Dashboard.answers["/api/prometheus/sd"] = (200, [{"targets": ["h:1", "h:2"]}])
    (tmp_path / "tensorboard").mkdir()
    lines = dashboard_lines(dashboard, tmp_path)
    assert lines[0] == f"Ray dashboard: {dashboard} (available, Ray 2.60.0)"
    assert lines[2:5] == [f"Ray metrics of a process: http://h:{n}/metrics" for n in (1, 2)] + [
        "Grafana: http://g:3000"
    ]
    assert lines[-1] == f"TensorBoard: tensorboard --logdir {tmp_path / 'tensorboard'}"
    assert set(Dashboard.asked) == {f"Bearer {TOKEN}"}
    Dashboard.answers.clear()
    assert "not available: HTTP Error 404" in dashboard_lines(dashboard, None)[0]
