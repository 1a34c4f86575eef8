"""Entries are whole or not there, whoever writes them and whatever happens to them."""

import json
import multiprocessing
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.features.store import FeatureStore, Rows, key_of
from tfrecords_builder.common.disk_cache import DiskCache
from tfrecords_builder.common.errors import UserError

ROWS = np.random.default_rng(0).normal(size=(10, 3, 2)).astype(np.float32)
SHAPE = (3, 2)
LIMIT_S = 300.0


def about(number: int = 0, **more: object) -> dict[str, object]:
    return {"layer": "x", "number": number, **more}


def write(store: FeatureStore, description: dict[str, object], bounds: tuple[int, ...] = (0, 10)) -> None:
    with store.computing([description]):
        store.begin(description, ROWS.nbytes)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            with store.part(description, number, SHAPE, "float32") as part:
                for row in range(start, stop):
                    part.append(ROWS[row : row + 1])
        store.commit(description, len(bounds) - 1, SHAPE, "float32")


def store_in(folder: Path, limit: int = 1 << 30) -> FeatureStore:
    return FeatureStore(folder / "store", limit)


@pytest.mark.parametrize("bounds", [(0, 10), (0, 4, 10), (0, 0, 3, 3, 10)])
def test_rows_come_back_by_position(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    store = store_in(tmp_path)
    assert store.find(about()) is None
    write(store, about(), bounds)
    rows = store_in(tmp_path).find(about())
    assert rows is not None
    assert (rows.shape, rows.dtype, len(rows)) == (ROWS.shape, np.float32, 10)
    positions = np.array([9, 0, 3, 3, 4, 2])
    np.testing.assert_array_equal(rows[positions], ROWS[positions])
    assert store.find(about(1)) is None


def test_rows_of_several_entries(tmp_path: Path) -> None:
    rows = Rows([ROWS[:4], ROWS[4:5], ROWS[5:]])
    positions = np.random.default_rng(1).integers(0, 10, 50)
    np.testing.assert_array_equal(rows[positions], ROWS[positions])


def test_the_key_is_of_every_word() -> None:
    whole = about(seed=1, view={"shift": 0.05})
    others = [about(seed=2, view={"shift": 0.05}), about(seed=1, view={"shift": 0.06}), about(seed=1, view=None)]
    assert len({key_of(each) for each in [whole, *others]}) == 4
    assert key_of(dict(reversed(whole.items()))) == key_of(whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no entry", "other description"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, damage: str) -> None:
    store = store_in(tmp_path)
    write(store, about(), (0, 6, 10))
    entry = store.folder / key_of(about())
    part = entry / "part-00001"
    if damage == "flip":
        content = bytearray(part.read_bytes())
        content[17] ^= 1
        part.write_bytes(content)
    elif damage == "truncate":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "missing":
        part.unlink()
    elif damage == "no entry":
        (entry / "entry.json").unlink()
    else:
        told = json.loads((entry / "entry.json").read_text())
        told["description"]["number"] = 5
        (entry / "entry.json").write_text(json.dumps(told))
    assert store.find(about()) is None
    write(store, about())  # over what is left of it
    assert store.find(about()) is not None


def test_a_stopped_write_leaves_nothing_to_find(tmp_path: Path) -> None:
    store = store_in(tmp_path)

    def stopped() -> None:
        with store.computing([about()]):
            store.begin(about(), ROWS.nbytes)
            with store.part(about(), 0, SHAPE, "float32") as part:
                part.append(ROWS[:5])
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert store.find(about()) is None
    assert len(list(store.folder.glob("*.work"))) == 1
    write(store, about(1))  # another entry: what was abandoned takes no room for ever
    assert not list(store.folder.glob("*.work"))
    with store.computing([about(2)]):
        store.begin(about(2), ROWS.nbytes)
        write(store, about())
        assert len(list(store.folder.glob("*.work"))) == 1, "what is being computed stays"
    assert store.find(about()) is not None


def test_values_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.folder.mkdir()
    with store.computing([about()]):
        store.begin(about(), 100)
        with pytest.raises(OverflowError, match="float16"), store.part(about(), 0, (1,), "float16") as part:
            part.append(np.array([[1e6]], np.float32))


def use(folder: Path, found: "multiprocessing.Queue[bool]", done: "multiprocessing.Event") -> None:  # type: ignore[valid-type]
    rows = FeatureStore(folder, 1 << 30).find(about(0))
    found.put(rows is not None)
    done.wait(LIMIT_S)  # type: ignore[attr-defined]


def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for number in range(3):
        write(store, about(number))
        os.utime(store.folder / key_of(about(number)) / "entry.json", (number, number))
    context = multiprocessing.get_context("spawn")
    found, done = context.Queue(), context.Event()
    other = context.Process(target=use, args=(store.folder, found, done))
    other.start()
    try:
        assert found.get(timeout=LIMIT_S)  # the oldest is in use, in another process, and so is the newest now
        os.utime(store.folder / key_of(about(0)) / "entry.json", (0, 0))
        size = sum(path.stat().st_size for path in (store.folder / key_of(about(0))).iterdir())
        small = FeatureStore(store.folder, 3 * size)
        assert small.fits(2 * size)
        assert not small.fits(4 * size)
        write(small, about(3))
        assert [small.has(about(number)) for number in range(4)] == [True, False, True, True]
    finally:
        done.set()
        other.join(LIMIT_S)


def test_an_entry_is_held_until_its_store_is_closed_and_read_after_that(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, about(0))
    rows = store.find(about(0))
    assert rows is not None
    size = sum(path.stat().st_size for path in (store.folder / key_of(about(0))).iterdir())
    other = FeatureStore(store.folder, size)
    write(other, about(1))
    assert other.has(about(0)), "it was in use"
    store.close()
    write(other, about(2))
    assert [other.has(about(number)) for number in range(3)] == [False, False, True]
    np.testing.assert_array_equal(rows[np.arange(10)], ROWS)


def test_a_disk_that_is_too_full_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"features\.folder .* GB free, but 1000000000\.000 GB are needed"),
        store_in(tmp_path).computing([about()]),
    ):
        store_in(tmp_path).begin(about(), 10**18)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError, match=r"features\.folder .*store.*features\.cache=off"):
        store_in(tmp_path).fits(1)
    with pytest.raises(UserError, match=r"features\.folder"):
        write(store_in(tmp_path), about())


def test_an_entry_that_another_process_removes_is_gone_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that make room at once walk the same list."""
    store = store_in(tmp_path)
    for number in range(2):
        write(store, about(number))
    entries = store._cache.entries()
    assert len(entries) == 2
    shutil.rmtree(entries[0])
    monkeypatch.setattr(DiskCache, "entries", lambda _cache: entries)
    assert store.fits(1)
    small = FeatureStore(store.folder, 1)
    with small.computing([about(3)]):
        small.begin(about(3), 1)
    assert not entries[1].exists()


def test_a_lock_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with (
        store.computing([about()]),
        pytest.raises(TimeoutError),
        FeatureStore(store.folder, 1).computing([about()], 0.1),
    ):
        pytest.fail("two at once")
    with store.computing([about()], 0.1):
        pass
