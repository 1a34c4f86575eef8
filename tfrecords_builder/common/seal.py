"""A checksum of a whole file, inside the file: no bit of it changes unseen.

Formats such as Parquet and zip guard their content but not their own directories. A file is written with `UNSEALED`
somewhere in it (a metadata value, a comment, a JSON string); sealing puts the CRC-32C of all bytes in place of the
zeros. It finds damage, not forgery: whoever means to change a file can compute the checksum too.
"""

import json
import mmap
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import google_crc32c

_MARK = b"cxr-dist-crc32c="
_ZEROS = b"0" * 8
UNSEALED = (_MARK + _ZEROS).decode()
"""What a file holds once before it is sealed."""

_CHUNK = 1 << 24


def seal(file: IO[bytes]) -> None:
    """Put the checksum into a file that is open for reading and writing.

    Raises:
        ValueError: it does not hold `UNSEALED`.
    """
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.rfind(UNSEALED.encode())
        if at < 0:
            raise ValueError("there is no place for the checksum")
        crc = _crc(data, at + len(_MARK))
    os.pwrite(file.fileno(), b"%08x" % crc, at + len(_MARK))


def seal_zip(path: Path) -> None:
    """Put a checksum of the whole into the comment of a zip file."""
    with path.open("r+b") as file:
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = UNSEALED.encode()
        seal(file)


def check_seal(path: Path) -> None:
    """Compare a file's bytes with its checksum.

    Raises:
        ValueError: they differ, or the file was not sealed.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(data)


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object with the checksum of its text as `seal`."""
    text = json.dumps({**value, "seal": UNSEALED}, allow_nan=False).encode()
    at = text.rindex(_MARK) + len(_MARK)
    return text[:at] + b"%08x" % _crc(text, at) + text[at + len(_ZEROS) :]


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `sealed_json` made of a value.

    Raises:
        ValueError: its checksum does not match, or it is no such file.
        OSError: the file cannot be read.
    """
    text = path.read_bytes()
    _check(text)
    value: dict[str, Any] = json.loads(text)
    del value["seal"]
    return value


def _check(data: "bytes | mmap.mmap") -> None:
    at = data.rfind(_MARK) + len(_MARK)
    if at < len(_MARK) or data[at : at + len(_ZEROS)] != b"%08x" % _crc(data, at):
        raise ValueError("its checksum does not match")


def _crc(data: "bytes | mmap.mmap", at: int) -> int:
    """CRC-32C of the bytes, with zeros for the eight at `at`."""
    crc = google_crc32c.extend(_crc_of(data, 0, 0, at), _ZEROS)
    return _crc_of(data, crc, at + len(_ZEROS), len(data))


def _crc_of(data: "bytes | mmap.mmap", crc: int, first: int, last: int) -> int:
    for start in range(first, last, _CHUNK):
        crc = google_crc32c.extend(crc, data[start : min(start + _CHUNK, last)])
    return crc
