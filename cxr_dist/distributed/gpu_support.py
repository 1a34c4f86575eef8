"""Whether this TensorFlow can use an NVIDIA GPU: its code for the card, and the shared libraries that it loads."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NCCL = "libnccl.so.2"
"""Sums gradients between GPUs."""
DRIVER = "libcuda.so.1"

Capability = tuple[int, int]
"""Of a card, as (9, 0) of an H100: which machine code it runs."""


@dataclass(frozen=True)
class Build:
    """What TensorFlow was compiled for."""

    cuda: str
    """Version, as 12.5.1; empty in a build for CPUs."""
    cudnn: str
    code: tuple[str, ...]
    """As sm_80 and compute_90; see `code_for`."""

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Build":
        """Of `tf.sysconfig.get_build_info()`."""
        cuda = str(info.get("cuda_version", "")) if info.get("is_cuda_build") else ""
        return cls(cuda, str(info.get("cudnn_version", "")), tuple(info.get("cuda_compute_capabilities", ())))


@dataclass(frozen=True)
class Gpu:
    """A GPU that TensorFlow lists."""

    name: str
    capability: Capability


def code_for(capability: Capability, code: Iterable[str]) -> str:
    """What TensorFlow runs on a card: `native`, `PTX`, or `none`.

    A build for sm_XY holds machine code, which runs on cards of the same X and at least that Y. A build for compute_XY
    holds that too, and PTX, which the driver compiles for any newer card. With a letter, as in sm_90a, both are for
    that one capability alone.
    """
    found = "none"
    for name in code:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not parts:
            continue
        built = int(parts[2]), int(parts[3])
        if capability == built or (not parts[4] and capability[0] == built[0] and capability > built):
            return "native"
        if parts[1] == "compute" and not parts[4] and capability > built:
            found = "PTX"
    return found


def libraries(build: Build, gpus: int) -> list[str]:
    """The shared libraries that TensorFlow loads before it lists a GPU; for several GPUs NCCL, which it loads later."""
    major = int(build.cuda.split(".")[0])
    older = major - 1  # the numbers of these two stayed behind when CUDA went from 11 to 12
    versions = {"cudart": major, "cublas": major, "cublasLt": major, "cufft": older, "cusolver": older, "cusparse": 12}
    names = [f"lib{name}.so.{version}" for name, version in versions.items()]
    return [DRIVER, *names, f"libcudnn.so.{build.cudnn.split('.')[0]}", *([NCCL] if gpus > 1 else [])]


def not_loading(names: Sequence[str], folders: Sequence[Path], load: Callable[[str], Any] = ctypes.CDLL) -> list[str]:
    """Those of the libraries that cannot be loaded, each with what the dynamic linker says of it if it lies there.

    Args:
        names: Names with versions.
        folders: Where to look beside what the dynamic linker searches.
        load: Raises OSError.
    """
    missing = []
    for name in names:
        said = ""
        for place in (name, *(str(folder / name) for folder in folders if (folder / name).is_file())):
            try:
                load(place)
                break
            except OSError as error:
                # That a library is nowhere is said by its name. One that lies there lacks another.
                said = f" ({error})" if place != name else ""
        else:
            missing.append(name + said)
    return missing


def present_gpus() -> int:
    """How many NVIDIA GPUs this machine has, whether or not TensorFlow can use them."""
    if files := list(Path("/dev").glob("nvidia[0-9]*")):
        return len(files)
    if not (command := shutil.which("nvidia-smi")):
        return 0
    try:  # where the files of devices have other names
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def this_build() -> Build:
    """Of the TensorFlow that is installed."""
    import tensorflow as tf

    return Build.of(dict(tf.sysconfig.get_build_info()))


def visible_gpus() -> list[Gpu]:
    """The GPUs that TensorFlow lists."""
    import tensorflow as tf

    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return [Gpu(str(each.get("device_name", "GPU")), each.get("compute_capability", (0, 0))) for each in details]


def wheel_folders() -> list[Path]:
    """Where NVIDIA's wheels put their libraries, and TensorFlow finds them."""
    import tensorflow as tf

    return sorted(Path(tf.__file__).parents[1].glob("nvidia/*/lib"))
