"""The download, against a server on this machine that answers as Kaggle does, and misbehaves when it is told to."""

import base64
import hashlib
import io
import json
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cxr_dist.cli import main
from tests.tfrecords_builder.conftest import write_images
from tfrecords_builder.collection import download
from tfrecords_builder.collection.download import FOLDER, download_database
from tfrecords_builder.common.errors import UserError

COUNTS = {"COVID": 3, "Normal": 4, "Viral Pneumonia": 2}
IMAGES = {"COVID": 3, "Normal": 4, "Viral_Pneumonia": 2}


class Kaggle(BaseHTTPRequestHandler):
    """What kagglehub asks of Kaggle for a dataset."""

    archive: ClassVar[bytes] = b""
    misbehave: ClassVar[str] = ""
    ranges: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.misbehave.isdecimal():
            self._json(int(self.misbehave), {"code": int(self.misbehave), "message": "no"})
        elif self.path.endswith("/GetDataset"):
            self._json(200, {"currentVersionNumber": 5})
        elif self.path.endswith("/DownloadDataset"):
            self._send(0)
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.ranges.append(asked)
        self._send(int(asked.removeprefix("bytes=").rstrip("-")))

    def _json(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send(self, start: int) -> None:
        digest = base64.b64encode(hashlib.md5(self.archive).digest()).decode()
        data = self.archive[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if self.misbehave != "no checksum":
            self.send_header("X-Goog-Hash", f"md5={digest}")
        self.end_headers()
        if self.misbehave == "break off":
            self.wfile.write(data[: len(data) // 2])
            return
        if self.misbehave == "silence":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(300)
            return
        if self.misbehave in ("garble", "no checksum"):
            data = data[:200] + bytes(100) + data[300:]
        self.wfile.write(data)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = write_images(tmp_path_factory.mktemp("database") / FOLDER, COUNTS)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*.png")):
            file.write(path, path.relative_to(root.parent))
        # kagglehub writes a megabyte at a time: of less, nothing would be left to go on from.
        file.writestr(f"{FOLDER}/README.bin", np.random.default_rng(0).bytes(3_000_000))
    return data.getvalue()


@pytest.fixture
def kaggle(
    archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[type[Kaggle]]:
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path_factory.mktemp("none")))
    # Told to ask a server for tests, kagglehub prints every answer, and reads it whole for that.
    quiet = tmp_path_factory.mktemp("quiet")
    (quiet / "sitecustomize.py").write_text(
        "from kagglesdk.kaggle_http_client import KaggleHttpClient\n"
        "KaggleHttpClient._print_request = KaggleHttpClient._print_response = lambda *_: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(quiet))
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setattr(download, "NEEDED_BYTES", 1 << 26)
    Kaggle.archive, Kaggle.misbehave, Kaggle.ranges = archive, "", []
    try:
        # kagglehub's address for tests; nothing else can be given it.
        server = ThreadingHTTPServer(("localhost", 7777), Kaggle)
    except OSError:
        pytest.skip("port 7777 is in use")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield Kaggle
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_the_database_arrives_whole_and_is_not_fetched_twice(kaggle: type[Kaggle], tmp_path: Path) -> None:
    assert download_database(tmp_path / "d", IMAGES)
    assert len(names(tmp_path / "d")) == sum(COUNTS.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
    kaggle.misbehave = "500"
    assert not download_database(tmp_path / "d", IMAGES)


def test_what_broke_off_goes_on(kaggle: type[Kaggle], tmp_path: Path) -> None:
    kaggle.misbehave = "break off"
    with pytest.raises(UserError, match="the download failed"):
        download_database(tmp_path / "d", IMAGES)
    assert not (tmp_path / "d").exists()
    kaggle.misbehave = ""
    assert download_database(tmp_path / "d", IMAGES)
    assert kaggle.ranges == ["bytes=1048576-"], "only the rest was asked for"
    assert len(names(tmp_path / "d")) == sum(COUNTS.values())


@pytest.mark.parametrize("how", ["garble", "no checksum"])
def test_what_is_damaged_is_fetched_anew(kaggle: type[Kaggle], tmp_path: Path, how: str) -> None:
    kaggle.misbehave = how
    with pytest.raises(UserError, match="the download is damaged"):
        download_database(tmp_path / "d", IMAGES)
    assert not (tmp_path / "d").exists()
    kaggle.misbehave = ""
    assert download_database(tmp_path / "d", IMAGES)
    assert kaggle.ranges == []


def test_silence_has_a_limit(kaggle: type[Kaggle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle.misbehave = "silence"
    with monkeypatch.context() as patch:
        patch.setattr(download, "SILENCE_SECONDS", 8.0)
        with pytest.raises(UserError, match="nothing has arrived for 8 seconds"):
            download_database(tmp_path / "d", IMAGES)
    kaggle.misbehave = ""
    assert download_database(tmp_path / "d", IMAGES)


@pytest.mark.parametrize(
    ("status", "says"), [("401", "accept the terms"), ("403", "accept the terms"), ("503", "status 503")]
)
def test_what_kaggle_refuses(kaggle: type[Kaggle], tmp_path: Path, status: str, says: str) -> None:
    kaggle.misbehave = status
    with pytest.raises(UserError, match=says):
        download_database(tmp_path / "d", IMAGES)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        socket.create_server(("localhost", 7777)).close()
    except OSError:
        pytest.skip("port 7777 is in use")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setattr(download, "NEEDED_BYTES", 1 << 26)
    with pytest.raises(SystemExit) as stopped:
        main.main(["download", str(tmp_path / "d")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: kaggle.com/datasets/")
    assert "check the network" in error
    assert "\n" not in error


def test_another_collection_is_kept_but_not_taken(kaggle: type[Kaggle], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"contains 3 COVID, 4 Normal, 2 Viral_Pneumonia images, but .* 5 COVID"
    ) as raised:
        download_database(tmp_path / "d", IMAGES | {"COVID": 5})
    assert len(names(Path(str(raised.value).partition(": contains")[0]))) == sum(COUNTS.values())
    assert not (tmp_path / "d").exists()


def test_what_can_be_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").write_text("of years")
    with pytest.raises(UserError, match="contains other files"):
        download_database(tmp_path / "full", IMAGES)
    with pytest.raises(UserError, match="is a file"):
        download_database(tmp_path / "full" / "thesis.pdf", IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 5 * 10**8))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"needs 1\.5 GB more"):
            download_database(tmp_path / "d", IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r'pip install .*\[download\]"'):
            download_database(tmp_path / "d", IMAGES)
