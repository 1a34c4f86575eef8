"""How many shards a split has, which records each holds, and what they are called. Pure.

Everything depends on the dataset alone, never on the workers that write it: the same source gives the same
files on any machine. Readers find a record by its offset, so shards need not match the number of workers;
they are a unit of copying and checking. Hence about 128 MiB each (the size that TensorFlow's input guide
recommends is 100 MB and more), and four at least, so that a small dataset too is written and copied in
parallel, but no empty shard.
"""

import re

TARGET_SHARD_BYTES = 128 * 1024 * 1024
MIN_SHARDS = 4
DATASET_NAME = "cxr"

_NAME = re.compile(rf"{DATASET_NAME}-(?P<split>[a-z]+)\.tfrecord-(?P<number>\d{{5,}})-of-(?P<count>\d{{5,}})")


def shard_count(records: int, total_bytes: int) -> int:
    """Shards for a split of `records` records whose encoded images take `total_bytes` bytes."""
    if records < 0 or total_bytes < 0:
        raise ValueError(f"records and total_bytes must not be negative, not {records} and {total_bytes}")
    by_size = -(-total_bytes // TARGET_SHARD_BYTES)
    return min(records, max(by_size, MIN_SHARDS))


def shard_bounds(records: int, shards: int) -> list[tuple[int, int]]:
    """Half-open ranges of records, one a shard: contiguous, and no two sizes differ by more than one."""
    if not 0 <= shards <= records or (shards == 0) != (records == 0):
        raise ValueError(f"{records} records cannot fill {shards} shards")
    return [(records * i // shards, records * (i + 1) // shards) for i in range(shards)]


def shard_name(split: str, number: int, count: int) -> str:
    """File name in the form that TensorFlow Datasets reads: `cxr-train.tfrecord-00000-of-00004`."""
    if not 0 <= number < count:
        raise ValueError(f"no shard {number} of {count}")
    return f"{DATASET_NAME}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is one of ours."""
    return _NAME.fullmatch(name) is not None
