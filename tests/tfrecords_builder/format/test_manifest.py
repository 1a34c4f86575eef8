import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format import manifest as manifest_module
from tfrecords_builder.format.manifest import (
    MANIFEST_NAME,
    Settings,
    check_shards,
    compute_fingerprint,
    read_manifest,
    write_manifest,
)
from tfrecords_builder.splitting.splits import SPLITS, split_sizes

PROMISED = {
    *("path", "class_name", "label", "split", "group", "sha256"),
    *("width", "height", "status", "reason", "shard", "index"),
}


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_round_trip(built: Path, tmp_path: Path) -> None:
    manifest = read_manifest(built)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_columns_for_other_readers(built: Path) -> None:
    table = pq.read_table(built / MANIFEST_NAME)
    assert set(table.column_names) >= PROMISED
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert all(row["group"] == row["path"] and row["status"] == "ok" and row["reason"] is None for row in rows)
    assert {(row["width"], row["height"]) for row in rows} == {(20, 20)}


def test_whole_dataset(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.class_names == ("COVID", "Normal", "Viral_Pneumonia")
    assert (manifest.image_size, manifest.encoding, manifest.settings.seed) == (16, "raw", 0)
    assert manifest.rejected == []
    assert manifest.counts == {
        split: {name.replace(" ", "_"): split_sizes(count)[split] for name, count in COUNTS.items()} for split in SPLITS
    }


@pytest.mark.parametrize("split", SPLITS)
def test_split_index(built: Path, split: str) -> None:
    manifest = read_manifest(built)
    index = manifest.split(split)
    rows = {row.path: row for row in manifest.rows if row.split == split}
    assert len(index) == len(rows) == sum(shard.records for shard in manifest.shards if shard.split == split)
    assert set(index.paths) == rows.keys()
    assert (index.labels.dtype, index.shard.dtype, index.offset.dtype, index.length.dtype) == (
        *[np.int32] * 2,
        *[np.int64] * 2,
    )
    for i, path in enumerate(index.paths):
        row = rows[path]
        assert row.label == index.labels[i]
        assert row.shard == index.shard_names[index.shard[i]]
        assert (row.offset, row.length) == (index.offset[i], index.length[i])
    places = list(zip(index.shard.tolist(), index.offset.tolist(), strict=True))
    assert places == sorted(places)


def test_unknown_split(built: Path) -> None:
    with pytest.raises(UserError, match="unknown split 'val'; known: train, validation, test"):
        read_manifest(built).split("val")


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset folder"):
        read_manifest(tmp_path / "missing")
    with pytest.raises(UserError, match="not a complete dataset"):
        read_manifest(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / MANIFEST_NAME)
    with pytest.raises(UserError, match="not the manifest of a dataset"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


def test_another_format_version(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(copy)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT_VERSION", 99)
        write_manifest(copy, manifest)
    with pytest.raises(UserError, match=f"format version 99, but version {manifest_module.FORMAT_VERSION} is needed;"):
        read_manifest(copy)


def test_damage_is_found(copy: Path) -> None:
    path = copy / MANIFEST_NAME
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(data), 250, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read_manifest(copy)
    for length in rng.choice(len(data), 30, replace=False):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_manifest(copy)


def test_check_shards(copy: Path) -> None:
    manifest = read_manifest(copy)
    check_shards(copy, manifest)
    shard = copy / manifest.shards[3].name
    data = shard.read_bytes()
    for other in (data[:-1], data + b"x"):
        shard.write_bytes(other)
        with pytest.raises(UserError, match=f"{shard.name}: has .* bytes, but"):
            check_shards(copy, manifest)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard is missing"):
        check_shards(copy, manifest)


def test_a_failed_write_keeps_the_manifest_and_leaves_no_part(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(copy)
    names = sorted(path.name for path in copy.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(manifest_module.pq, "write_table", fail)
    with pytest.raises(OSError, match="disk"):
        write_manifest(copy, replace(manifest, fingerprint="other"))
    assert read_manifest(copy) == manifest
    assert sorted(path.name for path in copy.iterdir()) == names


def test_fingerprint_depends_on_everything() -> None:
    settings = Settings(image_size=16, encoding="raw", seed=0, split_rule="r", conflicts="keep")
    sources = [("a", "A", "00", None), ("b", "B", "11", "22"), ("c", "B", None, None)]
    same = compute_fingerprint(settings, ["A", "B"], sources)
    assert compute_fingerprint(settings, ("A", "B"), sources[::-1]) == same
    others = [
        compute_fingerprint(replace(settings, **{name: f"{value}x"}), ["A", "B"], sources)
        for name, value in asdict(settings).items()
    ]
    others += [
        compute_fingerprint(settings, ["B", "A"], sources),
        compute_fingerprint(settings, ["A", "B"], sources[1:]),
        compute_fingerprint(settings, ["A", "B"], [("a", "A", "00", "22"), *sources[1:]]),
        compute_fingerprint(settings, ["A", "B"], [("a", "A", "01", None), *sources[1:]]),
        compute_fingerprint(settings, ["A", "B"], [("a", "B", "00", None), *sources[1:]]),
        compute_fingerprint(settings, ["A", "B"], [("d", "A", "00", None), *sources[1:]]),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_a_split_is_read_from_columns_alone(dataset: Path) -> None:
    """What training reads of a large dataset: no object for each image, and the same as from such objects."""
    manifest = read_manifest(dataset)
    found = {name: manifest.split(name) for name in SPLITS}
    assert "_rows" not in vars(manifest.rows)
    of_rows = replace(manifest, rows=tuple(manifest.rows))
    assert of_rows == manifest
    for name in SPLITS:
        rows = [row for row in manifest.rows if row.split == name]
        index, again = found[name], of_rows.split(name)
        assert index.paths == again.paths
        assert sorted(index.paths) == sorted(row.path for row in rows)
        by_path = {row.path: row for row in rows}
        for position, path in enumerate(index.paths):
            row = by_path[path]
            assert index.shard_names[index.shard[position]] == row.shard
            assert (index.offset[position], index.length[position]) == (row.offset, row.length)
            assert index.labels[position] == again.labels[position] == row.label
        places = list(zip(index.shard, index.offset, strict=True))
        assert places == sorted(places)
