"""Datasets on a storage that is not this machine's disk: an S3-compatible server, and what can go wrong there."""

import fcntl
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cxr_dist.cli import main
from tfrecords_builder import remote as storage
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.common import object_storage
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import MANIFEST_NAME, read_manifest
from tfrecords_builder.remote import Stage, local_copy, staged_output
from tfrecords_builder.verify import verify_dataset

SIZE = 16
BUCKET = "xrays"
ROOM = 10**6
FAILURES = 3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port of an S3-compatible server."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


class Bucket:
    """What the server holds, seen by another client than ours."""

    def __init__(self, server: str) -> None:
        self._client = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
        self._client.create_bucket(Bucket=BUCKET)
        self.url = f"s3://{BUCKET}/sets/one?scheme=http&endpoint_override={quote(server)}"

    def content(self) -> dict[str, bytes]:
        listed = self._client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        keys = [item["Key"] for item in listed if not item["Key"].endswith("/")]  # Arrow marks folders
        return {key.removeprefix("sets/one/"): self._read(key) for key in keys}

    def _read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"sets/one/{name}", Body=data)

    def remove(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=f"sets/one/{name}")


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    made = Bucket(server)
    yield made
    for name in made.content():
        made.remove(name)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage", ROOM)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(source: Path, bucket: Bucket, stage: Stage, **options: object) -> bool:
    with staged_output(bucket.url, 1000, stage) as folder:
        return build_dataset(source, folder, BuildOptions(image_size=SIZE, workers=1, **options)).reused  # type: ignore[arg-type]


def datasets(stage: Stage) -> list[Path]:
    return sorted(path for path in stage.folder.iterdir() if path.is_dir())


def test_up_and_down_the_bytes_are_those_of_a_local_build(
    source: Path, built: Path, bucket: Bucket, stage: Stage, tmp_path: Path
) -> None:
    assert not put(source, bucket, stage)
    assert bucket.content() == content(built)
    elsewhere = Stage(tmp_path / "elsewhere", ROOM)
    seen: list[tuple[int, int]] = []
    with local_copy(bucket.url, elsewhere, lambda done, total: seen.append((done, total))) as folder:
        assert content(folder) == content(built)
        assert verify_dataset(folder).records == 42
    assert seen[-1] == (42, 42)
    # What was built here need not be fetched, and what was fetched need not be fetched again.
    for known in (stage, elsewhere):
        with local_copy(bucket.url, known, lambda *_: pytest.fail("fetched again")) as folder:
            assert content(folder) == content(built)


def test_a_second_build_from_another_machine_changes_nothing(
    source: Path, bucket: Bucket, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, bucket, stage)
    with monkeypatch.context() as patch:
        patch.setattr(object_storage.StorageFolder, "upload", lambda *_: pytest.fail("sent again"))
        assert put(source, bucket, Stage(tmp_path / "elsewhere", ROOM))


def test_another_dataset_replaces_the_first(source: Path, bucket: Bucket, stage: Stage, tmp_path: Path) -> None:
    put(source, bucket, stage)
    before = bucket.content()
    with local_copy(bucket.url, stage) as held:
        put(source, bucket, stage, seed=1)
        assert content(held) == before, "whoever reads the first goes on with the first"
    build_dataset(source, tmp_path / "seed-1", BuildOptions(image_size=SIZE, workers=1, seed=1))
    assert bucket.content() == content(tmp_path / "seed-1")
    with local_copy(bucket.url, stage) as folder:
        assert content(folder) == content(tmp_path / "seed-1")


@pytest.mark.parametrize("sent", [0, 3, 12])
def test_a_build_that_stops_on_its_way_up_is_no_dataset_and_goes_on(
    source: Path, built: Path, bucket: Bucket, stage: Stage, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    put(source, bucket, stage, seed=1)
    upload = object_storage.StorageFolder.upload
    lock, count = threading.Lock(), 0

    def stop(remote: object_storage.StorageFolder, path: Path) -> None:
        nonlocal count
        with lock:
            count += 1
            if count > sent:
                raise KeyboardInterrupt
        upload(remote, path)

    with monkeypatch.context() as patch:
        patch.setattr(object_storage.StorageFolder, "upload", stop)
        with pytest.raises(KeyboardInterrupt):
            put(source, bucket, stage)
    with pytest.raises(UserError, match="not a complete dataset"), local_copy(bucket.url, stage):
        pass
    assert put(source, bucket, stage), "the local build was complete"
    assert bucket.content() == content(built)


class Flaky:
    """A file system, and its streams, of which the first few calls for each path fail, as an object storage's do."""

    def __init__(self, whole: Any, left: Counter[str], path: str = "") -> None:
        self._whole, self._left, self._path = whole, left, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            path = self._path or str(arguments[0])
            # Not at once: what breaks off in the middle is the harder case.
            if random.Random(f"{path} {name} {self._left[path]}").random() < 0.5 and self._left[path] < FAILURES:
                self._left[path] += 1
                raise OSError("AWS Error INTERNAL_FAILURE during PutObject operation")
            made = found(*arguments)
            return Flaky(made, self._left, path) if name.startswith("open_") else made

        return call

    def __enter__(self) -> "Flaky":
        self._whole.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._whole.__exit__(*error)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each path has failed; they do from now on."""
    failed: Counter[str] = Counter()
    whole = object_storage.StorageFolder.__init__

    def init(self: Any, scheme: str, filesystem: Any, path: str) -> None:
        whole(self, scheme, Flaky(filesystem, failed), path)

    monkeypatch.setattr(object_storage.StorageFolder, "__init__", init)
    monkeypatch.setattr(object_storage, "PAUSES_S", (0.0,) * FAILURES)
    return failed


def test_a_storage_that_fails_now_and_then(
    source: Path, bucket: Bucket, stage: Stage, tmp_path: Path, flaky: Counter[str]
) -> None:
    with staged_output(bucket.url, ROOM, stage) as folder:
        build_dataset(source, folder, BuildOptions(image_size=SIZE))
    assert sum(flaky.values()) > 10
    flaky.clear()
    with local_copy(bucket.url, Stage(tmp_path / "other", ROOM)) as there:
        verify_dataset(there)
    assert sum(flaky.values()) > 3


def test_a_storage_that_fails_always_is_named(
    source: Path, bucket: Bucket, stage: Stage, tmp_path: Path, flaky: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged_output(bucket.url, ROOM, stage) as folder:
        build_dataset(source, folder, BuildOptions(image_size=SIZE))
    flaky.clear()
    monkeypatch.setattr(object_storage, "PAUSES_S", ())
    other = Stage(tmp_path / "other", ROOM)
    with (
        pytest.raises(UserError, match=r"the storage cannot be used .*INTERNAL_FAILURE"),
        local_copy(bucket.url, other),
    ):
        pass
    flaky.update(dict.fromkeys(flaky, FAILURES))
    for _ in range(20 * FAILURES):  # the same command again goes on with what it has
        try:
            with local_copy(bucket.url, other) as there:
                verify_dataset(there)
                return
        except UserError:
            assert not list(other.folder.glob("*/manifest.parquet")), "not taken for whole"
    pytest.fail("it never got there")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_shard_that_was_damaged_there_is_named(
    source: Path, bucket: Bucket, stage: Stage, tmp_path: Path, damage: str
) -> None:
    put(source, bucket, stage)
    name = "cxr-train.tfrecord-00001-of-00004"
    data = bucket.content()[name]
    if damage == "remove":
        bucket.remove(name)
    else:
        bucket.write(name, data[:-1] if damage == "truncate" else data[:99] + bytes([data[99] ^ 1]) + data[100:])
    elsewhere = Stage(tmp_path / "elsewhere", ROOM)
    with pytest.raises(UserError, match=name), local_copy(bucket.url, elsewhere):
        pass
    assert not list(elsewhere.folder.glob(f"*/{MANIFEST_NAME}"))
    bucket.write(name, data)
    with local_copy(bucket.url, elsewhere) as folder:
        assert verify_dataset(folder).records == 42


@pytest.mark.parametrize("place", ["s3", "file"])
def test_no_more_is_taken_than_the_manifest_says(
    source: Path, built: Path, bucket: Bucket, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    name = "cxr-train.tfrecord-00001-of-00004"
    data = (built / name).read_bytes() + bytes(300_000)
    url = bucket.url
    if place == "s3":
        put(source, bucket, stage)
        bucket.write(name, data)
    else:
        shutil.copytree(built, tmp_path / "there")
        (tmp_path / "there" / name).write_bytes(data)
        url = f"file://{tmp_path / 'there'}"
    taken: Counter[str] = Counter()
    written: dict[str, int] = {}
    chunks, write_atomically = object_storage.StorageFolder.chunks, storage.write_atomically

    def counted(remote: object_storage.StorageFolder, of: str) -> Iterator[bytes]:
        for chunk in chunks(remote, of):
            taken[of] += len(chunk)
            yield chunk

    def measured(path: Path, write: Callable[[Any], object]) -> None:
        def write_and_tell(file: Any) -> None:
            try:
                write(file)
            finally:
                written[path.name] = file.tell()

        write_atomically(path, write_and_tell)

    monkeypatch.setattr(object_storage, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(storage, "write_atomically", measured)
    monkeypatch.setattr(object_storage.StorageFolder, "chunks", counted)
    elsewhere = Stage(tmp_path / "elsewhere", ROOM)
    with pytest.raises(UserError, match=f"{name}: is not the file that was built"), local_copy(url, elsewhere):
        pass
    said = next(shard.bytes for shard in read_manifest(built).shards if shard.name == name)
    assert said < taken[name] <= said + 1000
    assert written[name] <= said
    assert not list(elsewhere.folder.glob(f"*/{MANIFEST_NAME}"))


def test_a_fetch_that_was_killed_goes_on(
    source: Path, built: Path, bucket: Bucket, stage: Stage, tmp_path: Path
) -> None:
    put(source, bucket, stage)
    elsewhere = Stage(tmp_path / "elsewhere", ROOM)
    with local_copy(bucket.url, elsewhere) as folder:
        pass
    # What a kill may leave: no manifest, a whole shard, half of another, a temporary file.
    (folder / MANIFEST_NAME).unlink()
    whole, half, *rest = sorted(folder.glob("cxr-*"))
    half.write_bytes(half.read_bytes()[:50])
    (folder / f".{rest[0].name}.abc_1.tmp").write_bytes(b"begun")
    for path in rest:
        path.unlink()
    seen: list[tuple[int, int]] = []
    with local_copy(bucket.url, elsewhere, lambda done, total: seen.append((done, total))) as folder:
        assert content(folder) == content(built)
    whole_records = next(shard.records for shard in read_manifest(built).shards if shard.name == whole.name)
    assert seen[0][0] > whole_records, "the whole shard was not fetched again"


def test_the_stage_keeps_to_its_limit(source: Path, bucket: Bucket, tmp_path: Path) -> None:
    put(source, bucket, Stage(tmp_path / "builder", ROOM))
    size = sum(map(len, bucket.content().values()))
    small = Stage(tmp_path / "small", size // 2)
    with pytest.raises(UserError, match=storage.STAGE_LIMIT_VARIABLE), local_copy(bucket.url, small):
        pass
    stage = Stage(tmp_path / "stage", 2 * size + size // 2)
    kept = []
    for seed in range(4):
        put(source, bucket, Stage(tmp_path / "builder", ROOM), seed=seed)
        with local_copy(bucket.url, stage) as folder:
            os.utime(folder.with_name(f"{folder.name}.lock"), (seed, seed))
            kept.append(folder)
        assert sum(path.stat().st_size for path in stage.folder.rglob("*") if path.is_file()) <= stage.limit
    assert datasets(stage) == sorted(kept[-2:]), "those that were used last"
    with kept[2].with_name(f"{kept[2].name}.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(UserError, match=storage.STAGE_LIMIT_VARIABLE):
            Stage(stage.folder, size + size // 2).make_room(size, "another")
    assert datasets(stage) == [kept[2]], "what is in use stays"


def test_what_is_no_dataset_is_left_alone(source: Path, bucket: Bucket, stage: Stage) -> None:
    bucket.write("thesis.pdf", b"of years")
    with pytest.raises(UserError, match=r"thesis\.pdf"):
        put(source, bucket, stage)
    assert bucket.content() == {"thesis.pdf": b"of years"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s4://bucket/name", "not the address of an object storage"),
        ("s3://", "not the address of an object storage"),
        (f"s3://{BUCKET}/nothing/here?scheme=http&endpoint_override=SERVER", "not a complete dataset"),
        ("s3://no-such-bucket/a?scheme=http&endpoint_override=SERVER", "not a complete dataset"),
        ("s3://bucket/a?scheme=http&endpoint_override=127.0.0.1:9", "cannot be used"),
    ],
)
def test_addresses_that_lead_nowhere(
    bucket: Bucket, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, says: str
) -> None:
    monkeypatch.setattr(object_storage, "PAUSES_S", ())  # Arrow itself tries for seconds to reach a server
    with pytest.raises(UserError, match=says), local_copy(url.replace("SERVER", server), Stage(tmp_path, ROOM)):
        pass


def test_credentials_in_an_address_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave credentials out") as raised, local_copy("s3://key:secret@b/d"):
        pass
    assert "secret" not in str(raised.value)


def test_two_processes_fetch_once(source: Path, bucket: Bucket, stage: Stage, tmp_path: Path) -> None:
    put(source, bucket, stage)
    elsewhere = Stage(tmp_path / "elsewhere", ROOM)
    fetched: list[tuple[int, int]] = []
    found: list[Path] = []

    def use() -> None:
        with local_copy(bucket.url, elsewhere, lambda done, total: fetched.append((done, total))) as folder:
            verify_dataset(folder)
            found.append(folder)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert fetched.count((42, 42)) == 1


def test_the_commands_take_an_address(
    source: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(storage.STAGE_VARIABLE, str(tmp_path / "stage"))
    main.main(["build", str(source), bucket.url, "--image-size", str(SIZE), "--workers", "1"])
    shutil.rmtree(tmp_path / "stage")
    main.main(["verify", bucket.url])
    assert "42 records" in capsys.readouterr().out
    main.main(["eda", bucket.url, "--out", str(tmp_path / "eda")])
    monkeypatch.setenv(storage.STAGE_LIMIT_VARIABLE, "much")
    with pytest.raises(SystemExit) as stopped:
        main.main(["verify", bucket.url])
    assert stopped.value.code == 2
    assert f"error: {storage.STAGE_LIMIT_VARIABLE}=much" in capsys.readouterr().err
