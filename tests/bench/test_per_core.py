"""The benchmark of the input by core: what it divides by what, and that every way delivers the same pixels."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from cxr_dist.bench import common, per_core
from cxr_dist.cli.main import main
from cxr_dist.phantoms import write_phantoms
from tfrecords_builder.common.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("per-core") / "phantoms"
    write_phantoms(folder, per_class=12, size=32, workers=1)
    return folder


def test_every_way_is_measured_with_the_same_pixels(source: Path, tmp_path: Path) -> None:
    rates = per_core.measure(source, tmp_path, 32, batch_size=4, processes=(1, 2), rounds=1)
    assert [(rate.encoding, rate.processes, rate.way) for rate in rates] == [
        (encoding, count, way) for encoding in ("raw", "png", "jpeg") for count in (1, 2) for way in per_core.PASSES
    ]
    assert all(rate.images_per_second > 0 and rate.core_seconds_per_image > 0 for rate in rates)
    lines = per_core.table(rates, 32)
    assert len(lines) == 2 + len(rates)
    assert lines[-1].endswith("56,000 images/s: 0.06 GB/s of raw 32 x 32 gray")


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_core, "_started", lambda _: nullcontext([]))


@pytest.mark.usefixtures("no_processes")
def test_other_pixels_are_no_comparison(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = iter(range(100))
    row = {"rate": 1.0, "cost": 1.0}
    monkeypatch.setattr(
        per_core, "_round", lambda *_: [row | {"way": way, "pixels": next(pixels)} for way in per_core.PASSES]
    )
    with pytest.raises(RuntimeError, match="different pixels"):
        per_core.measure(source, tmp_path, 32, batch_size=4, processes=(1,), rounds=1)


def test_the_command_prints_both_tables(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "IMAGE_SIZE", 32)
    monkeypatch.setattr(per_core, "measure", lambda *_: [per_core.Rate("raw", "from memory", 1, 80_000.0, 1e-4)])
    arguments = ["bench", "input", str(source), "--set", "global_batch_size=4", "--rounds", "1", "--json"]
    main([*arguments, "--per-core"])
    printed = json.loads(capsys.readouterr().out)
    assert [rate["name"] for rate in printed["figures"]["rates"]] == ["image_dataset_from_directory", "cxr-dist"]
    assert [row["cores_needed"] for row in printed["figures"]["per_core"]] == [pytest.approx(5.6)]
    assert any("56,000" in line for line in printed["table"])
    main(arguments)
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"]["per_core"] == []
    assert not any("56,000" in line for line in printed["table"])


@pytest.mark.usefixtures("no_processes")
def test_a_split_without_a_batch_for_each_process(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"global_batch_size 30: the training split has 3\d images, and 2 "):
        per_core.measure(source, tmp_path, 32, batch_size=30, processes=(2,), rounds=1)


def test_cores_are_those_of_eight_gpus() -> None:
    rate = per_core.Rate("raw", "from memory", 1, 80_000.0, 1e-4)
    assert (rate.images_per_core_second, rate.cores_needed) == (pytest.approx(10_000), pytest.approx(5.6))
    once = per_core.Rate("raw", "into memory, cold", 1, 80_000.0, 1e-4)
    lines = per_core.table([rate, once], 224)
    assert lines[1].split()[-1] == "5.6"
    assert lines[2].endswith("once a run")
    assert "2.81 GB/s of raw 224 x 224 gray" in lines[-1]
