"""Collections of other formats than PNG, built: the cases t1, t2 and t5, patients of DICOM, and what is said."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.cli import main
from cxr_dist.data.image_files import find_inputs, read_square
from cxr_dist.data.image_folder import FolderSource
from tests.tfrecords_builder.conftest import write_images
from tests.tfrecords_builder.images.test_dicom import PATIENT, dicom_bytes
from tests.tfrecords_builder.images.test_formats import png16
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.patient_codes import KEY_VARIABLE
from tfrecords_builder.format import tfrecord
from tfrecords_builder.format.manifest import Manifest, read_manifest
from tfrecords_builder.format.record import decode_example
from tfrecords_builder.preview import preview_build
from tfrecords_builder.splitting.splits import MIN_IMAGES_PER_CLASS
from tfrecords_builder.verify import verify_dataset

SIZE = 32
OPTIONS = BuildOptions(image_size=SIZE, workers=1)
CLASSES = {"COVID": 14, "Normal": 14}
Write = Callable[[Path, np.ndarray, int], None]


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("a key for these tests alone")
    monkeypatch.setenv(KEY_VARIABLE, str(file))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "source", CLASSES, database_layout=False)


def rewrite(files: list[Path], suffix: str, write: Write) -> None:
    """The same pictures in another format."""
    for number, file in enumerate(files):
        pixels = np.asarray(Image.open(file).convert("L"))
        file.unlink()
        write(file.with_name(f"{file.stem}{suffix}"), pixels, number)


def by_pillow(path: Path, pixels: np.ndarray, _number: int) -> None:
    Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


def as_dicom(path: Path, pixels: np.ndarray, number: int) -> None:
    path.write_bytes(dicom_bytes(pixels, PatientID=f"PAT-{number // 2}"))


def pictures(root: Path, name: str) -> list[Path]:
    return sorted((root / name).iterdir())


def texts(manifest: Manifest) -> str:
    return "\n".join(f"{note.warning}: {note.text}" for note in manifest.image_notes)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".tif", by_pillow),
        (".TIFF", by_pillow),
        (".bmp", by_pillow),
        (".webp", by_pillow),
        (".dcm", as_dicom),
        ("", as_dicom),
    ],
)
def test_a_class_in_another_format_is_taken(source: Path, tmp_path: Path, suffix: str, write: Write, step: int) -> None:
    """The cases t1 a, b and c: all or half of one class."""
    expected = build_dataset(source, tmp_path / "png", OPTIONS).manifest
    rewrite(pictures(source, "COVID")[::step], suffix, write)
    manifest = build_dataset(source, tmp_path / "d", OPTIONS).manifest
    verify_dataset(tmp_path / "d")
    assert Counter(row.class_name for row in manifest.rows) == CLASSES
    assert manifest.not_taken == ()
    squares = {Path(row.path).stem: read_square(source / row.path, SIZE) for row in manifest.rows}
    assert len(squares) == len(expected.rows)
    assert sorted(find_inputs([source])) == sorted(source / row.path for row in manifest.rows)


def test_a_dataset_does_not_depend_on_the_format(source: Path, tmp_path: Path) -> None:
    def stored(name: str) -> dict[str, bytes]:
        manifest = build_dataset(source, tmp_path / name, OPTIONS).manifest
        shards = [tmp_path / name / shard.name for shard in manifest.shards]
        records = [decode_example(payload) for shard in shards for _, payload in tfrecord.scan(shard)]
        assert len(records) == sum(CLASSES.values())
        return {Path(record.path).stem: record.image for record in records}

    plain = stored("png")
    for suffix, write in ((".tif", by_pillow), (".bmp", by_pillow), (".webp", by_pillow), (".dcm", as_dicom)):
        for name in CLASSES:
            rewrite(pictures(source, name), suffix, write)
        assert stored(suffix[1:]) == plain


def test_patients_of_dicom_stay_together_and_are_nowhere_in_clear(source: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        rewrite(pictures(source, name), ".dcm", as_dicom)
    manifest = build_dataset(source, tmp_path / "d", OPTIONS).manifest
    patients = {row.patient for row in manifest.rows}
    assert len(patients) == CLASSES["COVID"] / 2
    assert all(re.fullmatch(r"dicom-[0-9a-f]{8}-[0-9a-f]{32}", patient or "") for patient in patients)
    for patient in patients:
        assert len({row.split for row in manifest.rows if row.patient == patient}) == 1
    for file in (tmp_path / "d").iterdir():
        content = file.read_bytes()
        assert PATIENT.encode() not in content
        assert b"PAT-" not in content.upper()
    folder = FolderSource(source, tuple(CLASSES), SIZE)
    assert set(folder.patient_names) == patients, "an evaluation finds the same patients"
    assert manifest.created_with.keys() == {"pillow", "kornia-rs", "pydicom"}


def test_a_dry_run_makes_no_key(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(pictures(source, "COVID"), ".dcm", as_dicom)
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    preview_build(source, BuildOptions(image_size=16))
    assert not (tmp_path / "config").exists()


def test_builds_agree_with_one_key_alone(source: Path, tmp_path: Path) -> None:
    rewrite(pictures(source, "COVID"), ".dcm", as_dicom)
    first = build_dataset(source, tmp_path / "one", OPTIONS).manifest
    assert build_dataset(source, tmp_path / "two", OPTIONS).manifest == first
    assert build_dataset(source, tmp_path / "one", OPTIONS).reused
    (tmp_path / "key").write_text("another key for these tests")
    again = build_dataset(source, tmp_path / "one", OPTIONS)
    assert [change.partition(" ")[0] for change in again.changes] == ["metadata"]
    assert {row.patient for row in again.manifest.rows} & {row.patient for row in first.rows} == {None}


def test_what_a_table_says_of_patients_goes_first(source: Path, tmp_path: Path) -> None:
    rewrite(pictures(source, "COVID"), ".dcm", as_dicom)
    first = pictures(source, "COVID")[0]
    (source / "metadata.csv").write_text(f"path,patient\nCOVID/{first.name},Table 7\n")
    rows = {row.path: row for row in build_dataset(source, tmp_path / "d", OPTIONS).manifest.rows}
    assert rows[f"COVID/{first.name}"].patient == "table 7"
    assert sum((row.patient or "").startswith("dicom-") for row in rows.values()) == CLASSES["COVID"] - 1


def test_one_patient_id_for_a_whole_class_is_nobodys(source: Path, tmp_path: Path) -> None:
    rewrite(pictures(source, "COVID"), ".dcm", lambda path, pixels, _: as_dicom(path, pixels, 0))
    manifest = build_dataset(source, tmp_path / "d", OPTIONS).manifest
    assert {row.patient for row in manifest.rows} == {None}
    assert "True: all 14 DICOM images of COVID have one Patient ID, which is taken for nobody's" in texts(manifest)
    few = tmp_path / "few"
    write_images(few, CLASSES, database_layout=False)
    rewrite(
        pictures(few, "COVID")[: MIN_IMAGES_PER_CLASS - 1], ".dcm", lambda path, pixels, _: as_dicom(path, pixels, 0)
    )
    manifest = build_dataset(few, tmp_path / "e", OPTIONS).manifest
    assert len({row.split for row in manifest.rows if row.patient}) == 1, "a few images are of one patient indeed"


def test_12_bits_in_16_of_one_class_are_stretched_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case t5."""
    root, rng = tmp_path / "t5", np.random.default_rng(0)
    for name, top, bits in (("twelve", 4095, None), ("twelve_sbit", 4095, 12), ("full", 65535, None)):
        (root / name).mkdir(parents=True)
        for number in range(20):
            small = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((64, 64))
            samples = np.round(np.asarray(small) / 255 * top).astype(np.uint16)
            (root / name / f"{name}-{number}.png").write_bytes(png16(samples, bits))
    main.main(["build", str(root), str(tmp_path / "d"), "--image-size", "32", "--workers", "1"])
    printed = capsys.readouterr().out
    assert "note: 20 of 60 images use at most a sixteenth of the range of their samples, and are stretched" in printed
    assert "warning: the share of such images differs by class (20 of 20 of twelve and 0 of 20 of full)" in printed
    manifest = read_manifest(tmp_path / "d")
    means = {
        name: np.mean([read_square(root / row.path, 32).mean() for row in manifest.rows if row.class_name == name])
        for name in manifest.class_names
    }
    assert max(means.values()) - min(means.values()) < 10, "no class is darker for how it is stored"
    assert build_dataset(root, tmp_path / "d", OPTIONS).manifest.image_notes == manifest.image_notes, "kept on reuse"
    main.main(["eda", str(tmp_path / "d"), "--out", str(tmp_path / "eda")])
    assert "differs by class (20 of 20 of twelve" in (tmp_path / "eda/eda.html").read_text()


def test_all_classes_stretched_alike_is_a_note_alone(source: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        rewrite(
            pictures(source, name),
            ".dcm",
            lambda path, pixels, _: path.write_bytes(dicom_bytes(pixels.astype(np.uint16) * 16, bits=16, PatientID="")),
        )
    manifest = build_dataset(source, tmp_path / "d", OPTIONS).manifest
    [note] = manifest.image_notes
    assert note.text.startswith("28 of 28 images")
    assert not note.warning


def test_a_dicom_of_several_frames_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    (source / "COVID/x.dcm").write_bytes(dicom_bytes(np.zeros((8, 8), np.uint8), NumberOfFrames=3))
    with pytest.raises(Exception, match=r"COVID/x.dcm: has 3 frames, and which is meant is not known"):
        build_dataset(source, tmp_path / "d", OPTIONS)


WITHOUT = """
import sys
sys.modules["pydicom"] = None
from cxr_dist.cli import main
main.main(["build", *sys.argv[1:]])
"""


def test_without_pydicom_one_line_names_the_extra(source: Path, tmp_path: Path) -> None:
    rewrite(pictures(source, "COVID")[:1], ".dcm", as_dicom)
    command = [sys.executable, "-c", WITHOUT, str(source), str(tmp_path / "d"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: DICOM files need pydicom; install it: ")
    assert "[dicom]" in line
    assert not (tmp_path / "d").exists()


def test_a_dicomdir_is_no_picture(source: Path, tmp_path: Path) -> None:
    (source / "COVID/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert len(build_dataset(source, tmp_path / "d", OPTIONS).manifest.rows) == sum(CLASSES.values())
