"""How commands end at a terminal and in a pipe: at Ctrl-C, when nobody reads, and where letters are missing."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest

from cxr_dist.cli import main, terminal
from cxr_dist.runs.interrupt import INTERRUPTED, exit_now, say_interrupted
from tests.interrupting import LIMIT_S, ROOT, duration, interrupted_after, interrupted_at_import

RESUMES = "interrupted; start the same command again to resume"
ENDS = "interrupted"


def command(*arguments: object, **variables: str) -> str:
    """A command for a shell."""
    unset = "env -u PYTHONUNBUFFERED -u PYTHONIOENCODING -u KERAS_BACKEND"
    names = " ".join(f"{name}={value}" for name, value in ({"PYTHONPATH": str(ROOT)} | variables).items())
    return f"{unset} {names} {sys.executable} -m cxr_dist {' '.join(map(str, arguments))}"


def shell(text: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=LIMIT_S,
    )


def shell_unread(text: str) -> subprocess.CompletedProcess[str]:
    """What is printed goes to a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return shell(f'{text}; exit "$?"', stdout=writing)
    finally:
        os.close(writing)


# Pipes


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", ["--help", "config", "verify {dataset}"])
def test_a_closed_pipe_is_no_traceback(arguments: str, variables: dict[str, str], dataset: Path) -> None:
    done = shell_unread(command(arguments.format(dataset=dataset), **variables))
    assert done.stderr == ""
    if arguments == "--help" and variables:
        assert done.returncode in (0, 141), "argparse itself passes over it"
    else:
        assert done.returncode == 141


def test_a_closed_pipe_of_errors_neither(tmp_path: Path) -> None:
    done = shell_unread(command("verify", tmp_path / "none") + " 2>&1")
    assert (done.returncode, done.stderr) == (141, "")


def test_the_first_lines_of_a_command_are_all_that_is_read(dataset: Path) -> None:
    done = shell(command("config", PYTHONUNBUFFERED="1") + " | head -1")
    assert (done.stdout, done.stderr) == ("seed: 0\n", "")


def test_a_broken_pipe_of_another_kind_is_a_defect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as that of a process of ours that has died."""

    def broken(*_arguments: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("tfrecords_builder.verify.verify_dataset", broken)
    with pytest.raises(BrokenPipeError):
        main.main(["verify", str(tmp_path)])


@pytest.mark.parametrize("arguments", ["config", "--help"])
def test_a_disk_that_is_full(arguments: str) -> None:
    done = shell(command(arguments) + " > /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("error: disk: No space left on device; ")
    assert len(done.stderr.splitlines()) == 1


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """Neither an error, nor does a file that is opened next get what is meant for them."""
    assert shell(command("config") + " >&-").returncode == 0
    done = shell(command("verify", tmp_path / "none") + " >&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert shell(command("verify", tmp_path / "none") + " >&- 2>&-").returncode == 2


# Letters


@pytest.mark.parametrize("variables", [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_letters_that_the_locale_lacks(variables: dict[str, str], phantom_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantom_source / "COVID", source / "COVID")
    shutil.copytree(phantom_source / "Normal", source / "Żółty")
    done = shell(command("build", source, tmp_path / "dataset", "--image-size", 16, "--workers", 1, **variables))
    assert (done.returncode, done.stderr) == (0, "")
    assert "COVID " in done.stdout
    assert r"\u017b" in done.stdout
    missing = shell(command("verify", tmp_path / "Żółty", **variables))
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
    assert len(missing.stderr.splitlines()) == 1


def test_progress_bars_without_letters(tmp_path: Path) -> None:
    """In a terminal, where they are drawn; `script` makes one."""
    if shutil.which("script") is None:
        pytest.skip("needs script(1)")
    run = command(
        "synth", tmp_path / "źródło", "--per-class", 4, "--size", 32, "--workers", 1, PYTHONIOENCODING="ascii"
    )
    done = shell(f"script -qefc '{run}' /dev/null")
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert "phantoms" in done.stdout


# Keras


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"])
def test_another_backend_is_refused_before_anything_is_done(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(SystemExit) as caught:
        main.main(["synth", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error == f"error: KERAS_BACKEND {backend}: only TensorFlow is supported; unset it, or set it to tensorflow\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("first", "variables", "expected"),
    [
        ("", {}, ("1", "tensorflow")),
        ("", {"TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "jax"}, ("0", "jax")),
        ("", {"KERAS_BACKEND": ""}, ("1", "tensorflow")),
        ("tensorflow", {}, ("None", "tensorflow")),
        ("keras", {}, ("1", "None")),
    ],
)
def test_what_beginning_to_work_changes(first: str, variables: dict[str, str], expected: tuple[str, str]) -> None:
    """Nothing that is set, nor what would come too late; the modules are stood in for, as they take seconds."""
    code = (
        "import os, sys, types\n"
        f"if {first!r}: sys.modules[{first!r}] = types.ModuleType({first!r})\n"
        "import cxr_dist\n"
        "from cxr_dist.distributed.devices import prepare_environment\n"
        "before = dict(os.environ)\n"
        "try: prepare_environment()\n"
        "except cxr_dist.UserError: pass\n"
        "print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'), os.environ.get('KERAS_BACKEND'))\n"
        "allowed = ('TF_ENABLE_ONEDNN_OPTS', 'KERAS_BACKEND')\n"
        "print({name for name in os.environ | before if os.environ.get(name) != before.get(name)} - set(allowed))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_ENABLE_ONEDNN_OPTS", "KERAS_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert done.stdout.splitlines() == [" ".join(expected), "set()"]


# Ctrl-C


class Swallowing:
    """Code in which an exception is lost: a destructor."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def in_a_destructor() -> None:
    Swallowing()
    time.sleep(20)
    print("the interrupt was lost", file=sys.stderr)


def in_a_destructor_of_a_slow_thread() -> None:
    """The signal is there again before the thread has left the destructor."""
    start, started = threading.Timer.start, list[threading.Timer]()

    def start_and_wait(timer: threading.Timer) -> None:
        start(timer)
        if not started:
            started.append(timer)
            timer.join()

    with mock.patch.object(threading.Timer, "start", start_and_wait):
        in_a_destructor()


def as_another_error() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("initialization failed") from None  # as extension modules in C++ do


def plainly() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("before", [signal.default_int_handler, exit_now])
@pytest.mark.parametrize("interrupted", [plainly, as_another_error, in_a_destructor, in_a_destructor_of_a_slow_thread])
@pytest.mark.parametrize(("arguments", "line"), [(["verify"], ENDS), (["--verbose", "train"], RESUMES)])
def test_an_interrupt_is_one_line(
    before: Callable[..., None],
    interrupted: Callable[[], None],
    arguments: list[str],
    line: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever becomes of the exception."""
    outer, hook = signal.signal(signal.SIGINT, before), sys.unraisablehook
    try:
        with pytest.raises(SystemExit) as caught, terminal.manners(arguments):
            interrupted()
        assert caught.value.code == INTERRUPTED == 130
        assert sys.unraisablehook is hook
        handler = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, outer)
    assert capfd.readouterr().err == line + "\n"
    assert (handler is before) == (before is not exit_now), "the second one at the exit is silent"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_handlers_of_others_stay(handler: Callable[..., None] | signal.Handlers) -> None:
    """Ctrl-C that is ignored, as in the background or under nohup; that of a program that uses the package."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with terminal.manners([]):
            assert signal.getsignal(signal.SIGINT) is handler
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_is_told_to_resume(capfd: pytest.CaptureFixture[str]) -> None:
    resumed = {"build", "demo", "download", "pipeline", "train", "tune"}
    choices: Sequence[str] = next(a.choices for a in main.build_parser()._actions if a.dest == "command") or ()
    assert resumed < set(choices)
    for name in choices:
        say_interrupted(["--verbose", name, "train"])
        assert capfd.readouterr().err == (RESUMES if name in resumed else ENDS) + "\n"


def interrupted_well(status: int, lines: list[str], line: str, known: Sequence[str] = ()) -> bool:
    """Checks one outcome; whether there was an interrupt, as a command may be done before it."""
    rest = [text for text in lines if not text.startswith(tuple(known))] if known else lines
    assert status in (0, INTERRUPTED), lines
    assert rest in ([line], [] if status == 0 or not lines else [line]), lines
    return status == INTERRUPTED


@pytest.mark.parametrize("number", [1, 2, 20, 100, 200])
def test_an_interrupt_while_the_command_line_is_imported(number: int) -> None:
    status, lines = interrupted_at_import(number, "config")
    assert interrupted_well(status, lines, ENDS)


@pytest.mark.parametrize("number", [1200, pytest.param(2500, marks=pytest.mark.nightly)])
def test_an_interrupt_while_tensorflow_is_imported(number: int, finished_run: Path, phantom_source: Path) -> None:
    status, lines = interrupted_at_import(number, "predict", finished_run, phantom_source)
    assert interrupted_well(status, lines, ENDS)


def moments(seed: int, number: int) -> list[float]:
    """Shares of a command's time: one at random in each of so many equal parts."""
    generator = random.Random(seed)
    return [(part + generator.random()) / number for part in range(number)]


@pytest.mark.parametrize("number", [1, pytest.param(15, marks=pytest.mark.nightly)])
def test_an_interrupt_of_a_build_with_processes(number: int, phantom_source: Path, tmp_path: Path) -> None:
    """They are told of it too, wherever they are: while they are started, import, work."""

    def build(name: str) -> list[object]:
        return ["build", phantom_source, tmp_path / name, "--image-size", 16, "--workers", 2]

    def ends_early(name: str, seconds: float) -> bool:
        return interrupted_well(*interrupted_after(seconds, *build(name)), RESUMES)

    whole_s = duration(*build("whole"))
    times = [share * whole_s for share in moments(number, number)]
    ends = [ends_early(f"d{count}", seconds) for count, seconds in enumerate(times)]
    # Where the first build alone was slow, the others may have ended before.
    assert any(ends) or any(ends_early(f"e{count}", times[0] / 4**count) for count in range(1, 10))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["local", "ray"])
@pytest.mark.parametrize("name", ["train", "tune"])
def test_an_interrupt_at_any_moment_of_training(name: str, launcher: str, dataset: Path, tmp_path: Path) -> None:
    settings = {
        "train": ["--config", "smoke", "--set", "global_batch_size=8"],
        "tune": ["--config", "search_cpu", "--set", "search.trials=2", "--no-evaluation"],
    }
    settings["tune"] += [
        text for key in ("model.weights=none", "stages.1.epochs=1", "stages.2.epochs=1") for text in ("--set", key)
    ]

    def arguments(out: str) -> list[object]:
        return [name, dataset, "--out", tmp_path / out, "--launcher", launcher, *settings[name]]

    known = ("stage ", "trial ", "warning: workers were lost", "resuming with", "from what", str(tmp_path))
    whole_s = duration(*arguments("whole"))
    ends = [
        interrupted_well(*interrupted_after(share * whole_s, *arguments(f"run{count}")), RESUMES, known)
        for count, share in enumerate(moments(len(name), 15))
    ]
    assert sum(ends) >= 10
