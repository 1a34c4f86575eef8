"""Checkpoints: what is written comes back, what is damaged is refused, and nothing is executed."""

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cxr_dist.runs import checkpoint_file, checkpoints
from cxr_dist.runs.checkpoint_file import load_arrays, load_state, save_arrays
from cxr_dist.runs.checkpoints import KEPT, CheckpointFolder, Position
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.seal import UNSEALED, seal, sealed_json

STATE = {"stage": 2, "epoch": 3, "history": [{"loss": 0.1, "best": True}], "seconds": {"start": 1e-3}}


def arrays() -> checkpoint_file.Arrays:
    rng = np.random.default_rng(0)
    return {
        "model/conv1/kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "model/half": rng.normal(size=5).astype(np.float16),
        "optimizer/0": np.array(7, np.int64),
        "optimizer/1": np.array([np.nan, np.inf, -0.0], np.float64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.uint8),
    }


def assert_same(found: checkpoint_file.Arrays, expected: checkpoints.Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def warn_nothing(text: str) -> None:
    pytest.fail(f"unexpected warning: {text}")


def test_everything_comes_back(tmp_path: Path) -> None:
    save_arrays(tmp_path / "deep" / "one.safetensors", arrays(), STATE)
    found, state = load_arrays(tmp_path / "deep" / "one.safetensors")
    assert_same(found, arrays())
    assert state == STATE


def test_any_reader_of_safetensors_can_read_one(tmp_path: Path) -> None:
    save_arrays(tmp_path / "one.safetensors", arrays(), STATE)
    assert_same(safetensors.numpy.load_file(tmp_path / "one.safetensors"), arrays())


def test_the_order_in_memory_changes_nothing(tmp_path: Path) -> None:
    """safetensors alone stores the bytes as they lie."""
    transposed, sliced = np.arange(6.0).reshape(2, 3).T, np.arange(10)[::3]
    save_arrays(tmp_path / "one.safetensors", {"transposed": transposed, "sliced": sliced}, {})
    loaded, _ = load_arrays(tmp_path / "one.safetensors")
    np.testing.assert_array_equal(loaded["transposed"], transposed)
    np.testing.assert_array_equal(loaded["sliced"], sliced)


@pytest.mark.parametrize(
    "array", [np.array([{}, "x"], object), np.ones(3, ml_dtypes.bfloat16)], ids=["object", "bfloat16"]
)
def test_what_would_not_come_back_is_not_written(tmp_path: Path, array: Any) -> None:
    path = tmp_path / "one.safetensors"
    with pytest.raises(ValueError, match="odd"):
        save_arrays(path, {"odd": array}, {})
    assert list(tmp_path.iterdir()) == []


# Damage


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """Every byte of the file, one bit of each: also those of the header."""
    path = tmp_path / "one.safetensors"
    save_arrays(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3, np.int64)}, {"epoch": 1})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path}: is a damaged checkpoint .*; remove it") as raised:
            load_arrays(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "one.safetensors"
    save_arrays(path, arrays(), STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=f"^{path}: is a damaged checkpoint"):
        load_arrays(path)


def foreign(path: Path, content: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str]) -> None:
    """Another program's file, sealed all the same: whoever means harm can compute the checksum."""
    path.write_bytes(safetensors.numpy.save(content, metadata | {"seal": UNSEALED}))
    with path.open("r+b") as file:
        seal(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "plain.safetensors", {"a": np.zeros(3)}, {})
    foreign(tmp_path / "words.safetensors", {}, {"cxr-dist": "not json"})
    foreign(tmp_path / "list.safetensors", {}, {"cxr-dist": "[1]"})
    foreign(tmp_path / "state.safetensors", {}, {"cxr-dist": json.dumps({"format": 1})})
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "zip.safetensors", a=np.zeros(3))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(STATE))
    (tmp_path / "text.safetensors").write_text("epoch 3")
    (tmp_path / "sealed.safetensors").write_bytes(sealed_json(STATE))
    (tmp_path / "unsealed.safetensors").write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    (tmp_path / "folder.safetensors").mkdir()
    for path in sorted(tmp_path.iterdir()):
        for load in (load_arrays, load_state):
            with pytest.raises(UserError, match=f"^{path}: is a damaged checkpoint .*; remove it") as caught:
                load(path)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no such checkpoint$"):
        load_arrays(tmp_path / "missing.safetensors")


# The folder


def test_the_newest_few_are_kept_with_the_best_weights_of_their_time(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.newest(warn_nothing) is None
    best_at = [0, 0, 1, 1, 1, 4, 4, 6, 7, 7, 7, 7]
    positions = [Position(index // 2, index % 2 * 7) for index in range(1, 13)]
    for index, (position, best) in enumerate(zip(positions, best_at, strict=True)):
        weights = {"best": np.array(best)} if best else None
        folder.save(position, {"at": np.array(index)}, {"index": index}, best, weights)
        found = folder.newest(warn_nothing)
        assert found is not None
        assert (found.position, int(found.arrays["at"]), found.state["index"]) == (position, index, index)
        first = max(0, index - KEPT + 1)
        expected = {kept.file_name for kept in positions[first : index + 1]}
        expected |= {f"best-{number:05d}.safetensors" for number in best_at[first : index + 1] if number}
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == expected
        for kept in positions[first : index + 1]:
            of_then = folder.load(kept)
            assert of_then.best_epochs_done == best_at[positions.index(kept)]
            assert of_then.best_arrays.get("best", 0) == of_then.best_epochs_done
    assert KEPT >= 2, "else there is none before a damaged one"


def weights(*signs: float) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays that compare equal and differ in bits, and one with NaN."""
    return {"model/a": np.array(signs, np.float32), "model/b": np.array([np.nan, 1], np.float32)}


def test_what_equals_the_base_is_written_once_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.start_from(weights(0.0, 1.0))
    for done, changed in ((1, weights(0.0, 1.0)), (2, weights(-0.0, 1.0))):
        folder.save(Position(done), changed | {"optimizer/0": np.arange(3)}, {}, done, changed)
    (base,) = tmp_path.glob(checkpoints.BASE_PATTERN)
    stored = [set(load_arrays(tmp_path / Position(done).file_name)[0]) for done in (1, 2)]
    assert stored == [{"optimizer/0"}, {"optimizer/0", "model/a"}]
    for done, expected in ((1, weights(0.0, 1.0)), (2, weights(-0.0, 1.0))):
        fresh = CheckpointFolder(tmp_path)
        loaded = fresh.load(Position(done))
        best = fresh.load_best(fresh.best(done))
        for name, value in expected.items():
            assert loaded.arrays[name].tobytes() == best[name].tobytes() == value.tobytes()
        assert (loaded.state, loaded.best_epochs_done) == ({}, done)
        fresh.save(Position(9), loaded.arrays, {}, done)  # a run that resumes goes on with the same base
        assert list(tmp_path.glob(checkpoints.BASE_PATTERN)) == [base]
        (tmp_path / Position(9).file_name).unlink()


def test_a_lost_base_is_named_and_no_other_file_is_read_in_its_place(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    folder.start_from(weights(1.0))
    folder.save(Position(1), weights(2.0), {})
    (base,) = (tmp_path / "run").glob(checkpoints.BASE_PATTERN)
    base.rename(tmp_path / base.name)
    with pytest.raises(UserError, match=rf"{base.name}: no such checkpoint; every checkpoint of the run needs it"):
        CheckpointFolder(tmp_path / "run").load(Position(1))
    save_arrays(tmp_path / "run" / Position(2).file_name, {}, {"base": f"../{base.name}", "best_epochs_done": 0})
    with pytest.raises(UserError, match="damaged checkpoint"):
        CheckpointFolder(tmp_path / "run").load(Position(2))


def test_what_a_finished_run_keeps(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.start_from(weights(1.0))
    folder.save(Position(1), weights(2.0), {}, 1, weights(3.0))
    folder.save(Position(2), weights(4.0), {}, 2, weights(5.0))
    (tmp_path / "epoch-00000.damaged").write_bytes(b"")
    folder.keep_best_alone()
    (base,) = tmp_path.glob(checkpoints.BASE_PATTERN)
    assert {path.name for path in tmp_path.iterdir()} == {base.name, "best-00002.safetensors"}
    assert CheckpointFolder(tmp_path).load_best(CheckpointFolder(tmp_path).best(2))["model/a"].tolist() == [5.0]
    CheckpointFolder(tmp_path).remove_all()
    assert list(tmp_path.iterdir()) == []


def test_order_is_by_number(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    ordered = [Position(9), Position(9, 2), Position(10), Position(99, 10), Position(99, 9_999_999), Position(100)]
    for position in reversed(ordered):
        assert Position.of_file(position.file_name) == position
        save_arrays(tmp_path / position.file_name, {}, {"best_epochs_done": 0})
        found = folder.newest(warn_nothing)
        assert found is not None
        assert found.position == ordered[-1]
    assert Position.of_file("best-00003.safetensors") is None


def test_the_state_is_read_alone(tmp_path: Path) -> None:
    save_arrays(tmp_path / "one.safetensors", arrays(), STATE)
    assert load_state(tmp_path / "one.safetensors") == STATE
    (tmp_path / "one.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_state(tmp_path / "one.safetensors")


def test_a_checkpoint_of_another_format_is_neither_passed_over_nor_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with it: another version of the program can go on from it."""
    folder = CheckpointFolder(tmp_path)
    folder.save(Position(1), arrays(), {})
    monkeypatch.setattr(checkpoint_file, "FORMAT", 99)
    folder.save(Position(2), arrays(), {}, 2, arrays())
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    readers = (lambda: folder.newest(warn_nothing, set_aside=True), lambda: folder.load_best(folder.best(2)))
    files = ("epoch-00002.safetensors", "best-00002.safetensors")
    for read, name in zip(readers, files, strict=True):
        with pytest.raises(UserError, match=f"{name}: has format 99, .*; use the version that wrote it") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has format 99"):
        load_state(tmp_path / files[0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(Position(1), arrays(), {}, 1, arrays())
    for name in (".epoch-00002.safetensors.abc.tmp", ".best-00002.safetensors.abc.tmp", ".other"):
        (tmp_path / name).write_bytes(b"half")
    folder.clean()
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-00001.safetensors", "best-00001.safetensors", ".other"}


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    for done in (1, 2):
        folder.save(Position(done), arrays(), {"epochs_done": done})
    newest = tmp_path / "epoch-00002.safetensors"
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[data.index(arrays()["model/conv1/kernel"].tobytes()) + 3] ^= 1
    newest.write_bytes({"truncate": data[:-10], "empty": b"", "flip": data}[damage])
    warnings: list[str] = []
    found = folder.newest(warnings.append)
    assert found is not None
    assert (found.position, found.state["epochs_done"]) == (Position(1), 1)
    assert_same(found.arrays, arrays())
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert newest.exists(), "it is not ours to remove"
    (tmp_path / "epoch-00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):  # to begin anew would overwrite
        folder.newest(warnings.append)
    assert len(warnings) == 3


def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    for done in range(1, KEPT + 1):
        folder.save(Position(done), arrays(), {"epochs_done": done})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for done in (KEPT, KEPT + 1):  # the same once more, as after a crash; and the next
        with pytest.raises(OSError, match="No space"):
            folder.save(Position(done), {"other": np.zeros(3)}, {})
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Variables


class Variable:
    """As much of a Keras variable as a checkpoint uses."""

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, np.asarray(value, np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.value, dtype)

    def assign(self, value: Any) -> None:
        self.value = np.array(value)


class Holder:
    def __init__(self, *variables: Variable) -> None:
        self.weights = self.variables = list(variables)


def test_models_by_path_and_optimizers_by_order() -> None:
    model = Holder(Variable("a/kernel", [1, 2]), Variable("b/kernel", [3]))
    shuffled = Holder(Variable("b/kernel", [0]), Variable("a/kernel", [0, 0]))
    checkpoints.restore_model(shuffled, checkpoints.model_arrays(model))
    assert [variable.value.tolist() for variable in shuffled.weights] == [[3], [1, 2]]
    optimizer = Holder(Variable("velocity", [1]), Variable("velocity", [2, 3]))
    fresh = Holder(Variable("velocity", [0]), Variable("velocity", [0, 0]))
    checkpoints.restore_optimizer(fresh, checkpoints.optimizer_arrays(optimizer))
    assert [variable.value.tolist() for variable in fresh.variables] == [[1], [2, 3]]


def test_what_is_missing_or_of_another_shape_is_named() -> None:
    saved = checkpoints.model_arrays(Holder(Variable("a", [1, 2])))
    for other in (Variable("b", [1, 2]), Variable("a", [1]), Variable("a", [[1, 2]])):
        with pytest.raises(ValueError, match=rf"no weight {other.path} of shape"):
            checkpoints.restore_model(Holder(other), saved)
    saved = checkpoints.optimizer_arrays(Holder(Variable("a", [1, 2])))
    for wrong in (Holder(Variable("a", [1])), Holder(Variable("a", [1, 2]), Variable("b", [1]))):
        with pytest.raises(ValueError, match="no optimizer variable"):
            checkpoints.restore_optimizer(wrong, saved)
