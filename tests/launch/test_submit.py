"""Jobs of a cluster without a cluster: what is sent, what answers mean, and a small server that answers as Ray does."""

import argparse
import itertools
import json
import shlex
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.cli import job_options, main
from cxr_dist.launch import job_client
from cxr_dist.launch.dashboards import dashboard_lines
from cxr_dist.launch.job_client import Jobs, UnreachableError
from cxr_dist.launch.job_environment import job_environment, packed_files, project_root
from cxr_dist.launch.job_plan import (
    Row,
    check_no_secret,
    check_size,
    check_submission_id,
    dashboard_address,
    decide,
    entrypoint,
    exit_status,
    job_table,
    made_up_id,
    pipeline_steps,
)
from cxr_dist.launch.submit import Request, prepare
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
    "--long",
    "*",
    "\\",
    "é☃",
    "#",
]
"""Names of files that a shell, or a parser of options, could take for something else."""


@pytest.fixture(autouse=True)
def no_cluster_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    # The token of all tests stays: Ray read it when it was imported, maybe by an earlier test of this process.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


# What is sent


@pytest.mark.parametrize("text", HOSTILE)
def test_a_shell_gives_the_command_what_was_given(text: str) -> None:
    line = entrypoint("train", ["--out", text, text])
    assert shlex.split(line) == ["python", "-m", "cxr_dist", "train", "--out", text, text]


class Sent(Exception):  # noqa: N818 - not an error
    """What a command line would have submitted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Parses a command line up to where it would be sent."""

    def stop(options: argparse.Namespace) -> None:
        raise Sent(options)

    monkeypatch.setattr(job_options.job_commands, "submit", stop)
    monkeypatch.setattr(job_options.job_commands, "pipeline", stop)

    def parse(*words: str) -> argparse.Namespace:
        options = main.build_parser().parse_args(["submit", *words])
        with pytest.raises(Sent) as caught:
            options.action(options)
        return caught.value.options

    return parse


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "form", ["{name} --out={text} --set=k={text}", "--out={text} --set=k={text} --verbose -- {name}"]
)
def test_a_job_runs_what_the_command_would_have_parsed(
    sent: Callable[..., argparse.Namespace], text: str, form: str
) -> None:
    name = text if form.endswith("{name}") or not text.startswith("-") else "./" + text
    words = [word.format(name=name, text=text) for word in form.split(" ")]
    step = (
        sent("train", *words, "--address", "http://h:1").step
        if "--" not in words
        else sent("train", "--address", "http://h:1", *words).step
    )
    parser = main.build_parser()
    expected = vars(parser.parse_args(["train", *words])) | {"address": "auto"}
    assert shlex.split(step.entrypoint)[:4] == ["python", "-m", "cxr_dist", "train"]
    assert vars(parser.parse_args(shlex.split(step.entrypoint)[3:])) == expected


def test_options_stand_anywhere_and_repeat(sent: Callable[..., argparse.Namespace]) -> None:
    words = ["--set", "a=1", "--detach", "/d", "--set", "b=2", "--timeout", "3", "--out", "/r", "--workers", "2"]
    options = sent("train", *words)
    told = ["--address", "auto", "--set", "a=1", "--set", "b=2", "--out", "/r", "--workers", "2", "/d"]
    assert (list(options.step.arguments), options.detach, options.timeout) == (told, True, 3.0)
    assert sent("evaluate", "/run", "--out", "/e").step.arguments == ["--out", "/e", "/run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "/d", "--out", "/r", "--wrkers", "3"], "unrecognized arguments: --wrkers 3"),
        (["train", "/d", "--out", "/r", "--workers", "0"], "argument --workers: 0: must be a whole number"),
        (["train", "/d"], "the following arguments are required: --out"),
        (["train", "/d", "--out", "/r", "--launcher", "local"], "unrecognized arguments: --launcher local"),
        (["evaluate", "/r", "--out", "/e", "--split", "train", "--images", "/i"], "not allowed with argument"),
        (["evaluate", "/r", "--out", "/e", "--split", "all"], "invalid choice: 'all'"),
        (["train", "/d", "--out", "/r", "--timeout", "0"], "must be a number of seconds above 0"),
        (["pipeline", "/s", "/d", "--out", "/e", "--image-size", "big"], "argument --image-size: invalid int value"),
        (["pipeline", "/s", "/d", "--out", "/e", "--no-evaluation"], "unrecognized arguments: --no-evaluation"),
        (["train", "/d", "--out", "/r"], "--address: give the cluster's dashboard, http://HOST:8265"),
        (["train", "/d", "--out", "/r", "--address", "local", "--detach"], "--detach: the cluster of --address local"),
        (["pipeline", "/s", "/d", "--out", "/e", "--address", "local", "--detach"], "--detach: a pipeline needs"),
        (
            ["train", "/d", "--out", "/r", "--address", "local", "--working-dir", "/none"],
            "--working-dir /none: no such",
        ),
    ],
)
def test_mistakes_end_before_anything_is_sent(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cxr_dist.launch.submit.ask_for_tokens", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main.main(["submit", *words])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


# A pipeline


@pytest.mark.parametrize("text", HOSTILE)
def test_a_pipeline_builds_tunes_and_evaluates(sent: Callable[..., argparse.Namespace], text: str) -> None:
    words = [f"--out=/e/{text}", "--image-size", "64", f"--set=k={text}", "--config=c.yaml", "--", text, f"/d/{text}"]
    build, tune, evaluate = sent("pipeline", *words).steps
    parser = main.build_parser()
    built, tuned, evaluated = (parser.parse_args([step.command, *step.arguments]) for step in (build, tune, evaluate))
    assert (built.source, built.dataset, built.image_size) == (Path(text), Path(f"/d/{text}"), 64)
    assert built.launcher == "local"
    assert (str(tuned.dataset), tuned.out, tuned.overrides) == (f"/d/{text}", Path(f"/e/{text}"), [f"k={text}"])
    assert (tuned.address, tuned.evaluation, tuned.config) == ("auto", False, Path("c.yaml"))
    assert (evaluated.run, evaluated.out) == (Path(f"/e/{text}"), Path(f"/e/{text}/evaluation"))


def test_a_pipeline_leaves_the_image_size_to_build() -> None:
    assert "--image-size" not in pipeline_steps("s", "d", "e/")[0].entrypoint
    assert "--out=e/evaluation" in pipeline_steps("s", "d", "e/")[2].arguments


STATES = ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")


def test_the_last_attempt_decides_what_a_step_needs() -> None:
    """Every history of up to three attempts, with other jobs about."""
    others = {"p-tune": "RUNNING", "p-build-x": "RUNNING", "xp-build": "RUNNING", "p-build-1": "RUNNING", "q": "FAILED"}
    for count in range(4):
        for history in itertools.product(STATES, repeat=count):
            names = ["p-build", "p-build-2", "p-build-3"][:count]
            found = decide("p-build", others | dict(zip(names, history, strict=True)))
            if not count:
                assert (found.action, found.submission_id) == ("submit", "p-build")
            elif history[-1] in ("FAILED", "STOPPED"):
                assert (found.action, found.submission_id) == ("submit", f"p-build-{count + 1}")
            else:
                action = "skip" if history[-1] == "SUCCEEDED" else "attach"
                assert (found.action, found.submission_id) == (action, names[-1])


def test_attempts_that_were_deleted_are_not_used_again() -> None:
    assert decide("p-build", {"p-build-12": "FAILED"}).submission_id == "p-build-13"


# Answers


def test_exit_statuses() -> None:
    codes = {("SUCCEEDED", 0): 0, ("FAILED", 2): 2, ("FAILED", 1): 1, ("FAILED", 137): 1, ("FAILED", None): 1}
    codes |= {("STOPPED", None): 1, ("STOPPED", 2): 1, ("FAILED", 143): 143, ("FAILED", 130): 1}
    assert {key: exit_status(*key) for key in codes} == codes


def test_addresses() -> None:
    assert dashboard_address("http://h:8265/", {}) == "http://h:8265"
    assert dashboard_address("https://[::1]/ray", {}) == "https://[::1]/ray"
    assert dashboard_address("local", {"RAY_ADDRESS": "http://h"}) == "local"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://h"}) == "http://h"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://h", "RAY_API_SERVER_ADDRESS": "http://i"}) == "http://i"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://h", "RAY_API_SERVER_ADDRESS": "i:1"}) == "http://h"
    for bad in ("ray://h:10001", "h:6379", "auto", "", "http://", "http://h:port", "ftp://h", "http://me:pw@h:1"):
        with pytest.raises(UserError, match=r"^--address"):
            dashboard_address(bad, {})
    with pytest.raises(UserError, match=r"\$RAY_API_SERVER_ADDRESS"):
        dashboard_address(None, {"RAY_ADDRESS": "h:6379"})


def test_ids() -> None:
    assert check_submission_id(made_up_id("train", 0)) == "train-19700101-000000"
    for bad in ("", "-x", "a/b", "../a", "a b", "a\n", "é", "a" * 129):
        with pytest.raises(UserError, match=r"^--submission-id"):
            check_submission_id(bad)


def test_a_table_of_jobs_is_in_order_and_as_wide_as_the_terminal() -> None:
    rows = [
        Row("b", "RUNNING", 100.0, None, entrypoint("train", ["/d" * 60])),
        Row("a", "SUCCEEDED", 50.0, 3711.0, "python -m cxr_dist config"),
        Row("waiting", "PENDING", None, None, "x"),
    ]
    lines = job_table(rows, now=165.0, width=80)
    assert [line.split()[0] for line in lines] == ["id", "a", "b", "waiting"]
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["a", "SUCCEEDED", "1970-01-01", "00:00:50", "1:01:01", "cxr_dist", "config"]
    assert "0:01:05" in lines[2]
    assert lines[2].endswith("...")


# The environment


def test_size_names_the_largest() -> None:
    files = [("cxr/a.py", 10), ("data/x", 3_000_000), ("data/y/z", 4_000_000), ("big.bin", 5_000_000), ("runs/r", 1)]
    assert check_size("/p", files, 12_000_011) == 12_000_011
    with pytest.raises(UserError, match=r"^--working-dir /p: 12 MB.*data/ 7 MB, big.bin 5 MB, cxr/ 0 MB\)$"):
        check_size("/p", files, 12_000_010)


def test_what_is_measured_is_what_ray_packs(tmp_path: Path) -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    texts = {
        "a.py": "1", "data/x.csv": "2", "sub/keep.txt": "3", "sub/drop.log": "4", "sub/.gitignore": "*.log",
        ".git/config": "5", ".rayignore": "/data/\n*.npz", "w.npz": "6", "out/y": "7", "skipped/z": "8",
    }  # fmt: skip
    for name, text in texts.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    excludes = [*ray_constants.get_runtime_env_default_excludes(), "/skipped/"]
    create_package(str(project), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        packed = {info.filename: info.file_size for info in package.infolist()}
    assert dict(packed_files(project, ["/skipped/"])) == packed
    assert set(packed) == {"a.py", "sub/keep.txt", "sub/.gitignore", ".rayignore", "out/y"}


def test_a_checkout_goes_to_the_cluster_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = project_root()
    assert root is not None
    assert job_environment(None, None) == {"working_dir": str(root)}
    names = {name for name, _ in packed_files(root)}
    assert {"cxr_dist/cli.py", "pyproject.toml", "tune_configs/cpu.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests/", ".git/")) or name.endswith((".pyc", ".keras"))]
    monkeypatch.setattr("cxr_dist.__file__", str(tmp_path / "site-packages" / "cxr_dist" / "__init__.py"))
    assert job_environment(None, None) == {}, "an installed package is the cluster's affair"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_users_environment_is_merged(tmp_path: Path) -> None:
    extra = write(tmp_path / "e.yaml", "pip: [einops]\nenv_vars: {A: '1'}\nworking_dir: s3://b/code.zip\n")
    assert job_environment(None, extra) == {"pip": ["einops"], "env_vars": {"A": "1"}, "working_dir": "s3://b/code.zip"}
    (tmp_path / "code").mkdir()
    assert job_environment(tmp_path / "code", extra)["working_dir"] == str(tmp_path / "code")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must map keys"),
        ("a: [", "is not YAML"),
        ("workingdir: .", "workingdir: Ray knows .*working_dir"),
        ("env_vars: {A: 1}", "env_vars: must map names to texts"),
        ("working_dir: [1]", "working_dir: must be"),
    ],
)
def test_a_damaged_environment_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^--runtime-env .*{said}"):
        job_environment(None, write(tmp_path / "e.yaml", text))


def test_secrets_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_api_key", "HF_TOKEN"):
        with pytest.raises(UserError, match=f"env_vars.{name}:"):
            check_no_secret({name: "x"}, [], None)
    harmless = ("TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "AWS_REGION", "GOOGLE_APPLICATION_CREDENTIALS", "KEYS")
    check_no_secret(dict.fromkeys(harmless, "x"), ["no token here"], TOKEN)
    for variables, texts in (({"A": f"x{TOKEN}"}, []), ({}, [f"python {TOKEN}"])):
        with pytest.raises(UserError, match="the cluster's token") as caught:
            check_no_secret(variables, texts, TOKEN)
        assert TOKEN not in str(caught.value)
    code = tmp_path / "code"
    code.mkdir()
    write(code / "auth_token", TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(code / "auth_token"))
    request = Request("http://h:1", "1", working_dir=code)
    with pytest.raises(UserError, match="auth_token holds the cluster's token") as caught:
        prepare(request, [])
    assert TOKEN not in str(caught.value)
    write(code / ".rayignore", "auth_token")
    prepare(request, pipeline_steps("s", "d", "e"))
    with pytest.raises(UserError, match="the cluster's token"):
        prepare(request, pipeline_steps("s", TOKEN, "e"))


# A server that answers


class Server:
    """Answers requests of given paths with (status, text); anything else with 404."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {"/api/version": (200, json.dumps({"ray_version": "2.60.0"}))}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                status, text = server.answers.get(self.path, (404, "Job does not exist"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def job(status: str, **more: Any) -> tuple[int, str]:
    return 200, json.dumps({"type": "SUBMISSION", "submission_id": "j", "status": status, "entrypoint": "x", **more})


def test_the_address_that_was_given_wins_over_rays_variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert Jobs(server.address).get("/api/version") == {"ray_version": "2.60.0"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "no"), "is no Ray dashboard"),
        ((200, "<html>"), "is no Ray dashboard"),
        ((200, "{}"), "is no Ray dashboard"),
        ((200, "[1]"), "is no Ray dashboard"),
        ((418, "tea"), r"is no Ray dashboard \(418\)"),
        ((503, "later"), "the dashboard fails"),
        ((401, "Unauthorized"), r"asks for a token \(401\); set RAY_AUTH_MODE"),
        ((403, "Forbidden"), r"has another token \(403\)"),
    ],
)
def test_what_is_no_dashboard_is_one_line(server: Server, answer: tuple[int, str], said: str) -> None:
    server.answers["/api/version"] = answer
    with pytest.raises(UserError, match=rf"^--address {server.address}: .*{said}[^\n]*$"):
        Jobs(server.address)
    assert "not usable" in dashboard_lines(server.address, None, {})[0]


def test_a_server_that_never_answers_is_left_after_the_limit() -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UnreachableError, match="no dashboard answers there in time"):
            Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)


def test_unknown_and_taken_ids(server: Server) -> None:
    jobs = Jobs(server.address)
    with pytest.raises(UserError, match=r"^nope: .* knows no such job"):
        jobs.details("nope")
    server.answers["/api/jobs/"] = (200, f"[{job('FAILED')[1]}]")
    with pytest.raises(UserError, match=r"^--submission-id j: is taken"):
        jobs.submit("x", "j", {}, {})
    # Another client may have taken it in the meantime: the cluster says so in a traceback.
    server.answers["/api/jobs/"] = (200, "[]")

    def taken(**_: Any) -> None:
        raise RuntimeError("Request failed with status code 400: ...Job with submission_id j already exists. ...")

    jobs._client.submit_job = taken
    with pytest.raises(UserError, match=r"^--submission-id j: is taken"):
        jobs.submit("x", "j", {}, {})


def test_a_job_that_does_not_stop_is_said(server: Server) -> None:
    server.answers |= {"/api/jobs/j": job("RUNNING"), "/api/jobs/j/stop": (200, '{"stopped": true}')}
    with pytest.raises(UserError, match=r"^j: has not stopped within"):
        Jobs(server.address).stop("j", limit_s=0.6)
    server.answers["/api/jobs/j"] = job("SUCCEEDED")
    assert Jobs(server.address).stop("j") is None


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_client, "PAUSE_S", 0.01)
    monkeypatch.setattr(job_client, "SILENCE_S", 0.05)


def script_tails(jobs: Jobs, *tails: list[str | BaseException], then: Callable[[], None] = lambda: None) -> None:
    """Let each connection to the log give the next of `tails`; `then` is called when the last one begins."""
    left = list(tails)

    async def tail(_: str) -> Any:
        parts = left.pop(0) if left else []
        if not left:
            then()
        for part in parts:
            if isinstance(part, BaseException):
                raise part
            yield part

    jobs._client.tail_job_logs = tail


@pytest.mark.usefixtures("short_pauses")
def test_a_log_is_shown_once_through_cuts_of_any_kind(server: Server) -> None:
    server.answers["/api/jobs/j"] = job("RUNNING")
    jobs, shown = Jobs(server.address), []
    script_tails(
        jobs,
        ["one\n", "tw", RuntimeError("WebSocket connection closed unexpectedly")],
        ["on", "e\ntwo\nth"],
        [OSError("cut")],
        ["one\ntwo\nthree\n"],
        then=lambda: server.answers.update({"/api/jobs/j": job("FAILED", driver_exit_code=2)}),
    )
    details = jobs.follow("j", shown.append)
    assert "".join(shown) == "one\ntwo\nthree\n"
    assert (details.status.value, details.driver_exit_code) == ("FAILED", 2)


@pytest.mark.usefixtures("short_pauses")
def test_a_cluster_that_is_gone_is_given_up_after_a_few_reconnections(server: Server) -> None:
    server.answers["/api/jobs/j"] = job("RUNNING")
    jobs, shown = Jobs(server.address), []
    cut = ["one\n", OSError("cut")]
    script_tails(jobs, cut, then=lambda: server.answers.update({"/api/jobs/j": (503, "gone")}))
    server.asked.clear()
    with pytest.raises(UserError, match=r"the cluster was lost while j ran, .*cxr-dist jobs attach j$"):
        jobs.follow("j", shown.append)
    assert shown == ["one\n"]
    assert len(server.asked) == 1 + job_client.RECONNECTIONS


@pytest.mark.usefixtures("short_pauses")
def test_a_connection_that_says_nothing_does_not_hold_for_ever(server: Server) -> None:
    import asyncio

    server.answers["/api/jobs/j"] = job("RUNNING")
    jobs = Jobs(server.address)

    async def tail(_: str) -> Any:
        yield "one\n"
        server.answers["/api/jobs/j"] = job("STOPPED")
        await asyncio.sleep(3600)

    jobs._client.tail_job_logs = tail
    assert jobs.follow("j", lambda _: None).status.value == "STOPPED"


def test_dashboards(server: Server, tmp_path: Path) -> None:
    server.answers["/api/prometheus/sd"] = (200, '[{"labels": {}, "targets": ["10.0.0.1:8080", "10.0.0.2:8080"]}]')
    lines = dashboard_lines(server.address, tmp_path / "my run", {"RAY_GRAFANA_HOST": "http://g:3000"})
    text = "\n".join(lines)
    assert f"Ray dashboard: {server.address} (answers, Ray 2.60.0)" in lines
    assert "Ray metrics of a process: http://10.0.0.2:8080/metrics" in lines
    assert "Grafana: http://g:3000" in lines
    assert "Prometheus: not configured" in text
    assert lines[-1] == f"TensorBoard: tensorboard --logdir '{tmp_path / 'my run'}'"
    (tmp_path / "my run" / "tensorboard").mkdir(parents=True)
    assert dashboard_lines(server.address, tmp_path / "my run", {})[-1].endswith("my run/tensorboard'")
