"""What sheets say of images: read in both forms, into the manifest, and patients stay in one split."""

import shutil
from pathlib import Path

import pytest

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.build import build_dataset
from tfrecords_builder.errors import UserError
from tfrecords_builder.metadata import Metadata, metadata_digest, read_metadata
from tfrecords_builder.sources import find_images
from tfrecords_builder.splits import SPLITS, split_sizes
from tfrecords_builder.verify import verify_dataset


@pytest.fixture
def mutable(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


def write_sheet(path: Path, rows: list[tuple[object, ...]]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def test_sheets_of_the_database(mutable: Path) -> None:
    """Names there differ from the files' in case, and not every file has a line."""
    header = ("FILE NAME", "FORMAT", "SIZE", "URL")
    write_sheet(
        mutable / "COVID.metadata.xlsx",
        [header, ("COVID-1", "PNG", "256*256", " https://one.org/a "), ("COVID-999", "PNG", "", "https://two.org")],
    )
    write_sheet(
        mutable / "Normal.metadata.xlsx", [header, ("NORMAL-2", "PNG", "", "https://x"), (None, None, "", None)]
    )
    write_sheet(mutable / "Viral Pneumonia.metadata.xlsx", [header, ("Viral Pneumonia-0.png", "", "", "https://y")])
    assert read_metadata(mutable, find_images(mutable)) == {
        "COVID/images/COVID-1.png": Metadata("https://one.org/a"),
        "Normal/images/Normal-2.png": Metadata("https://x"),
        "Viral Pneumonia/images/Viral Pneumonia-0.png": Metadata("https://y"),
    }
    manifest = build_dataset(mutable, mutable.parent / "d", image_size=16, workers=1).manifest
    assert {row.source for row in manifest.rows} == {None, "https://one.org/a", "https://x", "https://y"}


def test_without_sheets_nothing_is_known(source: Path) -> None:
    assert read_metadata(source, find_images(source)) == {}
    assert metadata_digest({}) is None


def test_patients_stay_in_one_split_and_a_change_builds_anew(mutable: Path, tmp_path: Path) -> None:
    paths = [image.path for image in find_images(mutable)]
    # One or two images each, of the same class but where one class ends and the next begins.
    patient_of = {path: f"p{number // 2}" for number, path in enumerate(paths) if number % 4}
    lines = [f"{path},{patient}" for path, patient in patient_of.items()]
    (mutable / "metadata.csv").write_text("\n".join(["path,patient", *lines]))
    for seed in range(4):
        manifest = build_dataset(mutable, tmp_path / str(seed), image_size=16, workers=1, seed=seed).manifest
        assert manifest.excluded == [], "a patient with images of two classes is no contradiction"
        for patient in set(patient_of.values()):
            assert len({row.split for row in manifest.rows if row.patient == patient}) == 1
        verify_dataset(tmp_path / str(seed))
    (mutable / "metadata.csv").write_text("\n".join(["path,patient", *lines[1:]]))
    again = build_dataset(mutable, tmp_path / "0", image_size=16, workers=1)
    assert not again.reused
    assert again.changes[0].startswith("metadata ")


def test_published_splits_ignore_patients(mutable: Path, tmp_path: Path) -> None:
    paths = [image.path for image in find_images(mutable)]
    (mutable / "metadata.csv").write_text("\n".join(["path,patient", *(f"{path},one" for path in paths)]))
    manifest = build_dataset(mutable, tmp_path / "d", image_size=16, workers=1, split="published").manifest
    counts = {name.replace(" ", "_"): count for name, count in COUNTS.items()}
    assert manifest.counts == {split: {n: split_sizes(c)[split] for n, c in counts.items()} for split in SPLITS}
    with pytest.raises(UserError, match=r"has no image for the (train|validation|test) split"):
        build_dataset(mutable, tmp_path / "e", image_size=16, workers=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\nCOVID/images/COVID-1.png", "needs the column path, and source or patient"),
        ("source\nx", "needs the column path"),
        ("path,source\nnone.png,x", "line 2: 'none.png' is no image"),
        ("path,source\nCOVID/images/COVID-1.png,x\nCOVID/images/COVID-1.png,y", "line 3: .* a second time"),
        ("\xff", "no CSV file in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_used(mutable: Path, content: str, message: str) -> None:
    (mutable / "metadata.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        read_metadata(mutable, find_images(mutable))
    assert str(mutable / "metadata.csv") in str(caught.value)


def test_a_sheet_that_cannot_be_used(mutable: Path) -> None:
    sheet = mutable / "COVID.metadata.xlsx"
    sheet.write_bytes(b"no sheet")
    with pytest.raises(UserError, match="cannot be read as a sheet"):
        read_metadata(mutable, find_images(mutable))
    write_sheet(sheet, [("FILE", "LINK"), ("COVID-1", "https://one.org")])
    with pytest.raises(UserError, match="needs the columns FILE NAME and URL"):
        read_metadata(mutable, find_images(mutable))
