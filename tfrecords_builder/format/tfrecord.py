"""TFRecord framing: how records lie in a shard. Knows nothing of what a record means.

A record is its length (uint64, little-endian), the masked CRC-32C of those 8 bytes, the payload, and the
masked CRC-32C of the payload; a shard is records and nothing else. Source:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import google_crc32c

from tfrecords_builder.common.errors import UserError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
FRAME_BYTES = _HEADER.size + _FOOTER.size
"""What framing adds to a payload."""

_crc32c = google_crc32c.value
_LENGTH = struct.Struct("<Q")


class CorruptRecordError(UserError):
    """A record that is not what was written.

    Attributes:
        shard: The file, or what is known of it.
        record: Its number in the shard, counted from 0; None when only its offset is known.
        offset: The byte at which its frame begins.
        reason: What is wrong.
    """

    def __init__(self, shard: Path | str, record: int | None, offset: int, reason: str) -> None:
        super().__init__(shard, record, offset, reason)
        self.shard = str(shard)
        self.record = record
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        which = "the record" if self.record is None else f"record {self.record}"
        return f"{self.shard}: {which} at byte {self.offset}: {self.reason}; restore the file, or rebuild the dataset"


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data`, rotated and offset, so that the CRC of data that holds CRCs stays sound."""
    crc: int = _crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class RecordWriter:
    """Writes the records of one shard to `file`; knows their size and SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.bytes_written = 0

    def write(self, payload: bytes) -> int:
        """Append a record; the byte offset at which its frame begins."""
        offset = self.bytes_written
        length = _LENGTH.pack(len(payload))
        frame = b"".join(
            (length, _FOOTER.pack(masked_crc(length)), payload, _FOOTER.pack(masked_crc(payload))),
        )
        self._file.write(frame)
        self._sha256.update(frame)
        self.bytes_written += len(frame)
        return offset

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of what was written so far."""
        return self._sha256.hexdigest()


def scan(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every record of a shard in order, as (offset of its frame in bytes, payload).

    Raises:
        CorruptRecordError: A CRC differs or the shard ends inside a record. Records before it are yielded.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=1 << 20) as file:
        offset = 0
        number = 0
        while offset < size:
            header = file.read(HEADER_BYTES)
            length = _payload_length(header, path, number, offset)
            # Checked before the read: a length that is wrong must not ask for its memory.
            if offset + FRAME_BYTES + length > size:
                raise CorruptRecordError(path, number, offset, "the shard ends inside the record")
            payload = file.read(length)
            footer = file.read(_FOOTER.size)
            _check_payload(payload, footer, path, number, offset)
            yield offset, payload
            offset += FRAME_BYTES + length
            number += 1


def read_at(fd: int, offset: int, length: int, shard: Path | str = "shard") -> bytes:
    """One payload by its place, in one system call; safe to call from several threads on one descriptor.

    Args:
        fd: A descriptor of the shard, open for reading.
        offset: Byte at which the record's frame begins.
        length: Payload length in bytes.
        shard: Named in errors only.

    Raises:
        CorruptRecordError: What lies there is not a whole record of that length with good CRCs.
    """
    return _payload(os.pread(fd, length + FRAME_BYTES, offset), offset, length, shard)


def read_run(fd: int, places: Sequence[tuple[int, int]], shard: Path | str = "shard") -> Iterator[bytes]:
    """The payloads of records that lie one behind another, or nearly so, in one system call: as `read_at` otherwise.

    Args:
        fd: A descriptor of the shard, open for reading.
        places: Offset and payload length of each, by rising offset.
        shard: Named in errors only.
    """
    first, (last, length) = places[0][0], places[-1]
    run = memoryview(os.pread(fd, last + length + FRAME_BYTES - first, first))
    for offset, length in places:
        start = offset - first
        yield _payload(run[start : start + length + FRAME_BYTES], offset, length, shard)


def _payload(frame: bytes | memoryview, offset: int, length: int, shard: Path | str) -> bytes:
    """The one copy that is made of a record: a view would do, but the checksum asks for bytes."""
    if len(frame) != length + FRAME_BYTES:
        raise CorruptRecordError(shard, None, offset, "the shard ends inside the record")
    found = _payload_length(bytes(frame[:HEADER_BYTES]), shard, None, offset)
    if found != length:
        raise CorruptRecordError(shard, None, offset, f"it is {found} bytes long where the manifest says {length}")
    payload = bytes(frame[HEADER_BYTES:-4])
    _check_payload(payload, bytes(frame[-4:]), shard, None, offset)
    return payload


def _payload_length(header: bytes, shard: Path | str, record: int | None, offset: int) -> int:
    if len(header) != HEADER_BYTES:
        raise CorruptRecordError(shard, record, offset, "the shard ends inside the record")
    length: int
    length, crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != crc:
        raise CorruptRecordError(shard, record, offset, "the checksum of its length does not match")
    return length


def _check_payload(payload: bytes, footer: bytes, shard: Path | str, record: int | None, offset: int) -> None:
    # The two equal only when both are whole: a short read fails here too.
    if len(footer) != _FOOTER.size or masked_crc(payload) != _FOOTER.unpack(footer)[0]:
        raise CorruptRecordError(shard, record, offset, "the checksum of its content does not match")
