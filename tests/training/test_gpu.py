"""What only a GPU can show: the same curve as on the CPU, where things lie, and what the host waits for.

Each test is small. They need a machine with a GPU: `pytest -m gpu`.
"""

import numpy as np
import pytest

from cxr_dist.data.resident import ResidentSource, on_devices
from cxr_dist.distributed.devices import Topology, gpu_memory_bytes, prepare_devices
from cxr_dist.distributed.precision import resolve_precision
from tests import small_training as training
from tests.small_training import Training

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Topology:
    import tensorflow as tf

    topology = prepare_devices(1)
    if topology.kind != "GPU":
        pytest.skip("there is no GPU")
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return topology


@pytest.mark.parametrize("xla", [False, True])
def test_the_curve_is_that_of_the_cpu(gpu: Topology, xla: bool) -> None:
    cpu = Training(1).stage(training.UPPER)
    trace = Training(topology=gpu, xla=xla).stage(training.UPPER)
    np.testing.assert_allclose(trace.losses, cpu.losses, atol=1e-3)
    assert trace.skipped == [0, 0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("xla", [False, True])
def test_reduced_precision_learns(gpu: Topology, precision: str, xla: bool) -> None:
    trace = Training(topology=gpu, precision=precision, xla=xla).stage(training.UPPER, loss_scale=2.0**8)
    assert trace.losses[1] < trace.losses[0]


@pytest.mark.parametrize("xla", [False, True])
def test_an_overflow_in_float16_skips_the_step(gpu: Topology, xla: bool) -> None:
    poisoned = Training(topology=gpu, precision="float16", xla=xla)
    poisoned.poison(0)
    trace = poisoned.stage(training.HEAD)
    assert trace.skipped == [poisoned.plan.steps_per_epoch] * 2


def test_variables_and_a_resident_split_lie_on_the_gpu(gpu: Topology) -> None:
    run = Training(topology=gpu)
    assert all("GPU:0" in variable.value.device for variable in run.model.variables)
    source = on_devices(run.source, run.strategy, 1 << 30)
    assert isinstance(source, ResidentSource)
    assert "GPU:0" in run.strategy.experimental_local_results(source.table)[0].device


def test_memory_is_taken_as_it_is_needed(gpu: Topology) -> None:
    import tensorflow as tf

    assert tf.config.experimental.get_memory_growth(tf.config.list_physical_devices("GPU")[0])
    assert tf.config.experimental.get_memory_info("GPU:0")["peak"] < gpu_memory_bytes() / 2


def test_auto_precision_follows_the_compute_capability(gpu: Topology) -> None:
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    expected = "bfloat16" if details["compute_capability"] >= (8, 0) else "float16"
    assert resolve_precision("auto", gpu.kind) == expected
