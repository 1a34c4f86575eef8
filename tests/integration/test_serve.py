"""`cxr-dist serve` for real: one service, and all that may be sent to it."""

import http.client
import io
import json
import pickle
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from cxr_dist.inference.classifier import Classifier, load_classifier
from cxr_dist.inference.predict import predict_files
from cxr_dist.runs.calibration_file import CALIBRATION
from cxr_dist.serving import service
from cxr_dist.serving.http_app import FORM, TYPES
from cxr_dist.serving.limits import Limits
from tests.conftest import use_small_base
from tests.inference.test_classifier import FITTED
from tests.ports import free_ports
from tests.tfrecords_builder.images.test_decode import claiming
from tests.tfrecords_builder.images.test_dicom import dicom_bytes
from tfrecords_builder.common.errors import UserError

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
LIMITS = Limits(max_batch=2, max_body_bytes=1 << 20, max_waiting=6, body_timeout_s=10.0, answer_timeout_s=300.0)
LIMIT_S = 360.0
"""For an answer, whatever the service does."""


def load_small(run: Path) -> Classifier:
    """In the replica, which is another process."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        return load_classifier(run)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / CALIBRATION).write_text(json.dumps(FITTED))
    return copy


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    import ray

    ray.shutdown()
    (found,) = free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with service.serving(run, "127.0.0.1", found, LIMITS, load=load_small) as address:
            assert address == f"http://127.0.0.1:{found}"
            yield found
    ray.shutdown()


def ask(
    port: int, body: Any, kind: str = "image/png", method: str = "POST", path: str = "/predict", **options: Any
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    headers = {"Content-Type": kind, **options.pop("headers", {})}
    connection.request(method, path, body, headers, **options)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, json.loads(said) if response.headers["Content-Type"] == "application/json" else said


@pytest.fixture(scope="module")
def phantoms(phantom_source: Path) -> list[Path]:
    return sorted(phantom_source.glob("*/images/*.png"))[::5]


@pytest.fixture
def still_answers(port: int, phantoms: list[Path]) -> Iterator[None]:
    """After whatever the test has sent."""
    yield
    assert ask(port, phantoms[0].read_bytes())[0] == 200


def test_the_same_as_predict(port: int, run: Path, phantoms: list[Path], small_network: None, tmp_path: Path) -> None:
    """Of all types, alone, and in batches with others and beside others."""
    pixels = np.asarray(Image.open(phantoms[0]).convert("L"))
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(255 - pixels, "MONOCHROME1"))
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    paths = [*phantoms, tmp_path / "a.dcm", tmp_path / "a.jpg"]
    kinds = {".png": "image/png", ".dcm": "application/dicom", ".jpg": "image/jpeg; charset=binary"}
    expected = list(predict_files(load_classifier(run), paths, workers=1))
    with ThreadPoolExecutor(LIMITS.max_waiting) as pool:
        together = list(pool.map(lambda path: ask(port, path.read_bytes(), kinds[path.suffix]), paths))
    alone = [ask(port, path.read_bytes(), kinds[path.suffix]) for path in paths[-3:]]
    for (status, found), outcome in zip([*together, *alone], [*expected, *expected[-3:]], strict=True):
        assert status == 200, found
        assert outcome.prediction is not None
        assert (found["predicted"], found["abstained"]) == (outcome.prediction.predicted, outcome.prediction.abstained)
        assert found["probabilities"] == pytest.approx(outcome.prediction.probabilities, abs=1e-5)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 90).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.usefixtures("still_answers")
def test_bad_uploads(port: int, phantoms: list[Path]) -> None:
    whole = phantoms[0].read_bytes()
    pixels = np.zeros((8, 8), np.uint8)
    for words, status, body, kind in (
        ("the form holds no file", 422, whole, "multipart/form-data; boundary=x"),
        ("the form holds no file", 422, whole, "multipart/form-data"),
        ("not a PNG", 422, b'{"image": "aGVsbG8="}', "application/json"),
        ("is empty", 422, b"", "image/png"),
        ("not a PNG", 422, b"GIF89a" + b"0" * 99, "image/png"),
        ("truncated", 422, whole[:-30], "image/png"),
        ("truncated", 422, jpeg()[:-20], "image/jpeg"),
        ("DICOM", 422, b"0" * 200, "application/dicom"),
        ("2 frames", 422, dicom_bytes(pixels, NumberOfFrames=2), "application/dicom"),
        ("more than 89,478,485", 413, dicom_bytes(pixels, Rows=65535, Columns=65535), "application/dicom"),
        ("more than 89,478,485", 413, claiming(40_000, 25_000), "image/png"),
        ("at most", 413, b"0" * (LIMITS.max_body_bytes + 1), "image/png"),
    ):
        found, said = ask(port, body, kind)
        assert (found, set(said)) == (status, {"error"}), words
        assert words in said["error"]
        assert "upload" not in said["error"]
        assert "Doe" not in said["error"]


def test_an_image_is_what_its_bytes_are(port: int, phantoms: list[Path]) -> None:
    """Whatever its Content-Type calls it."""
    kinds = ("image/png", "image/jpeg", "application/dicom", "image/jpg", "text/plain", "application/octet-stream", "")
    sent = [ask(port, phantoms[0].read_bytes(), kind) for kind in kinds]
    boundary = "--x\r\nContent-Disposition: form-data; name="
    file = f'{boundary}"note"\r\n\r\nhello\r\n{boundary}"image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    form = file.encode() + phantoms[0].read_bytes() + b"\r\n--x--\r\n"
    sent.append(ask(port, form, "multipart/form-data; boundary=x"))
    assert sent[0][0] == 200
    assert sent == [sent[0]] * len(sent)


@pytest.mark.usefixtures("still_answers")
def test_a_body_that_is_too_large_is_refused_before_and_while_it_is_read(port: int) -> None:
    # Only the header: an answer comes although no byte of the body does.
    assert ask(port, None, headers={"Content-Length": str(10**12)})[0] == 413
    chunks = (b"0" * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 2))
    status, said = ask(port, chunks, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert status == 413
    assert "more than 1,048,576 bytes" in said["error"]


@pytest.mark.usefixtures("still_answers")
def test_slow_bodies_end_and_do_not_take_the_place_of_others_for_ever(port: int, phantoms: list[Path]) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\nabc"
    slow = [socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) for _ in range(LIMITS.max_waiting)]
    for connection in slow:
        connection.sendall(head)
    statuses = [ask(port, phantoms[0].read_bytes())[0]]
    deadline = time.monotonic() + LIMITS.body_timeout_s
    while statuses[-1] != 503 and time.monotonic() < deadline:  # the last of them may not have got through yet
        statuses.append(ask(port, phantoms[0].read_bytes())[0])
    assert set(statuses) <= {200, 503}
    assert statuses[-1] == 503
    assert ask(port, None, method="GET", path="/health")[0] == 200
    assert ask(port, None, method="GET", path="/ready")[0] == 503
    for connection in slow:
        assert b" 408 " in connection.recv(1000)
        connection.close()


def test_pages(port: int, phantoms: list[Path]) -> None:
    assert ask(port, phantoms[0].read_bytes())[0] == 200
    assert ask(port, None, method="GET", path="/health") == (200, {"status": "alive"})
    assert ask(port, None, method="GET", path="/ready") == (200, {"status": "ready"})
    status, listed = ask(port, None, method="GET", path="/")
    assert status == 200
    assert "POST /predict" in listed["routes"]
    assert ask(port, None, method="GET", path="/docs") == (404, {"error": "Not Found"})
    status, schema = ask(port, None, method="GET", path="/openapi.json")
    assert status == 200
    assert "Not for diagnosis" in schema["info"]["description"]
    assert "Viral_Pneumonia" in schema["info"]["description"]
    predict = schema["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {*TYPES, FORM}
    assert {"200", "408", "413", "415", "422", "503", "504"} <= set(predict["responses"])
    assert ask(port, None, method="GET")[0] == 405
    assert ask(port, b"", path="/openapi.json")[0] == 405
    assert ask(port, None, method="GET", path="/nope") == (404, {"error": "Not Found"})
    status, text = ask(port, None, method="GET", path="/metrics")
    assert status == 200
    assert b'cxr_dist_requests_total{status="200"}' in text
    assert b"cxr_dist_batch_images_sum" in text


def test_an_address_in_use(port: int, run: Path) -> None:
    with pytest.raises(UserError, match=f"--port {port}"), service.serving(run, "127.0.0.1", port, LIMITS):
        pass


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


def listening_ports(title: str) -> set[int]:
    """Of processes with that title, on all interfaces."""
    ports = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended meanwhile
            if title in " ".join(process.cmdline()):
                found = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
                ports |= {each.laddr.port for each in found if each.laddr.ip in ("::", "0.0.0.0")}
    return ports


def test_a_stranger_s_pickle_is_not_loaded(port: int, still_answers: None, tmp_path: Path) -> None:
    """A replica of Ray Serve listens for other deployments on all interfaces, and unpickles what they say."""
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    ports = listening_ports("ray::ServeReplica")
    refused = set()
    for each in ports:
        with grpc.insecure_channel(f"127.0.0.1:{each}") as channel:
            request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Payload(tmp_path / "made")))
            with pytest.raises(grpc.RpcError) as caught:
                serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=60)
            refused.add(caught.value.code())
    assert not (tmp_path / "made").exists()
    assert grpc.StatusCode.UNAUTHENTICATED in refused


def test_a_run_that_cannot_be_served_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"), service.serving(tmp_path / "a", "127.0.0.1", 1, LIMITS):
        pass
