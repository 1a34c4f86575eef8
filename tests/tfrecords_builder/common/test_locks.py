"""Locks hold between processes, of this machine and of those that share a file system, and no lock file does harm."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from cxr_dist.features.store import FeatureStore
from cxr_dist.runs import run_folder
from cxr_dist.tuning.shared_stages import FirstStages
from tfrecords_builder import remote
from tfrecords_builder.common import locks
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.writing import output_folder

ROOT = Path(__file__).parents[3]
LIMIT_S = 300.0
HOLDER = """
import sys
from pathlib import Path
from tfrecords_builder.common import locks

path, kind = Path(sys.argv[1]), sys.argv[2]
with locks.held_folder(path, "busy") if kind == "folder" else locks.held(path, shared=kind == "shared") as held:
    print(kind == "folder" or held is not None, flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that takes a lock, and gives it up when the block ends, or when it is killed."""

    def __init__(self, path: Path, kind: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(path), kind]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        self.has_it = self.process.stdout.readline() == "True\n"

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize("theirs", ["shared", "exclusive"])
@pytest.mark.parametrize("ours", ["shared", "exclusive"])
def test_two_processes(tmp_path: Path, theirs: str, ours: str) -> None:
    path = tmp_path / "lock"
    with Holder(path, theirs) as holder:
        assert holder.has_it
        with locks.held(path, shared=ours == "shared") as held:
            assert (held is not None) == (theirs == ours == "shared")
        assert locks.acquire(path, wait_s=0.01) is None
    with locks.held(path) as held:
        assert held is not None


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = Holder(path, "exclusive")
    assert holder.process.stdin is not None
    threading.Timer(0.1, holder.process.kill).start()  # and a killed process holds nothing
    descriptor = locks.acquire(path, wait_s=LIMIT_S)
    assert descriptor is not None
    os.close(descriptor)
    assert holder.process.wait(LIMIT_S) != 0
    holder.process.stdin.close()


def test_a_folder_is_held_and_its_lock_file_goes(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with Holder(folder, "folder") as holder:
        assert holder.has_it
        with pytest.raises(UserError, match=f"^{folder}: busy here$"), locks.held_folder(folder, "busy here"):
            pass
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert locks.is_empty(folder)
    assert not folder.exists(), "it was made, and nothing was put in"
    assert folder.parent.exists()
    with locks.held_folder(folder, "busy"):
        (folder / "file").write_text("")
        assert not locks.is_empty(folder)
    assert [path.name for path in folder.iterdir()] == ["file"]
    folder = tmp_path / "empty"
    folder.mkdir()
    with locks.held_folder(folder, "busy"):
        pass
    assert folder.exists(), "it was there before"


def test_a_killed_process_leaves_a_lock_file_that_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    holder = Holder(folder, "folder")
    holder.process.kill()
    holder.process.communicate(timeout=LIMIT_S)
    assert (folder / LOCK).exists()
    with locks.held_folder(folder, "busy"):
        pass
    assert not (folder / LOCK).exists()


def test_a_lock_file_that_is_removed_meanwhile_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes the file between our opening and our locking it, and a third process makes another one."""
    path = tmp_path / "lock"
    third: list[int] = []
    flock = fcntl.flock

    def removed_first(descriptor: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        third.append(os.open(path, os.O_RDWR | os.O_CREAT))
        flock(third[0], fcntl.LOCK_EX)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    assert locks.acquire(path) is None, "the third process holds it"
    os.close(third[0])
    with locks.held(path) as held:
        assert held is not None
        assert os.path.samestat(os.fstat(held), path.stat())


def test_many_processes_take_turns_in_a_folder_that_comes_and_goes(tmp_path: Path) -> None:
    folder, inside, most = tmp_path / "folder", 0, 0
    counting = threading.Lock()

    def use() -> None:
        nonlocal inside, most
        until, done = time.monotonic() + LIMIT_S, 0
        while done < 50:
            assert time.monotonic() < until
            try:
                with locks.held_folder(folder, "busy"):
                    with counting:
                        inside, most = inside + 1, max(most, inside + 1)
                    time.sleep(0)
                    with counting:
                        inside -= 1
                    done += 1
            except UserError:
                continue

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(use) for _ in range(4)]:
            future.result()
    assert most == 1
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for hold in USERS.values():
        with pytest.raises(UserError, match=r"this file system has no locks .*-o flock") as caught:
            hold(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("writable", [False, True])
def test_a_lock_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    """In a folder that may not be written nothing can be changed; in another one the file is somebody else's."""

    def not_permitted(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # the superuser would not get it

    monkeypatch.setattr(locks, "acquire", not_permitted)
    monkeypatch.setattr(os, "access", lambda *_: writable)
    if writable:
        with pytest.raises(UserError, match=f"{LOCK}: belongs to another user; remove"):
            output_folder.locked_folder(tmp_path).__enter__()
    else:
        with locks.held_folder(tmp_path, "busy"):
            assert list(tmp_path.iterdir()) == []


def hold_run(folder: Path) -> None:
    with run_folder.locked(folder / "run"):
        pass


def hold_dataset(folder: Path) -> None:
    with output_folder.locked_folder(folder / "dataset"):
        pass


def hold_stage(folder: Path) -> None:
    for shared in (False, True):
        with remote._lock(folder / "stage" / "one", shared=shared) as held:
            assert held


def hold_first_stage(folder: Path) -> None:
    with FirstStages(folder / "shared").used_by(folder / "run", "key"):
        pass


def hold_features(folder: Path) -> None:
    store, about = FeatureStore(folder / "store", 1 << 20), {"number": 0}
    with store.computing([about]):
        store.begin(about, 4)
        with store.part(about, 0, (1,), "float32"):
            pass
        store.commit(about, 1, (1,), "float32")
    store.find(about)
    store.fits(1)


USERS: dict[str, Callable[[Path], None]] = {
    "run": hold_run,
    "dataset": hold_dataset,
    "stage": hold_stage,
    "first stage": hold_first_stage,
    "features": hold_features,
}


@pytest.mark.parametrize("user", USERS)
def test_every_lock_is_one_that_holds_between_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    """NFS makes a byte-range lock of it: of a regular file, open for writing, or for reading if the lock is shared."""
    kinds: list[int] = []
    flock = fcntl.flock

    def checked(descriptor: int, kind: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode), "a file"
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        assert access == os.O_RDWR or (kind & fcntl.LOCK_SH and access == os.O_RDONLY)
        kinds.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", checked)
    USERS[user](tmp_path)
    assert kinds


def test_no_other_module_locks() -> None:
    for package in ("cxr_dist", "tfrecords_builder"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "locks.py" or "fcntl" not in path.read_text(), path
