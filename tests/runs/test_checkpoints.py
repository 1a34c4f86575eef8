"""Checkpoints: what is written comes back, what is damaged is refused, and nothing is executed."""

import errno
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cxr_dist.runs import checkpoints
from cxr_dist.runs.checkpoints import KEPT, CheckpointFolder, Position, load_arrays, load_state, save_arrays
from tfrecords_builder.common.errors import UserError

STATE = {"stage": 2, "epoch": 3, "history": [{"loss": 0.1, "best": True}], "seconds": {"start": 1e-3}}


def arrays() -> checkpoints.Arrays:
    rng = np.random.default_rng(0)
    return {
        "model/conv1/kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "model/half": rng.normal(size=5).astype(np.float16),
        "optimizer/0": np.array(7, np.int64),
        "optimizer/1": np.array([np.nan, np.inf, -0.0], np.float64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.uint8),
    }


def assert_same(found: checkpoints.Arrays, expected: checkpoints.Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def warn_nothing(text: str) -> None:
    pytest.fail(f"unexpected warning: {text}")


def test_everything_comes_back(tmp_path: Path) -> None:
    save_arrays(tmp_path / "deep" / "one.npz", arrays(), STATE)
    found, state = load_arrays(tmp_path / "deep" / "one.npz")
    assert_same(found, arrays())
    assert state == STATE


def test_any_reader_of_npz_can_read_one(tmp_path: Path) -> None:
    save_arrays(tmp_path / "one.npz", arrays(), STATE)
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["model/conv1/kernel"], arrays()["model/conv1/kernel"])


@pytest.mark.parametrize(
    "array", [np.array([{}, "x"], object), np.ones(3, ml_dtypes.bfloat16)], ids=["object", "bfloat16"]
)
def test_what_would_not_come_back_is_not_written(tmp_path: Path, array: Any) -> None:
    path = tmp_path / "one.npz"
    with pytest.raises(ValueError, match="odd"):
        save_arrays(path, {"odd": array}, {})
    assert list(tmp_path.iterdir()) == []


# Damage


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """Every byte of the file, one bit of each: also those of the zip's own directory."""
    path = tmp_path / "one.npz"
    save_arrays(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3, np.int64)}, {"epoch": 1})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path}: damaged checkpoint .*; remove it") as raised:
            load_arrays(path)
        assert "\n" not in str(raised.value)


def test_a_header_that_asks_for_less_is_found(tmp_path: Path) -> None:
    """NumPy reads what the header says and no further, so not as far as the CRC of a larger array."""
    path = tmp_path / "one.npz"
    save_arrays(path, {"large": np.zeros((70, 1000), np.float32)}, {})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(70, 1000)", b"(30, 1000)", 1))
    with pytest.raises(UserError, match="damaged"):
        load_arrays(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "one.npz"
    save_arrays(path, arrays(), STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=f"^{path}: damaged checkpoint"):
        load_arrays(path)


def sealed(*paths: Path) -> None:
    for path in paths:
        with path.open("r+b") as file:
            checkpoints.seal_archive(file)


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    save_arrays(tmp_path / "whole.npz", {}, {})
    state = np.load(tmp_path / "whole.npz")["state.json"]
    hidden = np.empty(1, object)
    hidden[0] = Bomb()
    np.savez(tmp_path / "object.npz", **{"state.json": state, "a": hidden})
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, state)
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("state.json.npy", buffer.getvalue())
        archive.writestr("a.npy", pickle.dumps(Bomb()))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    sealed(tmp_path / "object.npz", tmp_path / "raw.npz")
    for name in ("object.npz", "raw.npz", "pickle.npz"):
        with pytest.raises(UserError, match=name):
            load_arrays(tmp_path / name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "plain.npz", a=np.zeros(3))
    np.savez(tmp_path / "words.npz", **{"state.json": np.frombuffer(b"not json", np.uint8)})
    np.savez(tmp_path / "list.npz", **{"state.json": np.frombuffer(json.dumps([1]).encode(), np.uint8)})
    np.savez_compressed(tmp_path / "packed.npz", **{"state.json": np.frombuffer(b"{}", np.uint8)})
    sealed(*tmp_path.glob("*.npz"))  # whoever means harm can compute the checksum
    (tmp_path / "text.npz").write_text("epoch 3")
    (tmp_path / "folder.npz").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"^{path}: damaged checkpoint .*; remove it"):
            load_arrays(path)
    with pytest.raises(UserError, match=r"no such checkpoint$"):
        load_arrays(tmp_path / "missing.npz")


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
        assert (found[0], int(found[1]["at"]), found[2]["index"]) == (position, index, index)
        first = max(0, index - KEPT + 1)
        expected = {kept.file_name for kept in positions[first : index + 1]}
        expected |= {f"best-{number:05d}.npz" for number in best_at[first : index + 1] if number}
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == expected
        for kept in positions[first : index + 1]:
            of_then = folder.load(kept)[1]["best_epochs_done"]
            assert of_then == best_at[positions.index(kept)]
            assert not of_then or int(folder.load_best(of_then)["best"]) == of_then
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
        arrays, state = fresh.load(Position(done))
        best = fresh.load_best(done)
        for name, value in expected.items():
            assert arrays[name].tobytes() == best[name].tobytes() == value.tobytes()
        assert state == {"best_epochs_done": done}
        fresh.save(Position(9), arrays, {}, done)  # a run that resumes goes on with the same base
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
    assert {path.name for path in tmp_path.iterdir()} == {base.name, "best-00002.npz"}
    assert CheckpointFolder(tmp_path).load_best(2)["model/a"].tolist() == [5.0]
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
        assert found[0] == ordered[-1]
    assert Position.of_file("best-00003.npz") is None


def test_the_state_is_read_alone(tmp_path: Path) -> None:
    save_arrays(tmp_path / "one.npz", arrays(), STATE)
    assert load_state(tmp_path / "one.npz") == STATE
    (tmp_path / "one.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_state(tmp_path / "one.npz")


def test_a_checkpoint_of_another_format_is_neither_passed_over_nor_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with it: another version of the program can go on from it."""
    folder = CheckpointFolder(tmp_path)
    folder.save(Position(1), arrays(), {})
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    folder.save(Position(2), arrays(), {}, 2, arrays())
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    readers = (lambda: folder.newest(warn_nothing, set_aside=True), lambda: folder.load_best(2))
    files = ("epoch-00002.npz", "best-00002.npz")
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
    for name in (".epoch-00002.npz.abc.tmp", ".best-00002.npz.abc.tmp", ".other"):
        (tmp_path / name).write_bytes(b"half")
    folder.clean()
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-00001.npz", "best-00001.npz", ".other"}


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    for done in (1, 2):
        folder.save(Position(done), arrays(), {"epochs_done": done})
    newest = tmp_path / "epoch-00002.npz"
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[data.index(arrays()["model/conv1/kernel"].tobytes()) + 3] ^= 1
    newest.write_bytes({"truncate": data[:-10], "empty": b"", "flip": data}[damage])
    warnings: list[str] = []
    found = folder.newest(warnings.append)
    assert found is not None
    assert (found[0], found[2]["epochs_done"]) == (Position(1), 1)
    assert_same(found[1], arrays())
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert newest.exists(), "it is not ours to remove"
    (tmp_path / "epoch-00001.npz").write_bytes(b"")
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
