"""The checksum of a whole file."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tfrecords_builder.common import seal

CONTENTS = [seal.UNSEALED, f"before {seal.UNSEALED}", f"{seal.UNSEALED} behind", f"{seal.UNSEALED}, {seal.UNSEALED} x"]


def sealed(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    with path.open("r+b") as file:
        seal.seal(file)
    return path


@pytest.mark.parametrize("content", CONTENTS)
def test_every_bit_counts(tmp_path: Path, content: str) -> None:
    path = sealed(tmp_path / "file", content.encode())
    seal.check_seal(path)
    whole = path.read_bytes()
    assert len(whole) == len(content)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="its checksum does not match"):
            seal.check_seal(path)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_the_checksum_is_the_same_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    noise = np.random.default_rng(0).bytes(500)
    path = sealed(tmp_path / "file", noise + seal.UNSEALED.encode() + noise)
    monkeypatch.setattr(seal, "_CHUNK", chunk)
    seal.check_seal(path)


def test_what_is_cut_off_or_was_never_sealed(tmp_path: Path) -> None:
    path = sealed(tmp_path / "file", f"content {seal.UNSEALED} more".encode())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checksum|empty"):
            seal.check_seal(path)
    with path.open("r+b") as file, pytest.raises(ValueError, match="no place"):
        seal.seal(file)


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"text": f"{seal.UNSEALED} é"}}
    path = tmp_path / "value.json"
    path.write_bytes(seal.sealed_json(value))
    assert seal.read_sealed_json(path) == value
    assert json.loads(path.read_text()).keys() == {"a", "b", "seal"}
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="checksum"):
        seal.read_sealed_json(path)


def test_a_sealed_zip_is_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name", b"content")
        archive.comment = seal.UNSEALED.encode()
    with path.open("r+b") as file:
        seal.seal(file)
    seal.check_seal(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("name") == b"content"
