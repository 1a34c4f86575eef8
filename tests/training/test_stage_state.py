"""The moving average of weights: its formula, on one replica and two, and that the loop validates and keeps it."""

from pathlib import Path

import numpy as np
import pytest

from cxr_dist.config.loading import load_config
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.evaluation.evaluate import predict_run
from cxr_dist.evaluation.evaluated_images import EvaluationSpec
from cxr_dist.launch import train
from cxr_dist.launch.train import run_training
from cxr_dist.runs import checkpoints, run_folder
from cxr_dist.training.stage_state import WeightAverage
from tests.conftest import SMALL_RUN
from tests.small_training import local_topology
from tests.training.test_loop import comparable

DECAY = 0.5


def moved(replicas: int, weights: list[np.ndarray]) -> tuple[WeightAverage, np.ndarray]:
    """An average that began at the first of `weights` and saw the others, and what a replica reads of it."""
    import keras
    import tensorflow as tf

    strategy = make_strategy(local_topology(replicas))
    with strategy.scope():
        variable = keras.Variable(weights[0], name="kernel")
        average = WeightAverage([variable], DECAY)

    @tf.function
    def step(value: object) -> None:
        strategy.extended.update(variable.value, lambda own, new: own.assign(new), args=(value,), group=False)
        average.update(strategy)

    for value in weights[1:]:
        step(tf.constant(value))
    read = strategy.experimental_local_results(strategy.run(lambda: average.values([variable])[0]))
    for other in read[1:]:
        np.testing.assert_array_equal(other.numpy(), read[0].numpy())
    return average, read[0].numpy()


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_formula_in_numpy(replicas: int) -> None:
    weights = list(np.random.default_rng(0).normal(size=(20, 3, 2)).astype(np.float32))
    expected, decays = weights[0], []
    for number, weight in enumerate(weights[1:]):
        decays.append(min(DECAY, (1 + number) / (10 + number)))
        expected = decays[-1] * expected + (1 - decays[-1]) * weight
    assert decays[0] == 0.1
    assert decays[-1] == DECAY, "the warm-up ends within the test"
    average, read = moved(replicas, weights)
    np.testing.assert_allclose(read, expected, rtol=1e-5)
    (kept,) = average.model_arrays().values()
    np.testing.assert_array_equal(kept, read)


def test_what_is_kept_of_it_goes_on() -> None:
    weights = list(np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32))
    whole, _ = moved(1, weights)
    first, _ = moved(1, weights[:5])
    second, _ = moved(1, weights[4:5])
    second.restore(first.arrays())
    assert second.arrays().keys() == whole.arrays().keys()
    assert second.arrays()["average_steps"] == 4
    with pytest.raises(KeyError):
        second.restore({})


@pytest.mark.usefixtures("small_network")
@pytest.mark.nightly
def test_the_loop_validates_and_keeps_the_average(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decay of 0 is the weights themselves; with another, the model of the run is the one that was validated."""
    monkeypatch.setattr(train, "remove_checkpoints", lambda _run: None)
    settings = [*SMALL_RUN, "stages.1.epochs=1", "stages.2.epochs=2", "stages.2.learning_rate=3e-3"]
    rows = {}
    for name, decay in (("plain", None), ("none", 0.0), ("averaged", 0.9)):
        more = [] if decay is None else [f"stages.1.ema_decay={decay}", f"stages.2.ema_decay={decay}"]
        run_training(load_config(None, [*settings, *more]), dataset, tmp_path / name, launcher="local")
        rows[name] = comparable(run_folder.read_history(tmp_path / name))
    for left, right in zip(rows["plain"], rows["none"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["val_loss"] == pytest.approx(right["val_loss"], abs=1e-4)
    # The first stage trains the same weights; what is validated differs.
    assert rows["averaged"][0]["loss"] == pytest.approx(rows["plain"][0]["loss"], abs=1e-4)
    assert rows["averaged"][0]["val_loss"] != pytest.approx(rows["plain"][0]["val_loss"], abs=1e-4)
    run = tmp_path / "averaged"
    predictions = predict_run(EvaluationSpec(run, tmp_path / "evaluation", "validation"))
    chosen = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    best = run_folder.read_result(run)["best"]
    assert float(-np.log(chosen).mean()) == pytest.approx(best["val_loss"], rel=1e-3)
    found = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS).newest(pytest.fail)
    assert found is not None
    names = {name.partition("/")[2] for name in found.arrays if name.startswith("average/")}
    assert names
    assert any(not np.array_equal(found.arrays[f"average/{name}"], found.arrays[f"model/{name}"]) for name in names), (
        "the checkpoint goes on from the weights, not from their average"
    )
