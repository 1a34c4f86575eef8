"""The only place that makes a tf.distribute strategy, a dtype policy, or decides on XLA.

Call `prepare_devices` before anything else touches TensorFlow in a process: logical devices and memory
growth can only be set before the runtime starts.
"""

import ctypes
import functools
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cxr_dist.config.schema import AllReduceConfig, Config
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.pool import default_workers

# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE", "ABSL_MIN_LOG_LEVEL": "3"}
"""Variables that keep C++ libraries from writing to stderr, where they are set before their imports."""
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
    check_backend()
    with muted_stderr():
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        wanted = devices or len(gpus)
        if wanted > len(gpus):
            raise UserError(f"{option} {wanted}: this machine has {len(gpus)} GPU(s); ask for at most as many")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return Topology(workers, worker, "GPU", tuple(f"GPU:{index}" for index in range(wanted)))
    keep_freed_memory()
    if cores is not None:
        tf.config.threading.set_intra_op_parallelism_threads(min(cores, default_workers()))
    wanted = devices or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu)
    if wanted > 1 and len(present or ()) < wanted:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    return Topology(workers, worker, "CPU", tuple(f"CPU:{index}" for index in range(wanted)))


def check_backend() -> None:
    """Refuse another backend of Keras than TensorFlow, before anything of it is imported.

    Raises:
        UserError: names the variable that chose it.
    """
    chosen = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if chosen != "tensorflow":
        raise UserError(f"KERAS_BACKEND {chosen}: only TensorFlow is supported; unset it, or set it to tensorflow")


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


_COLLECTIVE_KEYS_PER_STRATEGY = 1000
_ALL_REDUCE = AllReduceConfig()


def make_strategy(topology: Topology, all_reduce: AllReduceConfig | None = None) -> Any:
    """One device, mirrored over local devices, or multi-worker (which reads TF_CONFIG).

    The same one for the same arguments. Each strategy numbers its collectives from the same start, and the
    runtime knows them by number: two strategies in one process would take each other's for their own.

    Args:
        topology: What there is.
        all_reduce: Between workers; of one worker, nothing is asked.
    """
    return _strategy(topology, all_reduce if all_reduce and topology.workers > 1 else _ALL_REDUCE)


@functools.cache
def _strategy(topology: Topology, all_reduce: AllReduceConfig) -> Any:
    import tensorflow as tf

    for kind in (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy):
        kind._collective_key_base += _COLLECTIVE_KEYS_PER_STRATEGY

    if topology.workers > 1:
        options = communication_options(all_reduce, topology.kind)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    elif len(topology.devices) > 1:
        strategy = tf.distribute.MirroredStrategy(list(topology.devices))
    else:
        strategy = tf.distribute.OneDeviceStrategy(topology.devices[0])
    if strategy.num_replicas_in_sync != topology.replicas:
        raise RuntimeError(
            f"the strategy has {strategy.num_replicas_in_sync} replicas where {topology.workers} workers with "
            f"{len(topology.devices)} devices were planned"
        )
    return strategy


def communication_options(all_reduce: AllReduceConfig, kind: DeviceKind) -> Any:
    """In TensorFlow's terms."""
    import tensorflow as tf

    algorithm = {"auto": "nccl" if kind == "GPU" else "ring"}.get(all_reduce.algorithm, all_reduce.algorithm)
    return tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation(algorithm.upper()),
        bytes_per_pack=int(all_reduce.pack_mb * 1e6),
    )


def resolve_precision(requested: str, kind: DeviceKind) -> str:
    """float32, bfloat16 or float16. `auto` takes what the device computes natively and faster.

    A CPU without bfloat16 instructions emulates them: a ResNet50 forward pass then takes 1.4 times as
    long as in float32 (measured on a Zen 3 CPU with oneDNN off), where one with AVX512_BF16 needs half the time.
    """
    if requested != "auto":
        return requested
    if kind == "CPU":
        return "bfloat16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "float32"
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    major = details.get("compute_capability", (0, 0))[0]
    # Tensor cores: float16 from Volta (7) on, bfloat16, which needs no loss scale, from Ampere (8) on.
    return "bfloat16" if major >= 8 else "float16" if major >= 7 else "float32"


def resolve_xla(config: Config, kind: DeviceKind) -> bool:
    """Whether the per-replica forward and gradient is compiled with XLA.

    `auto` compiles on GPUs only: on CPUs XLA was between 3% faster (frozen base) and 17% slower
    (upper 100 layers), and costs half a minute of compilation (Zen 3, oneDNN off).
    """
    if config.xla != "auto":
        return config.xla == "on"
    return kind == "GPU" and not config.model.synchronize_batch_norm


def dtype_policy(precision: str) -> str:
    """Keras's name for the policy: variables in float32, arithmetic in `precision`."""
    return "float32" if precision == "float32" else f"mixed_{precision}"


def hardware(kind: DeviceKind) -> dict[str, str]:
    """Names of what computes: the processor, and of GPUs the first one and the CUDA that TensorFlow was built for."""
    names = {"processor": _cpu_info("model name") or platform.machine(), "device": kind}
    if kind == "GPU":
        import tensorflow as tf

        details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
        names["device"] = str(details.get("device_name", kind))
        names["cuda"] = str(tf.sysconfig.get_build_info().get("cuda_version", "unknown"))
    return names


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_info("flags").split())


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
