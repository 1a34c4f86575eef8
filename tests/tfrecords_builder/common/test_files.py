"""Files are whole or not there, whatever fails on the way."""

import errno
import json
import math
import os
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

from tfrecords_builder.common import files

OLD, NEW = b"old content", b"new content " * 1000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_arguments: object, **_options: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullAfter:
    """A file on a disk that takes `room` more bytes; it keeps what fitted, as a real one does."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        fits = data[: self._room]
        self._file.write(fits)
        self._room -= len(fits)
        if len(fits) < len(data):
            full_disk()
        return len(data)


def test_content_and_name(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    files.write_bytes(path, OLD)
    assert path.read_bytes() == OLD
    files.write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert names(path.parent) == ["file.bin"]
    files.write_text(path, "Röntgen\n")
    assert path.read_bytes() == "Röntgen\n".encode()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_bytes(tmp_path / "a" / "ours", OLD)
        (tmp_path / "theirs").write_bytes(OLD)
        files.write_bytes(tmp_path / "theirs-replaced", OLD)
    finally:
        os.umask(before)
    plain = (tmp_path / "theirs").stat().st_mode
    assert [(tmp_path / name).stat().st_mode for name in ("a/ours", "theirs-replaced")] == [plain, plain]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_umask_of_other_threads_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("it belongs to the whole process"))
    files.write_bytes(tmp_path / "file", OLD)


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    path = tmp_path / "file.bin"
    if existing:
        path.write_bytes(OLD)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    elif step == "replace":
        monkeypatch.setattr(Path, "replace", full_disk)

    def write(file: IO[bytes]) -> None:
        (FullAfter(file, 100) if step == "write" else file).write(NEW)

    with pytest.raises(OSError, match="No space left") as caught:
        files.write_atomically(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert str(files.disk_error(caught.value)).startswith(f"{path}: No space left"), "which file, although none said so"
    assert names(tmp_path) == (["file.bin"] if existing else [])
    if existing:
        assert path.read_bytes() == OLD


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_the_writer_raises_goes_through(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)

    def write(file: IO[bytes]) -> None:
        file.write(NEW)
        raise error

    with pytest.raises(error):
        files.write_atomically(path, write)
    assert names(tmp_path) == ["file.bin"]
    assert path.read_bytes() == OLD


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    path = tmp_path / "file.bin"
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")  # noqa: PTH112
        if events[-1] == "sync file":
            assert os.fstat(descriptor).st_size == len(NEW), "flushed before it is synced"
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    files.write_bytes(path, NEW)
    assert events == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1.0, -math.inf]}])
def test_json_has_no_number_that_is_not_finite(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1, "b": [None, True]})
    assert json.loads(path.read_text()) == {"a": 1, "b": [None, True]}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, value)
    assert path.read_bytes() == before
