"""The step under one device and two mirrored logical CPUs: same curve, whatever compiles it and in what precision.

A residual block of ResNet50's kind stands in for it in the grid of strategies, compilers and precisions.
The curves are computed once and compared in several tests.
"""

import functools

import numpy as np
import pytest

from cxr_dist.config.schema import StageConfig
from cxr_dist.data import pipeline, resident
from cxr_dist.data.batch_sampler import TrainBatchSampler
from cxr_dist.data.resident import ResidentSource
from cxr_dist.model import resnet
from cxr_dist.training import train_step as steps
from cxr_dist.training.gradients import StepSpec
from cxr_dist.training.stage_state import StageState
from tests import small_training as training
from tests.small_training import Trace, Training
from tfrecords_builder.common.errors import UserError


@functools.cache
def curve(replicas: int = 1, precision: str = "float32", xla: bool = False, synchronized: bool = False) -> Trace:
    return training.two_stages(replicas, precision, xla, synchronize_batch_norm=synchronized)


@pytest.mark.nightly
def test_resnet50_itself_on_two_replicas() -> None:
    """The real network through the real step, once: the same losses as on one device, synchronised."""
    row = StageConfig(epochs=1, learning_rate=1e-4, optimizer="sgd", unfreeze_layers=5)
    one, two = (
        Training(replicas, make_base=resnet.resnet50, synchronize_batch_norm=True).stage(row) for replicas in (1, 2)
    )
    np.testing.assert_allclose(two.losses, one.losses, atol=1e-4)
    np.testing.assert_allclose(two.validation, one.validation, atol=1e-3)


def assert_same(left: Trace, right: Trace, tolerance: float) -> None:
    np.testing.assert_allclose(left.losses, right.losses, atol=tolerance)
    np.testing.assert_allclose(left.validation, right.validation, atol=tolerance)
    assert left.skipped == right.skipped == [0] * 4


def test_the_loss_falls_and_each_stage_is_traced_once() -> None:
    trace = curve()
    assert trace.losses[1] < trace.losses[0]
    assert trace.losses[3] < trace.losses[2]
    assert trace.traces == [1, 1]


def test_two_mirrored_replicas_follow_one_device() -> None:
    """With synchronised BatchNorm, whose collectives change nothing on one device."""
    assert_same(curve(replicas=2, synchronized=True), curve(), 1e-4)


def test_inputs_on_two_devices_change_nothing() -> None:
    sent, kept = Training(replicas=2), Training(replicas=2)
    kept.source = resident.on_devices(kept.source, kept.strategy, 1 << 30)
    assert isinstance(kept.source, ResidentSource)
    expected, trace = sent.stage(training.HEAD), kept.stage(training.HEAD)
    assert (trace.losses, trace.validation) == (expected.losses, expected.validation)


def test_an_update_that_xla_compiles_changes_nothing() -> None:
    """With an optimizer that has state, weight decay and an average of the weights."""
    stage = training.UPPER.model_copy(update={"optimizer": "adamw", "weight_decay": 0.1, "ema_decay": 0.9})
    compiled, plain = Training(xla_update=True).stage(stage), Training().stage(stage)
    np.testing.assert_allclose(compiled.losses, plain.losses, atol=1e-4)
    np.testing.assert_allclose(compiled.validation, plain.validation, atol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_changes_nothing(replicas: int) -> None:
    assert_same(curve(replicas, xla=True), curve(replicas), 1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_float32(precision: str, replicas: int) -> None:
    """bfloat16 has 8 significant bits and float16 11: the losses, from 1.6 to 0.7, agree to 0.05 over 16 steps.

    On two replicas BatchNorm sees four images, and small differences of precision grow.
    """
    assert_same(curve(replicas, precision), curve(replicas), 0.05)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_an_overflow_anywhere_skips_the_step_everywhere(replicas: int) -> None:
    """One replica's images make its gradients infinite; no weight of any replica may change."""
    run = Training(replicas, "float16")
    before = weights(run)
    run.poison(replica=replicas - 1)
    trace = run.stage(StageConfig(epochs=1, learning_rate=1e-3, optimizer="adam"), loss_scale=2.0**15)
    steps_run = run.plan.steps_per_epoch
    assert trace.skipped == [steps_run]
    assert run.loss_scale.scale.numpy() == 2.0 ** (15 - steps_run)
    for replica, (old, new) in enumerate(zip(before, weights(run), strict=True)):
        for left, right in zip(old, new, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=f"replica {replica}")


def weights(run: Training) -> list[list[np.ndarray]]:
    """Every weight, on every replica."""
    local = run.strategy.experimental_local_results
    per_weight = [[np.asarray(value) for value in local(variable.value)] for variable in run.model.weights]
    return [list(values) for values in zip(*per_weight, strict=True)]


def test_gradients_are_clipped_after_the_reduction() -> None:
    """A clip on each replica's own gradient would give two replicas another step than one device."""
    row = StageConfig(epochs=1, learning_rate=1e-2, optimizer="sgd", momentum=0.0, clip_norm=0.05)
    one, two = Training(1), Training(2, synchronize_batch_norm=True)
    assert_close(one.stage(row).losses, two.stage(row).losses, 1e-4)
    assert_close(
        np.asarray(resnet.head_of(one.model).get_layer("logits").kernel),
        np.asarray(resnet.head_of(two.model).get_layer("logits").kernel),
        1e-5,
    )


def assert_close(left: object, right: object, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=tolerance)


# Gradient accumulation


def test_microbatches_train_as_on_as_many_replicas() -> None:
    """BatchNorm sees half the batch in both, and the gradients are summed in both. Microbatches are compiled by XLA."""
    parts = Training(1, xla=True, microbatches=2).stage(training.HEAD, loss_scale=2.0**8)
    replicas = curve(replicas=2)
    assert_close(parts.losses, replicas.losses[: len(parts.losses)], 1e-4)
    assert parts.traces == [1]


def test_microbatches_start_from_each_others_statistics() -> None:
    """BatchNorm takes as many steps towards the mean as there are parts; each leaves nine tenths of the distance."""
    row = StageConfig(epochs=1, learning_rate=1e-12, optimizer="sgd")
    means = []
    for parts in (1, 4):
        run = Training(microbatches=parts)
        run.stage(row)
        norm = next(layer for layer in resnet.head_of(run.model).layers if hasattr(layer, "moving_mean"))
        means.append(np.asarray(norm.moving_mean).sum())
    once, four_times = (1 - norm.momentum ** (parts * run.plan.steps_per_epoch) for parts in (1, 4))
    assert means[1] / means[0] == pytest.approx(four_times / once, rel=0.1)  # batches differ


def test_a_batch_that_does_not_divide_into_microbatches() -> None:
    with pytest.raises(UserError, match=r"^global_batch_size 20: .*2 replicas times 3 accumulation_steps; try 24"):
        TrainBatchSampler(100, 20, 2, seed=0, accumulation_steps=3)


@pytest.mark.parametrize(("xla", "branches"), [(False, True), (True, False)])
def test_a_step_as_one_program_has_no_branch_for_which_a_device_waits(xla: bool, branches: bool) -> None:
    stage = training.HEAD
    run = Training(xla=xla)
    resnet.FrozenBase.of(stage, run.config).apply(run.model)
    state = StageState.create(run.strategy, run.model, stage, "float32")
    spec = StepSpec(global_batch_size=training.BATCH, classes=training.CLASSES, seed=0, xla=xla)
    step = steps.make_train_step(run.model, state, spec)
    iterator = pipeline.distributed_batches(run.strategy, run.topology, run.source, run.plan)
    step.run(iterator, 0, np.full(1, 0.1, np.float32), np.zeros(steps.TOTALS))
    (loop,) = step._compiled_loop._list_all_concrete_functions()
    kinds = {node.op for function in loop.graph.as_graph_def().library.function for node in function.node_def}
    assert bool({"If", "StatelessIf"} & kinds) is branches
