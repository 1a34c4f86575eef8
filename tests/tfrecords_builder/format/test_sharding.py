import pytest
from hypothesis import given, strategies as st

from tfrecords_builder.format.sharding import (
    MIN_SHARDS,
    TARGET_SHARD_BYTES,
    is_shard_name,
    shard_bounds,
    shard_count,
    shard_name,
)


@given(st.integers(0, 100_000), st.integers(1, 2_000_000))
def test_count(records: int, bytes_per_record: int) -> None:
    total = records * bytes_per_record
    count = shard_count(records, total)
    assert count <= records
    assert count >= min(records, MIN_SHARDS)
    if count not in (records, MIN_SHARDS):
        # As few as hold the bytes at the target size.
        assert (count - 1) * TARGET_SHARD_BYTES < total <= count * TARGET_SHARD_BYTES


def test_full_database_raw() -> None:
    assert shard_count(14_814, 14_814 * 224 * 224) == 6
    assert shard_count(3_172, 3_172 * 224 * 224) == 4


@given(st.integers(1, 500), st.data())
def test_bounds_partition(records: int, data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, records))
    bounds = shard_bounds(records, shards)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(records))
    sizes = [stop - start for start, stop in bounds]
    assert len(sizes) == shards
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_bounds_refuse_empty_shards() -> None:
    assert shard_bounds(0, 0) == []
    for records, shards in ((3, 4), (0, 1), (3, 0), (3, -1)):
        with pytest.raises(ValueError, match="cannot fill"):
            shard_bounds(records, shards)


def test_names() -> None:
    assert shard_name("train", 0, 4) == "cxr-train.tfrecord-00000-of-00004"
    names = [shard_name(split, i, 12) for split in ("train", "test") for i in range(12)]
    assert names == [name for split in ("train", "test") for name in sorted(n for n in names if split in n)]
    assert all(is_shard_name(name) for name in names)
    for foreign in ("cxr-train.tfrecord", "xcxr-train.tfrecord-00000-of-00004", "cxr-train.tfrecord-00000-of-00004~"):
        assert not is_shard_name(foreign)
    with pytest.raises(ValueError, match="no shard 4 of 4"):
        shard_name("train", 4, 4)
