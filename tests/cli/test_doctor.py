"""What `doctor` makes of machines that lack something."""

import importlib.metadata
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from cxr_dist.cli import doctor
from cxr_dist.cli.main import main
from cxr_dist.distributed import devices, gpu_support, precision
from cxr_dist.distributed.gpu_support import Build
from cxr_dist.launch.placement import Node
from cxr_dist.runs import versions


def states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["tensorflow"]["message"] == importlib.metadata.version("tensorflow")
    assert not [what for what, row in found.items() if row["state"] == "missing"]
    assert {"cores", "memory", "devices", "auto", "extra onnx"} <= found.keys()


def test_what_is_missing_is_named_with_its_fix_and_ends_in_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1 << 20))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("missing Python") and "use Python 3.11, 3.12 or 3.13" in line for line in lines)
    assert any(line.startswith("note") and "disk here" in line and "may not fit" in line for line in lines)


@pytest.fixture
def two_gpus_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which TensorFlow lists none."""
    seen = Path.glob

    def glob(self: Path, pattern: str) -> object:
        return iter([self / "nvidia0", self / "nvidia1"]) if self == Path("/dev") else seen(self, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    monkeypatch.setattr(gpu_support, "this_build", lambda: BUILD)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


BUILD = Build("12.5.1", "9", ("sm_80", "compute_90"))


def loads_all_but(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr(gpu_support, "not_loading", lambda names, _folders: [name for name in names if name in missing])


@pytest.mark.usefixtures("two_gpus_present")
@pytest.mark.parametrize(
    ("missing", "said", "unsaid"),
    [
        (["libcuda.so.1"], ["libcuda.so.1 cannot be loaded; install NVIDIA's driver"], ".[gpu]"),
        (["libcudnn.so.9", "libcufft.so.11"], ["libcufft.so.11, libcudnn.so.9 cannot be loaded", ".[gpu]"], "driver"),
        (["libcuda.so.1", "libcudart.so.12"], ["libcuda.so.1, libcudart.so.12", "driver", ".[gpu]"], "NCCL"),
        (["libnccl.so.2"], ["libnccl.so.2 cannot be loaded", ".[gpu]"], "driver"),
        ([], ["all its libraries load", "nvidia-smi", "CUDA 12.5.1"], ".[gpu]"),
    ],
)
def test_gpus_that_tensorflow_does_not_see(
    missing: list[str],
    said: list[str],
    unsaid: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loads_all_but(monkeypatch, *missing)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 1
    (found,) = [row for row in json.loads(capsys.readouterr().out) if row["what"] == "devices"]
    assert found["state"] == "missing"
    assert all(part in found["message"] for part in said)
    assert unsaid not in found["message"]


@pytest.mark.usefixtures("two_gpus_present")
def test_gpus_that_are_hidden_or_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "build of it is for CPUs alone" in doctor.why_no_gpu(Build("", "", ()), 2, {})
    for hidden in ("", "-1"):
        message = doctor.why_no_gpu(BUILD, 2, {"CUDA_VISIBLE_DEVICES": hidden})
        assert f"CUDA_VISIBLE_DEVICES={hidden} hides them; unset it" in message
    loads_all_but(monkeypatch)
    assert "hides" not in doctor.why_no_gpu(BUILD, 2, {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize(
    ("cards", "missing", "expected"),
    [
        ([(9, 0)], ["libnccl.so.2"], [("GPU code", "ok", "card, compute capability 9.0: native code")]),
        (
            [(12, 0)],
            [],
            [("GPU code", "note", "card, compute capability 12.0: PTX only: first start compiles for minutes")],
        ),
        (
            [(7, 0)],
            [],
            [("GPU code", "missing", "7.0: none, only for sm_80, compute_90: use a newer TensorFlow")],
        ),
        ([(8, 0), (8, 0)], [], [("GPU code", "ok", "native code")]),
        (
            [(8, 0), (8, 6)],
            ["libnccl.so.2"],
            [
                ("GPU code", "ok", "8.0: native code"),
                ("GPU code", "ok", "8.6: native code"),
                ("NCCL", "missing", "libnccl.so.2 cannot be loaded, and several GPUs need it: pip install"),
            ],
        ),
    ],
)
def test_gpus_that_tensorflow_lists(
    cards: list[tuple[int, int]],
    missing: list[str],
    expected: list[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of each kind of card one finding; a card without code is as none at all."""
    topology = devices.Topology(1, 0, "GPU", tuple(f"GPU:{number}" for number in range(len(cards))))
    monkeypatch.setattr(devices, "prepare_devices", lambda _: topology)
    monkeypatch.setattr(precision, "resolve_precision", lambda *_: "bfloat16")
    monkeypatch.setattr(gpu_support, "this_build", lambda: BUILD)
    monkeypatch.setattr(gpu_support, "visible_gpus", lambda: [gpu_support.Gpu("card", card) for card in cards])
    loads_all_but(monkeypatch, *missing)
    with pytest.raises(SystemExit) if "missing" in [state for _, state, _ in expected] else nullcontext():
        main(["doctor", "--json"])
    rows = [row for row in json.loads(capsys.readouterr().out) if row["what"] in ("GPU code", "NCCL")]
    assert [(row["what"], row["state"]) for row in rows] == [(what, state) for what, state, _ in expected]
    assert all(said in row["message"] for row, (_, _, said) in zip(rows, expected, strict=True))


def test_a_package_of_another_version_than_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are always shown, and of any other that the metadata name."""
    wanted = {"keras": SpecifierSet(">=3.15,<3.17"), "pillow": SpecifierSet(">=11"), "tqdm": SpecifierSet(">=4")}
    installed = {"keras": "3.17.0rc1", "pillow": "10.0", "tqdm": "4.66"}
    version_of = versions.version_of
    monkeypatch.setattr(versions, "declared", lambda: wanted)
    monkeypatch.setattr(versions, "version_of", lambda name: installed.get(name) or version_of(name))
    found = {finding.what: finding for finding in doctor.examine_machine()}
    assert found["keras"].state == found["pillow"].state == "note"
    assert "3.17.0rc1, but " in found["keras"].message
    assert "-c constraints.txt" in found["keras"].message
    assert found["tensorflow"].state == "ok"
    assert "tqdm" not in found


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=2", 'nothing-of-the-kind>=1; extra == "dicom"', 'pytest>=8; extra == "test"']
    monkeypatch.setattr(doctor, "_requirements", lambda: asked)
    extras = [finding for finding in doctor.examine_machine() if finding.what.startswith("extra")]
    assert [(finding.what, finding.state) for finding in extras] == [("extra dicom", "note")]
    assert "without nothing-of-the-kind" in extras[0].message
    assert '".[dicom]"' in extras[0].message


def test_extras_keep_those_of_other_packages() -> None:
    requirements = ["tensorflow>=2.21", 'tensorflow[and-cuda]>=2.21; extra == "gpu"', "onnx>=1; extra == 'onnx'"]
    assert doctor.extras_of(requirements) == {"gpu": ["tensorflow[and-cuda]"], "onnx": ["onnx"]}


@pytest.mark.parametrize(
    ("nodes", "state", "said"),
    [
        ([Node(4.0), Node(4.0)], "ok", "1 worker(s) of 1 CPU(s) and 4 CPUs each"),
        ([Node(16.0, 4.0), Node(16.0, 4.0)], "ok", "2 worker(s) of 4 GPU(s) and 16 CPUs each"),
        ([], "missing", "the cluster has no machine"),
    ],
)
def test_a_cluster_and_what_training_would_place_there(nodes: list[Node], state: str, said: str) -> None:
    findings = doctor.examine_cluster(nodes)
    assert states(findings)["train"] == state
    assert said in findings[-1].message
