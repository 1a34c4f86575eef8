"""`bench device`: its steps in their order, within its limit of time, and what is left of one that was interrupted."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_dist.bench import device, device_steps
from cxr_dist.bench.device import Plan
from cxr_dist.cli.main import main


def plan(dataset: Path, tmp_path: Path) -> Plan:
    return Plan(dataset, tmp_path / "steps", batch_sizes=[8, 4], epochs=1)


def with_recipes(dataset: Path, tmp_path: Path) -> Plan:
    return replace(plan(dataset, tmp_path), source=tmp_path, weights=tmp_path / "weights.h5")


def test_the_most_valuable_step_comes_first_and_each_is_measured_once(tmp_path: Path) -> None:
    steps = with_recipes(tmp_path, tmp_path).steps()
    assert [step.name for step in steps[:2]] == ["describe", "whole_network"]
    assert len({(step.name, step.batch_size, step.overrides) for step in steps}) == len(steps)
    assert {step.name for step in steps} == set(device_steps.STEPS)


def test_no_step_begins_after_the_limit(dataset: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    assert device.measure(plan(dataset, tmp_path), None, time.monotonic(), tmp_path / "out", shown.append) == []
    assert shown[-1].startswith("time is up before: device")


def test_a_step_that_fails_says_why_and_the_next_is_measured(tmp_path: Path) -> None:
    shown: list[str] = []
    missing = tmp_path / "no-dataset"
    rows = device.measure(
        plan(missing, tmp_path), ["head", "describe"], time.monotonic() + 3600, tmp_path / "out", shown.append
    )
    assert [row["step"] for row in rows] == ["device", "features, then head", "features, then head, XLA"]
    assert rows[0]["device"]
    assert str(missing) in rows[1]["failed"]
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "fast"], "--only fast: is no step; steps are describe, whole_network"),
        (["--only", "published"], "--only published: needs X-rays and weights"),
        (["--set", "no.key=1"], "no"),
        (["--xrays", "."], "--xrays: whole recipes need both"),
        (["--xrays", "none", "--weights", "none"], "--xrays none: there is no such file or folder"),
        (["--out", "none/out.jsonl"], "there is no such file or folder"),
        (["none"], "none: "),
    ],
)
def test_what_every_step_would_refuse_is_said_before_the_first(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "device", *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_benchmark_keeps_what_it_had(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "cxr_dist", "bench", "device", str(dataset), "--out", str(out)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        give_up = time.monotonic() + 600
        while not out.exists() or not out.read_text().endswith("\n"):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["step"] == "device"
    assert len(rows) < len(plan(dataset, tmp_path).steps())


def test_the_share_of_the_peak() -> None:
    """At 989e12 operations per second, 8.2e9 of them forward, and two more times for the gradient."""
    assert device.share_of_peak(3400.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.08457, rel=1e-3)
    assert device.share_of_peak(3400.0, "AMD EPYC") is None


@pytest.mark.nightly
def test_to_its_end_on_a_cpu(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--batch-sizes", "8", "4", "--rounds", "1", "--minutes", "60", "--out", str(out)]
    main(["bench", "device", str(dataset), *options])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(plan(dataset, tmp_path).steps())
    assert not [row for row in rows if "failed" in row]
    (two,) = (row for row in rows if "largest_difference" in row)
    assert two["largest_difference"] < 1e-4
