"""What TensorFlow needs of a machine to use its GPUs, by lists that stand for builds, cards and libraries."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr_dist.distributed import gpu_support
from cxr_dist.distributed.gpu_support import Build, code_for, libraries, not_loading

WHEEL = ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90")
"""Of TensorFlow 2.21's wheels, whose fat binaries hold machine code for all five and PTX for the last."""


@pytest.mark.parametrize(
    ("capability", "code", "expected"),
    [
        ((6, 0), WHEEL, "native"),  # P100
        ((6, 1), WHEEL, "native"),  # a later minor version of the same major one
        ((7, 5), WHEEL, "native"),  # T4
        ((8, 6), WHEEL, "native"),  # A10, from sm_80
        ((8, 9), WHEEL, "native"),  # L4
        ((9, 0), WHEEL, "native"),  # H100
        ((10, 0), WHEEL, "PTX"),  # B200
        ((12, 0), WHEEL, "PTX"),  # RTX 5090
        ((5, 2), WHEEL, "none"),
        ((8, 0), ("sm_89",), "none"),  # machine code of a later minor version does not run
        ((9, 0), ("sm_80",), "none"),  # no PTX
        ((9, 0), ("compute_80",), "PTX"),
        ((8, 0), ("compute_90",), "none"),
        ((9, 0), ("sm_90a",), "native"),
        ((12, 0), ("sm_90a", "compute_90a"), "none"),  # a letter: for that capability alone
        ((12, 1), ("sm_120",), "native"),
        ((12, 0), ("sm_100", "compute_100"), "PTX"),
        ((9, 0), (), "none"),
        ((9, 0), ("gfx90a",), "none"),
    ],
)
def test_code_for_a_card(capability: tuple[int, int], code: tuple[str, ...], expected: str) -> None:
    assert code_for(capability, code) == expected
    assert code_for(capability, code[::-1]) == expected


def test_the_installed_tensorflow_says_what_it_was_built_for() -> None:
    build = gpu_support.this_build()
    assert not build.cuda or code_for((9, 0), build.code) != "none"


def test_a_build_without_cuda_says_so() -> None:
    assert Build.of({"is_cuda_build": False, "cuda_version": "12.5.1"}) == Build("", "", ())


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        ("12.5.1", "cudart.so.12 cublas.so.12 cublasLt.so.12 cufft.so.11 cusolver.so.11 cusparse.so.12 cudnn.so.9"),
        ("13.0", "cudart.so.13 cublas.so.13 cublasLt.so.13 cufft.so.12 cusolver.so.12 cusparse.so.12 cudnn.so.9"),
    ],
)
def test_names_have_the_versions_of_the_build(cuda: str, expected: str) -> None:
    names = ["libcuda.so.1", *(f"lib{name}" for name in expected.split())]
    assert libraries(Build(cuda, "9", WHEEL), 1) == names
    assert libraries(Build(cuda, "9.3", WHEEL), 2) == [*names, "libnccl.so.2"]


def test_a_library_is_looked_for_by_name_and_then_in_the_folders(tmp_path: Path) -> None:
    (tmp_path / "libb.so.1").touch()
    (tmp_path / "libc.so.1").touch()
    asked = []

    def load(place: str) -> None:
        asked.append(place)
        if place == str(tmp_path / "libc.so.1"):
            raise OSError("libz.so: cannot open shared object file")
        if place not in ("liba.so.1", str(tmp_path / "libb.so.1")):
            raise OSError(f"{place}: cannot open shared object file")

    names = ["liba.so.1", "libb.so.1", "libc.so.1", "libd.so.1"]
    found = not_loading(names, [tmp_path, tmp_path / "none"], load)
    assert found == ["libc.so.1 (libz.so: cannot open shared object file)", "libd.so.1"]
    assert asked[:3] == ["liba.so.1", "libb.so.1", str(tmp_path / "libb.so.1")]


def test_the_dynamic_linker_is_asked() -> None:
    assert not_loading(["libc.so.6", "libnothing-of-the-kind.so.1"], []) == ["libnothing-of-the-kind.so.1"]


def test_gpus_are_counted_without_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Path] = []
    answer: list[Any] = []

    def run(*_: object, **__: object) -> Any:
        (said,) = answer
        if isinstance(said, Exception):
            raise said
        return SimpleNamespace(stdout=said)

    monkeypatch.setattr(Path, "glob", lambda *_: iter(devices))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert gpu_support.present_gpus() == 0
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", run)
    for said, expected in [
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n", 2),
        ("No devices were found\n", 0),
        (OSError("no such file"), 0),
        (subprocess.TimeoutExpired("nvidia-smi", 30), 0),
    ]:
        answer[:] = [said]
        assert gpu_support.present_gpus() == expected
    devices += [Path("/dev/nvidia0"), Path("/dev/nvidia1"), Path("/dev/nvidia2")]
    assert gpu_support.present_gpus() == 3
