import os
from pathlib import Path

import pytest
import tensorflow as tf
from hypothesis import given, strategies as st

from tfrecords_builder.format.tfrecord import (
    FRAME_BYTES,
    CorruptRecordError,
    RecordWriter,
    masked_crc,
    read_at,
    read_run,
    scan,
)

PAYLOADS = [b"", b"a", b"\x00" * 1000, bytes(range(256)) * 7]


def write(path: Path, payloads: list[bytes]) -> list[int]:
    with path.open("wb") as file:
        writer = RecordWriter(file)
        return [writer.write(payload) for payload in payloads]


def crc32c_bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.binary(max_size=64))
def test_masked_crc_against_the_definition(data: bytes) -> None:
    crc = crc32c_bit_by_bit(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    assert masked_crc(data) == (rotated + 0xA282EAD8) % 2**32


def test_same_bytes_as_tensorflow(tmp_path: Path) -> None:
    write(tmp_path / "ours", PAYLOADS)
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for payload in PAYLOADS:
            writer.write(payload)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    offsets = write(path, PAYLOADS)
    assert list(scan(path)) == list(zip(offsets, PAYLOADS, strict=True))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, payload in reversed(list(zip(offsets, PAYLOADS, strict=True))):
            assert read_at(descriptor, offset, len(payload)) == payload
    finally:
        os.close(descriptor)


def test_empty_shard(tmp_path: Path) -> None:
    write(tmp_path / "shard", [])
    assert list(scan(tmp_path / "shard")) == []


def test_every_flipped_byte_is_found_by_both_readers(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    payloads = [b"first", b"second one", b"third"]
    offsets = write(path, payloads)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        victim = max(i for i, offset in enumerate(offsets) if offset <= position)
        with pytest.raises(CorruptRecordError) as caught:
            list(scan(path))
        assert (caught.value.record, caught.value.offset) == (victim, offsets[victim])
        assert str(path) in str(caught.value)
        assert f"record {victim} at byte {offsets[victim]}" in str(caught.value)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for i, payload in enumerate(payloads):
                if i == victim:
                    with pytest.raises(CorruptRecordError, match=f"some-shard: the record at byte {offsets[i]}"):
                        read_at(descriptor, offsets[i], len(payload), "some-shard")
                else:
                    assert read_at(descriptor, offsets[i], len(payload)) == payload
            run = read_run(descriptor, [(o, len(p)) for o, p in zip(offsets, payloads, strict=True)], "some-shard")
            assert [next(run) for _ in range(victim)] == payloads[:victim]
            with pytest.raises(CorruptRecordError, match=f"some-shard: the record at byte {offsets[victim]}"):
                next(run)
        finally:
            os.close(descriptor)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    offsets = write(path, [b"first", b"second"])
    data = path.read_bytes()
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        if length == offsets[1]:
            assert [payload for _, payload in scan(path)] == [b"first"]  # whole, as far as framing can tell
            continue
        with pytest.raises(CorruptRecordError, match="ends inside the record"):
            list(scan(path))


def test_a_huge_length_asks_for_no_memory(tmp_path: Path) -> None:
    """A length with a good checksum that the file cannot hold."""
    path = tmp_path / "shard"
    length = (1 << 60).to_bytes(8, "little")
    path.write_bytes(length + masked_crc(length).to_bytes(4, "little") + b"x" * 100)
    with pytest.raises(CorruptRecordError, match="record 0 at byte 0: the shard ends inside"):
        list(scan(path))


def test_a_run_may_leave_records_out_and_end_early(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    offsets = write(path, PAYLOADS)
    places = [(offset, len(payload)) for offset, payload in zip(offsets, PAYLOADS, strict=True)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert list(read_run(descriptor, places)) == PAYLOADS
        assert list(read_run(descriptor, places[1::2])) == PAYLOADS[1::2]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CorruptRecordError, match=f"at byte {offsets[-1]}: the shard ends inside"):
            list(read_run(descriptor, places))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (0, 6), (1, 5), (5 + FRAME_BYTES, 5), (10_000, 5)])
def test_read_at_the_wrong_place(tmp_path: Path, offset: int, length: int) -> None:
    write(tmp_path / "shard", [b"first"])
    descriptor = os.open(tmp_path / "shard", os.O_RDONLY)
    try:
        with pytest.raises(CorruptRecordError):
            read_at(descriptor, offset, length)
    finally:
        os.close(descriptor)
