"""An update is Keras's own, on every replica; a Keras that does something else ends the run before its first step."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.config.schema import StageConfig
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.launch.train import run_training
from cxr_dist.model import resnet
from cxr_dist.runs import run_folder
from cxr_dist.training import optimizers
from cxr_dist.training.stage_state import StageState
from tests.conftest import SMALL_RUN
from tests.small_training import Training, local_topology
from tfrecords_builder.common.errors import UserError

SETTINGS = [
    ("adam", 0.9, 0.0),
    ("adamw", 0.9, 0.0),
    ("adamw", 0.9, 0.1),
    ("sgd", 0.0, 0.0),
    ("sgd", 0.9, 0.0),
    ("sgd", 0.9, 0.1),
]
SHAPES = {"kernel": (3, 3, 2, 4), "gamma": (4,), "beta": (4,), "bias": (5,), "dense_kernel": (4, 5)}
RATES = (0.01, 0.03, 0.001, 0.02)


def stage(name: str, momentum: float, decay: float) -> StageConfig:
    return StageConfig(epochs=1, learning_rate=1e-3, optimizer=name, momentum=momentum, weight_decay=decay)


def moved(strategy: Any, make: Callable[[], Any], step: Callable[..., None]) -> list[np.ndarray]:
    """All variables, and the optimizer's, on every replica after four steps in a compiled function."""
    import keras
    import tensorflow as tf

    random = np.random.default_rng(0)
    with strategy.scope():
        variables = [
            keras.Variable(random.normal(size=shape).astype(np.float32), name=name) for name, shape in SHAPES.items()
        ]
        optimizer = make()
        optimizer.build(variables)
    compiled = tf.function(lambda gradients, rate: step(optimizer, variables, gradients, rate))
    for rate in RATES:
        gradients = [tf.constant(random.normal(size=shape), tf.float32) for shape in SHAPES.values()]
        compiled(gradients, tf.constant(rate))
    local = strategy.experimental_local_results
    return [np.asarray(copy) for variable in [*variables, *optimizer.variables] for copy in local(variable.value)]


def ours(strategy: Any, row: StageConfig) -> list[np.ndarray]:
    def step(optimizer: Any, variables: Sequence[Any], gradients: Sequence[Any], rate: Any) -> None:
        optimizers.update(strategy, optimizer, variables, gradients, learning_rate=rate, weight_decay=row.weight_decay)

    return moved(strategy, lambda: optimizers.make_optimizer(row), step)


@pytest.mark.parametrize(("name", "momentum", "decay"), SETTINGS)
def test_an_update_is_that_of_keras_to_the_bit(name: str, momentum: float, decay: float) -> None:
    """Of `apply` on one device, with its own weight decay and the exclusions by name."""
    import keras

    def make() -> Any:
        if name == "sgd":
            optimizer = keras.optimizers.SGD(momentum=momentum, weight_decay=decay or None)
        else:
            optimizer = keras.optimizers.AdamW(weight_decay=decay) if name == "adamw" else keras.optimizers.Adam()
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
        return optimizer

    def apply(optimizer: Any, variables: Sequence[Any], gradients: Sequence[Any], rate: Any) -> None:
        optimizer.learning_rate.assign(rate)
        optimizer.apply(gradients, variables)

    strategy = make_strategy(local_topology(1))
    expected = moved(strategy, make, apply)
    for left, right in zip(ours(strategy, stage(name, momentum, decay)), expected, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("name", "momentum", "decay"), SETTINGS)
def test_every_replica_has_the_update_of_one_device(name: str, momentum: float, decay: float) -> None:
    row = stage(name, momentum, decay)
    expected = ours(make_strategy(local_topology(1)), row)
    found = ours(make_strategy(local_topology(2)), row)
    assert len(found) == 2 * len(expected)
    for index, value in enumerate(found):
        np.testing.assert_allclose(value, expected[index // 2], rtol=1e-5, atol=1e-7)


@pytest.mark.nightly
def test_a_keras_that_reduces_under_another_name_trains_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum over replicas, of gradients that are already summed, would make each update twice as large."""
    from keras.src.backend.tensorflow import optimizer as keras_optimizer

    kind = keras_optimizer.TFOptimizer
    reduce = kind._all_reduce_sum_gradients

    def update_step(self: Any, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        import tensorflow as tf

        pairs = self._sum_over_replicas(zip(grads, [variable.value for variable in trainable_variables], strict=True))
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._distributed_tf_update_step, self._distribution_strategy, pairs, learning_rate
        )

    monkeypatch.delattr(kind, "_all_reduce_sum_gradients")
    monkeypatch.setattr(kind, "_sum_over_replicas", reduce, raising=False)
    monkeypatch.setattr(kind, "_backend_update_step", update_step)
    row = StageConfig(epochs=1, learning_rate=1e-2, optimizer="sgd", momentum=0.9)
    one, two = Training(1), Training(2, synchronize_batch_norm=True)
    np.testing.assert_allclose(one.stage(row).losses, two.stage(row).losses, atol=1e-4)
    for left, right in zip(one.model.trainable_variables, two.model.trainable_variables, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=1e-5)


# Stand-ins for a Keras in which something that an update needs is gone or does something else


def without(attribute: str) -> Callable[[pytest.MonkeyPatch, Any], None]:
    def change(patch: pytest.MonkeyPatch, kind: Any) -> None:
        for owner in kind.__mro__:
            if attribute in vars(owner):
                patch.delattr(owner, attribute)

    return change


def with_(attribute: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch, Any], None]:
    return lambda patch, kind: patch.setattr(kind, attribute, make(getattr(kind, attribute)))


STAND_INS = {
    "no update_step": without("update_step"),
    "another signature": with_(
        "update_step", lambda step: lambda self, gradient, variable: step(self, gradient, variable, 0)
    ),
    "a gradient by name alone": with_(
        "update_step", lambda step: lambda self, *, gradient, variable, rate: step(self, gradient, variable, rate)
    ),
    "arguments in another order": with_(
        "update_step", lambda step: lambda self, variable, gradient, rate: step(self, gradient, variable, rate)
    ),
    "a step that does nothing": with_("update_step", lambda _: lambda self, gradient, variable, rate: None),
    "a step the other way": with_("update_step", lambda step: lambda self, g, v, rate: step(self, -g, v, rate)),
    "the rate of the constructor": with_("update_step", lambda step: lambda self, g, v, rate: step(self, g, v, 0.001)),
    "no iterations": without("iterations"),
    "state outside of variables": with_("variables", lambda found: property(lambda self: found.fget(self)[:2])),
    "no variables": without("variables"),
    "no build": without("build"),
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("changed", STAND_INS)
def test_another_keras_is_refused_before_the_first_step(
    changed: str, name: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    run = Training(replicas)
    resnet.FrozenBase().apply(run.model)
    row = stage(name, 0.9, 0.0)
    StageState.create(run.strategy, run.model, row, "float32")
    STAND_INS[changed](monkeypatch, keras.optimizers.SGD if name == "sgd" else keras.optimizers.Adam)
    with pytest.raises(UserError, match=rf"^keras {keras.__version__}: .*; install keras") as caught:
        StageState.create(run.strategy, run.model, row, "float32")
    assert "\n" not in str(caught.value)


def test_a_step_that_sums_over_replicas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook that went without an error came to: updates as many times too large as there are replicas."""
    import keras

    step = keras.optimizers.SGD.update_step
    monkeypatch.setattr(
        keras.optimizers.SGD, "update_step", lambda self, gradient, *rest: step(self, 2 * gradient, *rest)
    )
    with pytest.raises(UserError, match=r"two steps of sgd give"):
        optimizers.check_updates(make_strategy(local_topology(2)), stage("sgd", 0.9, 0.1))


@pytest.mark.usefixtures("small_network")
def test_a_run_under_such_a_keras_takes_no_step(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    monkeypatch.delattr(keras.optimizers.Adam, "update_step")
    with pytest.raises(UserError, match=r"^keras .*no step of adam can be made"):
        run_training(load_config(None, SMALL_RUN), dataset, tmp_path / "run", launcher="local")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert run_folder.read_history(tmp_path / "run") == []
