import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import Manifest, read_manifest, write_manifest
from tfrecords_builder.format.manifest_rows import Row
from tfrecords_builder.format.record import Record, decode_example, encode_example
from tfrecords_builder.format.tfrecord import CorruptRecordError, RecordWriter, scan
from tfrecords_builder.verify import verify_dataset

SHARD = "cxr-train.tfrecord-00001-of-00004"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def rewrite(dataset: Path, change: Callable[[list[Record]], list[Record]]) -> None:
    """Write a shard anew, with good checksums, and tell the manifest its new size and SHA-256."""
    path = dataset / SHARD
    records = change([decode_example(payload) for _, payload in scan(path)])
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(encode_example(image=record.image, label=record.label, path=record.path, index=record.index))
    manifest = read_manifest(dataset)
    shards = tuple(
        replace(shard, bytes=writer.bytes_written, sha256=writer.sha256) if shard.name == SHARD else shard
        for shard in manifest.shards
    )
    write_manifest(dataset, replace(manifest, shards=shards))


def test_a_whole_dataset(built: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = verify_dataset(built, progress=lambda done, total: calls.append((done, total)))
    total = sum(COUNTS.values())
    assert (summary.records, summary.shards, summary.rejected) == (total, 12, 0)
    assert sum(sum(by_class.values()) for by_class in summary.counts.values()) == total
    assert summary.bytes == sum(path.stat().st_size for path in built.glob("cxr-*"))
    assert calls[-1] == (total, total)


def test_every_random_flip_is_found_and_named(copy: Path) -> None:
    shards = sorted(copy.glob("cxr-*"))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        path = shards[rng.integers(len(shards))]
        data = path.read_bytes()
        offsets = [offset for offset, _ in scan(path)]
        damaged = bytearray(data)
        position = int(rng.integers(len(data)))
        damaged[position] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(CorruptRecordError) as caught:
            verify_dataset(copy)
        victim = max(i for i, offset in enumerate(offsets) if offset <= position)
        assert (caught.value.shard, caught.value.record) == (str(path), victim)
        path.write_bytes(data)
    verify_dataset(copy)


def test_missing_extra_and_truncated_shards(copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{SHARD}: has .* bytes"):
        verify_dataset(copy)
    (copy / SHARD).unlink()
    with pytest.raises(UserError, match=f"{SHARD}: this shard is missing"):
        verify_dataset(copy)
    (copy / SHARD).write_bytes(data)
    extra = copy / "cxr-train.tfrecord-00004-of-00005"
    shutil.copy(copy / SHARD, extra)
    with pytest.raises(UserError, match=f"{extra.name}: this shard is not in the manifest"):
        verify_dataset(copy)


def swap(records: list[Record], **changes: object) -> list[Record]:
    return [records[0], replace(records[1], **changes), *records[2:]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda records: swap(records, label=(records[1].label + 1) % 3),
        lambda records: swap(records, path=records[0].path),
        lambda records: swap(records, index=records[0].index),
        lambda records: swap(records, image=records[1].image[:-1]),
        lambda records: [records[0], records[2], records[1], *records[3:]],
    ],
    ids=["label", "path", "index", "image size", "order"],
)
def test_a_wrong_record_with_good_checksums(copy: Path, change: Callable[[list[Record]], list[Record]]) -> None:
    rewrite(copy, change)
    with pytest.raises(CorruptRecordError, match=f"{SHARD}: record 1 at byte"):
        verify_dataset(copy)


def test_another_image_with_good_checksums(copy: Path) -> None:
    """Only the shard's SHA-256 in the manifest can tell."""
    manifest = read_manifest(copy)
    rewrite(copy, lambda records: swap(records, image=records[0].image))
    write_manifest(copy, manifest)
    with pytest.raises(UserError, match=f"{SHARD}: is not the file that was built"):
        verify_dataset(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The manifest then has a row that lies behind the end of its shard.
        (lambda records: records[:-1], "manifest.parquet: is damaged"),
        (lambda records: [*records, records[-1]], SHARD),
    ],
    ids=["lost", "repeated"],
)
def test_lost_and_repeated_records(copy: Path, change: Callable[[list[Record]], list[Record]], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(UserError, match=message):
        verify_dataset(copy)


def edit_row(manifest: Manifest, **changes: object) -> Manifest:
    first: Row = replace(manifest.rows[0], **changes)  # type: ignore[arg-type]
    return replace(manifest, rows=(first, *manifest.rows[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: edit_row(m, label=1), "label of .* is not that of its class"),
        (lambda m: edit_row(m, label=3), "label of .* is not that of its class"),
        (lambda m: edit_row(m, class_name="Normal", label=1), "fingerprint"),
        (lambda m: edit_row(m, sha256="0" * 64), "fingerprint"),
        (lambda m: edit_row(m, split=None), "contradicts its status"),
        (lambda m: edit_row(m, status="rejected"), "contradicts its status"),
        (lambda m: edit_row(m, split="test" if m.rows[0].split != "test" else "train"), "record . at byte"),
        (lambda m: edit_row(m, offset=1), "record . at byte"),
        (lambda m: edit_row(m, length=1), "record . at byte"),
        (lambda m: edit_row(m, shard="elsewhere"), "is damaged"),
        (lambda m: replace(m, shards=m.shards[1:]), "is damaged"),
        (lambda m: replace(m, rows=m.rows[1:]), "fingerprint"),
        (lambda m: replace(m, fingerprint="0" * 64), "fingerprint"),
        (lambda m: replace(m, class_names=m.class_names[::-1]), "fingerprint"),
    ],
)
def test_a_manifest_that_contradicts(copy: Path, change: Callable[[Manifest], Manifest], message: str) -> None:
    write_manifest(copy, change(read_manifest(copy)))
    with pytest.raises(UserError, match=message):
        verify_dataset(copy)
