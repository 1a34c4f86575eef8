"""`cxr-dist predict`: every file has its line, whatever the others are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.cli import main
from cxr_dist.data import image_files
from cxr_dist.inference import predict
from cxr_dist.inference.classifier import load_classifier
from tests.inference.test_classifier import calibrated_run  # noqa: F401 - a fixture
from tests.tfrecords_builder.images.test_dicom import dicom_bytes
from tfrecords_builder.images.decode import load_gray

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def images(phantom_source: Path, tmp_path: Path) -> Path:
    """Five phantoms, a DICOM file of the first with another name and one without, and what is no image."""
    folder = tmp_path / "images"
    (folder / "b" / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted(phantom_source.glob("*/images/*.png"))[:5]):
        shutil.copy(path, folder / ("b/deep" if number % 2 else ".") / f"{number}.png")
    pixels = load_gray(folder / "0.png", 48)
    (folder / "scan.dcm").write_bytes(dicom_bytes(pixels))
    (folder / "b" / "IM0001").write_bytes(dicom_bytes(255 - pixels, "MONOCHROME1"))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


ORDER = ["0.png", "2.png", "4.png", "b/IM0001", "b/deep/1.png", "b/deep/3.png", "scan.dcm"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        main.main(["predict", *map(str, arguments)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_lines(
    calibrated_run: Path,  # noqa: F811
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, calibrated_run, images, "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [str(images / name) for name in ORDER]
    classifier = load_classifier(calibrated_run)
    for line in lines[:3]:
        (answer,) = classifier.predict(load_gray(Path(line["path"]), 32)[None])
        assert (line["predicted"], line["abstained"]) == (answer.predicted, answer.abstained)
        assert line["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
    by_name = {Path(line["path"]).name: line["probabilities"] for line in lines}
    assert by_name["scan.dcm"] == pytest.approx(by_name["0.png"], abs=1e-5)
    assert by_name["IM0001"] == pytest.approx(by_name["0.png"], abs=1e-5)


def test_the_table_and_a_file_that_cannot_be_read(
    calibrated_run: Path,  # noqa: F811
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged, evil = images / "1-damaged.png", images / "3-\x1b[31m\n.png"
    damaged.write_bytes((images / "0.png").read_bytes()[:-40])
    shutil.copy(images / "0.png", evil)
    code, out, err = run(capsys, calibrated_run, images, images / "notes.txt")
    assert code == 1
    assert err == "2 of 10 files could not be read\n"
    head, *lines = out.splitlines()
    assert head.split() == ["predicted", "COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia", "path"]
    assert len(lines) == 10
    assert "\x1b" not in out
    (bad,) = (line for line in lines if str(damaged) in line)
    assert bad.startswith("unreadable")
    assert "truncated" in bad
    assert "--on-error" not in out
    assert "is not a PNG, JPEG" in lines[-1]
    for line in lines[:-1]:
        if line != bad:
            assert line.split()[0] in ("abstains", *head.split()[1:5])
            assert sum(map(float, line.split()[1:5])) == pytest.approx(1, abs=2e-4)
    answers = [line.split()[0] == "abstains" for line in lines if not line.startswith("unreadable")]
    classifier = load_classifier(calibrated_run)
    assert answers[0] == classifier.predict(load_gray(images / "0.png", 32)[None])[0].abstained


def test_overlays_of_what_could_be_read(
    finished_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (images / "1-damaged.png").write_bytes((images / "0.png").read_bytes()[:-40])
    folder = tmp_path / "overlays"
    code, out, _ = run(capsys, finished_run, images, "--json", "--overlay", folder)
    assert code == 1
    lines = [json.loads(line) for line in out.splitlines()]
    drawn = [Path(line["overlay"]) for line in lines if "error" not in line]
    assert len(drawn) == len(lines) - 1 == len(set(drawn))
    assert sorted(folder.iterdir()) == drawn
    assert drawn[0].name == "00001-0.png"
    for line, path in zip([line for line in lines if "error" not in line], drawn, strict=True):
        assert path.stem.partition("-")[2] == Path(line["path"]).stem
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
    assert run(capsys, finished_run, images / "0.png", "--overlay", folder)[0] == 0  # its own are replaced
    (folder / "notes.txt").write_text("mine")
    code, _, err = run(capsys, finished_run, images / "0.png", "--overlay", folder)
    assert code == 2
    assert (
        f"{folder}: contains other files than overlays ('notes.txt'); give an empty or new folder with --overlay" in err
    )


def test_what_is_not_there_is_said_before_anything_is_read(
    finished_run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, finished_run, images, images / "missing.png")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {images / 'missing.png'}: no such file")
    (images / "empty").mkdir()
    code, out, err = run(capsys, finished_run, images / "empty")
    assert (code, out) == (2, "")
    assert "holds no" in err
    assert run(capsys, images, images)[0] == 2


@pytest.mark.parametrize("name", ["1.png", "1.JPG", "1.dcm"])
def test_masks_beside_images_are_no_inputs(tmp_path: Path, name: str) -> None:
    for folder in ("COVID", "Normal"):
        for path in (tmp_path / folder / name, tmp_path / folder / "masks" / "1.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    assert image_files.find_inputs([tmp_path]) == [tmp_path / "COVID" / name, tmp_path / "Normal" / name]
    # What is asked for itself is taken, and so is a folder of this name that lies beside nothing.
    assert image_files.find_inputs([tmp_path / "COVID" / "masks"]) == [tmp_path / "COVID" / "masks" / "1.png"]
    (tmp_path / "COVID" / name).unlink()
    assert image_files.find_inputs([tmp_path / "COVID"]) == [tmp_path / "COVID" / "masks" / "1.png"]


def test_one_batch_in_memory(finished_run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load_classifier(finished_run)
    read: list[Path] = []
    original = predict.read_square

    def count(path: Path, size: int) -> np.ndarray:
        read.append(path)
        return original(path, size)

    monkeypatch.setattr(predict, "read_square", count)
    paths = image_files.find_inputs([images]) * 3
    for done, outcome in enumerate(predict.predict_files(classifier, paths, workers=2, batch_size=4)):
        assert outcome.path == paths[done]
        assert len(read) == min(len(paths), (done // 4 + 1) * 4)


def test_files_that_are_too_large_or_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from tfrecords_builder.images.decoded import ImageError

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is no file"):
        image_files.read_square(tmp_path / "pipe.png", 32)
    (tmp_path / "a.png").write_bytes(b"0" * 100)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 99)
    with pytest.raises(ImageError, match="has 100 bytes"):
        image_files.read_square(tmp_path / "a.png", 32)
