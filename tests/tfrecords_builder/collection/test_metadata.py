"""What sheets say of images: read in both forms, into the manifest, and patients stay in one split."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.collection.file_kinds import Note
from tfrecords_builder.collection.metadata import (
    Metadata,
    examine_metadata,
    metadata_digest,
    normalized_patient,
    read_metadata,
)
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.splitting.splits import SPLITS, split_sizes
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
    _, notes = examine_metadata(mutable, find_images(mutable))
    assert [note.text for note in notes if note.warning] == [
        "COVID.metadata.xlsx: 1 of 2 lines name an image (COVID-999 does not)",
        "COVID.metadata.xlsx: 1 of 20 images of COVID have a line",
        "Normal.metadata.xlsx: 1 of 13 images of Normal have a line",
        "Viral Pneumonia.metadata.xlsx: 1 of 9 images of Viral_Pneumonia have a line",
    ]
    manifest = build_dataset(mutable, mutable.parent / "d", BuildOptions(image_size=16, workers=1)).manifest
    assert manifest.notes == tuple(notes)
    assert {row.source for row in manifest.rows} == {None, "https://one.org/a", "https://x", "https://y"}


def test_the_digest_of_what_is_known_stays(source: Path) -> None:
    """A dataset with patients and sources, and no further columns, need not be built anew."""
    known = {"a/x.png": Metadata("s", "p"), "b/y.png": Metadata()}
    assert metadata_digest(known) == "f2818846d3023962b0fb5f8161661fd07570805c99e40dacd3136f5964df157d"
    assert metadata_digest(known, {"age": {"a/x.png": "50"}}) != metadata_digest(known)


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
        manifest = build_dataset(
            mutable, tmp_path / str(seed), BuildOptions(image_size=16, workers=1, seed=seed)
        ).manifest
        assert manifest.excluded == [], "a patient with images of two classes is no contradiction"
        for patient in set(patient_of.values()):
            assert len({row.split for row in manifest.rows if row.patient == patient}) == 1
        verify_dataset(tmp_path / str(seed))
    (mutable / "metadata.csv").write_text("\n".join(["path,patient", *lines[1:]]))
    again = build_dataset(mutable, tmp_path / "0", BuildOptions(image_size=16, workers=1))
    assert not again.reused
    assert again.changes[0].startswith("metadata ")


def test_published_splits_ignore_patients(mutable: Path, tmp_path: Path) -> None:
    paths = [image.path for image in find_images(mutable)]
    (mutable / "metadata.csv").write_text("\n".join(["path,patient", *(f"{path},one" for path in paths)]))
    manifest = build_dataset(
        mutable, tmp_path / "d", BuildOptions(image_size=16, workers=1, split="published")
    ).manifest
    counts = {name.replace(" ", "_"): count for name, count in COUNTS.items()}
    assert manifest.counts == {split: {n: split_sizes(c)[split] for n, c in counts.items()} for split in SPLITS}
    with pytest.raises(UserError, match=r"has no image for the (train|validation|test) split"):
        build_dataset(mutable, tmp_path / "e", BuildOptions(image_size=16, workers=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\nCOVID/images/COVID-1.png", "needs the column path .*, and patient or source .*; its columns are path$"),
        ("source\nx", "needs the column path"),
        ("paht,patient\nx,y", r"its columns are patient, paht .rename it to path.."),
        ("file_name,view,age\nx,y,1", r"patient or source .*; its columns are file_name, view, age$"),
        ("path,patients\nx,y", r"its columns are path, patients .rename it to patient.."),
        ("path,source\nCOVID/images/COVID-1.png,a,b", "line 2 has 3 fields where the first line has 2; quote"),
        ("", "its columns are none"),
        (
            "path,source\nnone.png,x",
            "none of its 1 lines names an image .line 2: 'none.png'.; paths are relative to .*, such as 'COVID/images/",
        ),
        ("path,source\nCOVID/images/COVID-1.png,x\nCOVID/images/COVID-1.png,y", "line 3: .* occurs twice"),
        ("\xff", "not a CSV file in UTF-8"),
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


def test_a_sheet_that_fits_is_not_spoken_of(mutable: Path) -> None:
    names = [path.stem for path in sorted((mutable / "COVID/images").iterdir())]
    write_sheet(mutable / "COVID.metadata.xlsx", [("FILE NAME", "URL"), *((name, "https://x") for name in names)])
    assert examine_metadata(mutable, find_images(mutable))[1] == []
    write_sheet(mutable / "COVID.metadata.xlsx", [("FILE NAME", "URL"), *((name, "https://x") for name in names[1:])])
    write_sheet(mutable / "Other.metadata.xlsx", [("FILE NAME", "URL"), ("Other-1", "https://x")])
    assert examine_metadata(mutable, find_images(mutable))[1] == [
        Note("COVID.metadata.xlsx: 19 of 20 images of COVID have a line", warning=False),
        Note("Other.metadata.xlsx: 0 of 1 lines name an image (Other-1 does not)", warning=True),
    ]
    (mutable / "metadata.csv").write_text("path,source\nCOVID/images/COVID-1.png,x\n")
    assert "2 *.metadata.xlsx are not" in examine_metadata(mutable, find_images(mutable))[1][-1].text


Write = Callable[[list[str]], bytes]


def table(
    header: str,
    row: Callable[[int, str], str],
    *,
    newline: str = "\n",
    encoding: str = "utf-8",
    change: Callable[[str], str] = str,
) -> Write:
    """A `metadata.csv` with a line for each path."""

    def write(paths: list[str]) -> bytes:
        lines = [header, *(row(number, change(path)) for number, path in enumerate(paths))]
        return newline.join([*lines, ""]).encode(encoding)

    return write


def patient(number: int) -> str:
    return f"p{number // 2}"


@pytest.mark.parametrize(
    "write",
    [
        table("path,patient", lambda n, p: f"{p},P{n // 2}"),
        table("path,patient_id", lambda n, p: f"{p},P{n // 2}"),
        table("File Name, Patient ID ", lambda n, p: f"{p},P{n // 2}"),
        table("filename;PatientID", lambda n, p: f"{p};P{n // 2}", newline="\r\n", encoding="utf-8-sig"),
        table("image\tpatient", lambda n, p: f"{p}\tP{n // 2}", newline="\r"),
        table("age,path,patient,view", lambda n, p: f"50,{p},P{n // 2},PA"),
        table("path,patient", lambda n, p: f"{p},P{n // 2},,"),
        table("path,patient", lambda n, p: f"{p},P{n // 2}\n{p},P{n // 2}\n"),
        table("path,patient", lambda n, p: f'"{p}","P{n // 2}"'),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=lambda path: path.replace("/", "\\")),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=lambda path: f"./{path}"),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=lambda path: rf"C:\\data\\{path}"),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=lambda path: path.rpartition("/")[2]),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=lambda path: Path(path).stem),
        table("path,patient", lambda n, p: f"{p},P{n // 2}", change=str.upper),
        table("path,patient", lambda n, p: f"{p}, {'Pp'[n % 2]}{n // 2} "),
    ],
)
def test_somebody_elses_metadata(mutable: Path, write: Write) -> None:
    found = find_images(mutable)
    paths = [image.path for image in found]
    (mutable / "metadata.csv").write_bytes(write(paths))
    known, notes = examine_metadata(mutable, found)
    assert known == {path: Metadata(patient=patient(number)) for number, path in enumerate(paths)}
    assert not any(note.warning for note in notes)


def test_columns_that_are_not_read_and_patients_in_several_spellings_are_said(mutable: Path, tmp_path: Path) -> None:
    paths = [image.path for image in find_images(mutable)]
    spelt = ["P0", "P0 ", "p0", "12", "12.0", "P 1", "P\u00a01", "", "nan", "N/A"]
    lines = ["path,patient,age", *(f"{path},{text},50" for path, text in zip(paths, spelt, strict=False))]
    (mutable / "metadata.csv").write_text("\n".join(lines))
    manifest = build_dataset(mutable, tmp_path / "d", BuildOptions(image_size=16, workers=1)).manifest
    assert [row.patient for row in manifest.rows[:10]] == ["p0"] * 3 + ["12"] * 2 + ["p 1"] * 2 + [None] * 3
    assert {key: len(rows) for key, rows in manifest.patients.items()} == {"p0": 3, "12": 2, "p 1": 2}
    assert [note.text for note in manifest.notes] == [
        "metadata.csv: 7 of 42 images have a patient",
        "metadata.csv: 3 patients are spelt in several ways, each taken as one patient ('P0', 'P0 ', 'p0')",
        "metadata.csv: columns that the manifest alone keeps: age",
    ]
    assert [note.warning for note in manifest.notes] == [True, False, False]
    assert manifest.extra == {"age": ("50",) * 10 + (None,) * 32}
    assert read_manifest(tmp_path / "d") == manifest
    for rows in manifest.patients.values():
        assert len({row.split for row in rows}) == 1


@given(st.text(max_size=8), st.sampled_from([str.upper, str.lower, str.swapcase, lambda t: f" {t}\t"]))
def test_a_patient_has_one_spelling(text: str, change: Callable[[str], str]) -> None:
    once = normalized_patient(text)
    if once is not None:
        assert normalized_patient(once) == once
    if text.isascii():
        assert normalized_patient(change(text)) == once


@pytest.mark.parametrize(
    ("text", "patient"),
    [
        ("12.0", "12"), ("007", "007"), ("1.5", "1.5"), ("\uff30\uff10", "p0"), ("Stra\u00dfe", "strasse"),
        ("", None), (" ", None), ("NaN", None), ("None", None), ("<NA>", None), ("unknown", None), ("0", "0"),
    ],
)  # fmt: skip
def test_spellings_of_patients(text: str, patient: str | None) -> None:
    assert normalized_patient(text) == patient


def test_lines_of_other_images_are_counted_and_warned_of(mutable: Path) -> None:
    paths = [image.path for image in find_images(mutable)]

    def notes(extra: int) -> list[Note]:
        lines = ["path,source", *(f"{path},x" for path in paths), *(f"COVID/other-{n}.png,x" for n in range(extra))]
        (mutable / "metadata.csv").write_text("\n".join(lines))
        return examine_metadata(mutable, find_images(mutable))[1]

    assert notes(0) == []
    assert notes(1) == [
        Note("metadata.csv: 42 of 43 lines name an image (line 44: 'COVID/other-0.png' does not)", warning=False)
    ]
    assert notes(10)[0].warning


def test_a_column_that_was_meant_to_be_read_is_warned_of(mutable: Path) -> None:
    (mutable / "metadata.csv").write_text("path,source,patients,age\nCOVID/images/COVID-1.png,x,p,50")
    notes = examine_metadata(mutable, find_images(mutable))[1]
    assert notes[-1] == Note(
        "metadata.csv: columns that the manifest alone keeps: patients (rename it to patient?), age", warning=True
    )


def test_an_ambiguous_name_is_no_image(mutable: Path) -> None:
    """A wrong patient is worse than none."""
    for name in ("COVID", "Normal"):
        shutil.copy(mutable / f"{name}/images/{name}-1.png", mutable / f"{name}/images/same.png")
    content = "path,patient\nsame.png,a\nsame,b\nOther/images/COVID-2.png,c\nNormal/images/same.png,d\n"
    (mutable / "metadata.csv").write_text(content)
    known, notes = examine_metadata(mutable, find_images(mutable))
    assert known == {"Normal/images/same.png": Metadata(patient="d")}
    assert "1 of 4 lines name an image (line 2: 'same.png' does not)" in notes[0].text
