"""The devices of this process: which there are, how many, and what they are."""

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tfrecords_builder.common.errors import UserError

# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE", "ABSL_MIN_LOG_LEVEL": "3"}
"""Variables that keep C++ libraries from writing to stderr, where they are set before their imports."""
_XLA_FLAGS, _WITHOUT_FUSED_CONVOLUTION = "XLA_FLAGS", "--xla_disable_hlo_passes=cudnn-fused-convolution-rewriter"
ONEDNN, BACKEND = "TF_ENABLE_ONEDNN_OPTS", "KERAS_BACKEND"

DeviceKind = Literal["CPU", "GPU"]


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the workers, and which devices are its own."""

    workers: int
    worker: int
    kind: DeviceKind
    devices: tuple[str, ...]

    @property
    def replicas(self) -> int:
        return self.workers * len(self.devices)

    @property
    def is_chief(self) -> bool:
        """The one worker that writes what all workers share."""
        return self.worker == 0


def prepare_devices(
    devices: int | None,
    workers: int = 1,
    worker: int = 0,
    option: str = "--devices-per-worker",
    cores: int | None = None,
) -> Topology:
    """Take `devices` local devices (all GPUs, or one CPU, when None) for this process.

    Without a GPU the CPU is divided into logical CPUs, which share its cores: all of them, or `cores`, where several
    workers share a machine. Each would else start a thread for every core, and they would take turns.

    Raises:
        UserError: more GPUs are asked for than there are, naming `option`; or Keras has another backend.
    """
    prepare_environment()
    with muted_stderr():
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        wanted = devices or len(gpus)
        if wanted > len(gpus):
            raise UserError(f"{option} {wanted}: this machine has {len(gpus)} GPU(s); use at most as many")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return Topology(workers, worker, "GPU", tuple(f"GPU:{index}" for index in range(wanted)))
    keep_freed_memory()
    if cores is not None:
        from tfrecords_builder.common.pool import default_workers

        tf.config.threading.set_intra_op_parallelism_threads(min(cores, default_workers()))
    wanted = devices or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu)
    if wanted > 1 and len(present or ()) < wanted:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    return Topology(workers, worker, "CPU", tuple(f"CPU:{index}" for index in range(wanted)))


def prepare_environment(verbose: bool = True) -> None:
    """Set the variables that TensorFlow and Keras read when they are imported, for this process and its children.

    Importing this program sets none: whatever begins to work calls this first. A variable that is set stays, but for
    the flag that is added to ``XLA_FLAGS``.

    - ``TF_ENABLE_ONEDNN_OPTS=1``, unless TensorFlow has been imported. TensorFlow uses oneDNN by itself only on CPUs
      with AVX512_VNNI or newer. On an AVX2 CPU (Zen 3) training ResNet50 is 1.4 times as fast with it at 224 pixels and
      3 times at 64. It also changes results in their last digits: all processes of a run must have the same.
    - ``XLA_FLAGS``, to which is added that XLA leaves a convolution and the bias behind it apart, unless TensorFlow has
      been imported. To choose between cuDNN's ways of doing both at once, XLA compiles each of them: of ResNet50, on an
      H200, for more than six minutes before the first step.
    - ``KERAS_BACKEND=tensorflow``, unless Keras has been imported. There is no other backend here.

    Args:
        verbose: Whether C++ libraries may write to stderr; if not, `QUIET` is set too.

    Raises:
        UserError: another backend of Keras was chosen; names the variable that chose it.
    """
    if "tensorflow" not in sys.modules:
        os.environ.setdefault(ONEDNN, "1")
        flags = os.environ.get(_XLA_FLAGS, "")
        if "--xla_disable_hlo_passes" not in flags:
            os.environ[_XLA_FLAGS] = f"{flags} {_WITHOUT_FUSED_CONVOLUTION}".lstrip()
    if "keras" not in sys.modules and not os.environ.get(BACKEND):
        os.environ[BACKEND] = "tensorflow"
    chosen = os.environ.get(BACKEND) or "tensorflow"
    if chosen != "tensorflow":
        raise UserError(f"{BACKEND} {chosen}: only TensorFlow is supported; unset it, or set it to tensorflow")
    if not verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors instead of giving it back after every operation.

    By default each tensor over 32 MiB is mapped, zeroed page by page at its first use, and unmapped again: a
    forward pass of ResNet50 at batch 32 then takes five times the page faults and a quarter of its time in the
    kernel. Does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(option, value)


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to stderr, unless TensorFlow's log level was lowered or the block fails.

    TensorFlow logs the search for CUDA before its own log level is read, on every machine without a GPU.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "3":
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:
            raise  # no failure
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def hardware(kind: DeviceKind) -> dict[str, str]:
    """Names of what computes: the processor, and of GPUs the first one and the CUDA that TensorFlow was built for."""
    names = {"processor": _cpu_info("model name") or platform.machine(), "device": kind}
    if kind == "GPU":
        import tensorflow as tf

        details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
        names["device"] = str(details.get("device_name", kind))
        names["cuda"] = str(tf.sysconfig.get_build_info().get("cuda_version", "unknown"))
    return names


def gpu_memory_bytes() -> int:
    """Of the first GPU, as its driver says; 0 where that cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        # The driver's own program, wherever it is installed.
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
        return int(answer.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def _cpu_info(key: str) -> str:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


@contextmanager
def scratch_folder() -> Iterator[None]:
    """Temporary files of this process go to a folder that is removed at the end.

    TensorFlow leaves a file for each function that it converts, and removes them at exit: which a process that Ray
    ends, or `os._exit`, does not come to.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="cxr-dist-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
