"""Decisions by device, and the messages that are held back."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.config.schema import AllReduceConfig
from cxr_dist.distributed import devices, precision, strategy
from cxr_dist.distributed.devices import DeviceKind, Topology, muted_stderr
from cxr_dist.distributed.precision import dtype_policy, resolve_fused_batch_norm, resolve_precision, resolve_xla
from tfrecords_builder.common.errors import UserError


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, "float32"),
        (set(), "float32"),
        ({"avx512f", "avx512_bf16"}, "bfloat16"),
        ({"amx_bf16"}, "bfloat16"),
    ],
)
def test_auto_precision_of_a_cpu(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: str) -> None:
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset(flags))
    assert resolve_precision("auto", "CPU") == expected
    for asked in ("float32", "bfloat16", "float16"):
        assert resolve_precision(asked, "CPU") == asked


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 1), "float32"), ((7, 0), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_auto_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["gpu"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _gpu: {"compute_capability": capability})
    assert resolve_precision("auto", "GPU") == expected
    assert resolve_precision("float16", "GPU") == "float16"


def test_cpu_flags_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cpuinfo:
        text: str | None = "model name : some\nflags\t\t: fpu avx512_bf16 sse\nflags : other"

        def __init__(self, path: str) -> None:
            assert path == "/proc/cpuinfo"

        def read_text(self, **_options: Any) -> str:
            if self.text is None:
                raise FileNotFoundError
            return self.text

    monkeypatch.setattr(devices, "Path", Cpuinfo)
    assert precision._cpu_flags() == {"fpu", "avx512_bf16", "sse"}
    Cpuinfo.text = "processor : 0\n"
    assert precision._cpu_flags() == frozenset()
    Cpuinfo.text = None
    assert precision._cpu_flags() == frozenset()


@pytest.mark.parametrize(("xla", "expected"), [("auto", False), ("on", True), ("off", False)])
def test_xla(xla: str, expected: bool) -> None:
    assert resolve_xla(load_config(overrides=[f"xla={xla}"])) is expected


@pytest.mark.parametrize(
    ("fused", "synchronized", "kind", "expected"),
    [
        ("auto", False, "CPU", False),
        ("auto", False, "GPU", True),
        ("auto", True, "GPU", False),
        ("on", False, "CPU", True),
        ("off", False, "GPU", False),
        ("off", True, "GPU", False),
    ],
)
def test_fused_batch_norm(fused: str, synchronized: bool, kind: devices.DeviceKind, expected: bool) -> None:
    overrides = [f"model.fused_batch_norm={fused}", f"model.synchronize_batch_norm={synchronized}"]
    assert resolve_fused_batch_norm(load_config(overrides=overrides), kind) is expected


def test_policies_and_replicas() -> None:
    import keras

    for name in ("float32", "bfloat16", "float16"):
        policy = keras.DTypePolicy(dtype_policy(name))
        assert (policy.variable_dtype, policy.compute_dtype) == ("float32", name)
    topology = Topology(3, 1, "GPU", ("GPU:0", "GPU:1"))
    assert (topology.replicas, topology.is_chief) == (6, False)
    assert Topology(3, 0, "GPU", ("GPU:0",)).is_chief


@pytest.mark.parametrize(("count", "name"), [(1, "OneDeviceStrategy"), (2, "MirroredStrategy")])
def test_the_strategy_is_chosen_from_the_devices(count: int, name: str) -> None:
    topology = devices.prepare_devices(count)
    assert len(topology.devices) == topology.replicas == count
    made = strategy.make_strategy(topology)
    assert type(made).__name__ == name
    assert made.num_replicas_in_sync == count
    assert strategy.make_strategy(topology, AllReduceConfig(bucket_mb=1)) is made


@pytest.mark.parametrize(
    ("algorithm", "kind", "expected"),
    [("auto", "GPU", "NCCL"), ("auto", "CPU", "RING"), ("ring", "GPU", "RING"), ("nccl", "GPU", "NCCL")],
)
def test_how_gradients_are_summed(algorithm: str, kind: DeviceKind, expected: str) -> None:
    all_reduce = AllReduceConfig.model_validate({"algorithm": algorithm, "bucket_mb": 50})
    options = strategy.communication_options(all_reduce, kind)
    assert (options.implementation.value, options.bytes_per_pack) == (expected, 50_000_000)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    grown: list[Any] = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["a", "b"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: grown.append((gpu, on)))
    with pytest.raises(UserError, match=r"^--devices-per-worker 3: .* 2 GPU"):
        devices.prepare_devices(3)
    assert devices.prepare_devices(None, 2, 1) == Topology(2, 1, "GPU", ("GPU:0", "GPU:1"))
    assert grown == [("a", True), ("b", True)]


# Messages that are held back; by descriptor, as C++ writes them


def shout(text: str) -> None:
    os.write(2, text.encode())


def test_what_is_muted_is_gone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    shout("before ")
    with muted_stderr():
        shout("noise")
        print("python noise", file=sys.__stderr__, flush=True)
    shout("after")
    assert capfd.readouterr().err == "before after"


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_what_was_muted_comes_back_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    """Ctrl-C is none."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")

    def fail() -> None:
        shout("the reason")
        raise error

    with pytest.raises(error), muted_stderr():
        fail()
    shout(" and more")
    assert capfd.readouterr().err == (" and more" if error is KeyboardInterrupt else "the reason and more")


@pytest.mark.parametrize("level", [None, "0", "2"])
def test_nothing_is_muted_when_messages_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], level: str | None
) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    if level:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    with muted_stderr():
        shout("wanted")
    assert capfd.readouterr().err == "wanted"


def test_no_descriptor_is_lost() -> None:
    code = (
        "import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'\n"
        "from cxr_dist.distributed.devices import muted_stderr\n"
        "before = os.listdir('/proc/self/fd')\n"
        "for _ in range(3):\n"
        "    with muted_stderr(): os.write(2, b'x')\n"
        "assert os.listdir('/proc/self/fd') == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_tensorflow_leaves_of_converted_functions_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray and `os._exit` end a process without its exit handlers."""
    import tempfile

    import tensorflow as tf

    from cxr_dist.distributed.devices import scratch_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @tf.function
    def branch(x: Any) -> Any:
        if tf.reduce_sum(x) > 0:
            x = -x
        return x

    with scratch_folder():
        branch(tf.ones(3))
        assert len(list(tmp_path.rglob("__autograph_generated_file*.py"))) == 1
    assert list(tmp_path.iterdir()) == []
    assert tempfile.gettempdir() == str(tmp_path)
    assert branch(tf.ones(2)).numpy().tolist() == [-1, -1]
