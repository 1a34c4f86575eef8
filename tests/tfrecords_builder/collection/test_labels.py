"""Labels from a table, whoever wrote it: given as --labels, or `metadata.csv` in place."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.cli import main
from cxr_dist.data.image_folder import FolderSource
from tests.tfrecords_builder.conftest import write_images
from tfrecords_builder.build import BuildOptions, BuildSummary, build_dataset
from tfrecords_builder.collection.collect import Collection, read_collection
from tfrecords_builder.collection.file_kinds import Note, Reason
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import MANIFEST_NAME, read_manifest
from tfrecords_builder.verify import verify_dataset

LABELS = ("COVID", "Lung Opacity", "Normal")
NAMES = {"COVID": 12, "Lung_Opacity": 12, "Normal": 12}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """36 images of no class, in two folders."""
    return write_images(tmp_path / "source", {"batch1": 18, "batch2": 18}, database_layout=False)


def paths_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def label_of(number: int) -> str:
    return LABELS[number % 3]


def build(source: Path, dataset: Path, **options: object) -> BuildSummary:
    return build_dataset(source, dataset, BuildOptions(image_size=16, workers=1, **options))  # type: ignore[arg-type]


def counts(found: Collection) -> dict[str, int]:
    return dict(Counter(image.class_name for image in found.images))


Write = Callable[[Path, list[str]], Path]


def text(
    header: str,
    row: Callable[[int, str], str],
    name: str = "labels.csv",
    newline: str = "\n",
    encoding: str = "utf-8",
) -> Write:
    def write(folder: Path, paths: list[str]) -> Path:
        lines = [header, *(row(number, path) for number, path in enumerate(paths)), ""]
        (folder / name).write_bytes(newline.join(lines).encode(encoding))
        return folder / name

    return write


def parquet(folder: Path, paths: list[str]) -> Path:
    numbers = range(len(paths))
    table = pa.table(
        {
            "file_name": pa.array(paths),
            "label": pa.array([label_of(n) for n in numbers]).dictionary_encode(),
            "patient_id": pa.array([n // 2 for n in numbers]),
            "age": pa.array([None if n % 5 == 0 else 40 + n for n in numbers], pa.float64()),
            "image": pa.array([b"x"] * len(paths)),
        }
    )
    pq.write_table(table, folder / "labels.parquet")
    return folder / "labels.parquet"


@pytest.mark.parametrize(
    "write",
    [
        text("path,label,patient", lambda n, p: f"{p},{label_of(n)},P{n // 2}"),
        text("file_name\tlabel\tpatient_id", lambda n, p: f"{p}\t{label_of(n)}\tP{n // 2}", "labels.tsv"),
        text(
            "File Name;Label;Patient",
            lambda n, p: f"{p};{label_of(n)};p{n // 2} ",
            newline="\r\n",
            encoding="utf-8-sig",
        ),
        text("image,class,patient,split", lambda n, p: f"{p},{label_of(n)},P{n // 2},"),
        text("path,label,patient", lambda n, p: "C:\\\\data\\\\" + p.replace("/", "\\") + f",{label_of(n)},P{n // 2}"),
        text("path,label,patient", lambda n, p: f'"{p}"," {label_of(n)} ","P{n // 2}"'),
        text("path,label,patient", lambda n, p: f"{Path(p).stem},{label_of(n)},P{n // 2}"),
        parquet,
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_labels_from_a_table(scans: Path, tmp_path: Path, write: Write, beside: bool) -> None:
    paths = paths_of(scans)
    file = write(tmp_path if beside else scans, paths)
    found = read_collection(scans, labels=file)
    assert [(image.path, image.class_name) for image in found.images] == [
        (path, label_of(number).replace(" ", "_")) for number, path in enumerate(paths)
    ]
    patients = [found.metadata[path].patient for path in paths]
    assert [str(patient).removeprefix("p") for patient in patients] == [str(number // 2) for number in range(36)]
    assert found.not_taken == () if beside else [item.reason for item in found.not_taken] == [Reason.SHEET]
    assert found.split_of is None
    assert f"the classes are the labels of {file.name}" in [note.text for note in found.notes]


def test_further_columns_are_kept_in_the_manifest(scans: Path, tmp_path: Path) -> None:
    lines = [f"{p},{label_of(n)},{40 + n},{'FM'[n % 2]},PA,g{n},h" for n, p in enumerate(paths_of(scans))]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["file_name,label,age,Sex,view position,group,source", *lines]))
    summary = build(scans, tmp_path / "d", labels=file)
    manifest = read_manifest(tmp_path / "d")
    assert manifest == summary.manifest
    rows = pq.read_table(tmp_path / "d" / MANIFEST_NAME).to_pylist()
    assert [row["age"] for row in rows] == [str(40 + n) for n in range(36)]
    assert {row["Sex"] for row in rows} == {"F", "M"}
    assert {row["view position"] for row in rows} == {"PA"}
    assert [row["group_of_table"] for row in rows] == [f"g{n}" for n in range(36)], "`group` is the manifest's own"
    assert {row["source"] for row in rows} == {"h"}
    verify_dataset(tmp_path / "d")
    assert build(scans, tmp_path / "d", labels=file).reused
    file.write_text(file.read_text().replace(",40,", ",41,"))
    assert build(scans, tmp_path / "d", labels=file).changes[0].startswith("metadata ")


def test_a_split_in_the_table(scans: Path, tmp_path: Path) -> None:
    words = ("train", "Train", "VAL", "test")
    lines = [f"{p},{label_of(n)},{words[n // 3 % 4]},{n // 6}" for n, p in enumerate(paths_of(scans))]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["path,label,split,patient", *lines]))
    manifest = build(scans, tmp_path / "d", labels=file).manifest
    of = {"train": "train", "VAL": "validation", "test": "test", "Train": "train"}
    assert [row.split for row in manifest.rows] == [of[words[n // 3 % 4]] for n in range(36)]
    assert manifest.patients, "and groups that cross it are told by the patients"
    assert any(len({row.split for row in rows}) > 1 for rows in manifest.patients.values())
    leak_free = build(scans, tmp_path / "e", labels=file, split="leak-free").manifest
    assert all(len({row.split for row in rows}) == 1 for rows in leak_free.patients.values())
    file.write_text(file.read_text().replace(",VAL,", ",,", 1))
    partly = build(scans, tmp_path / "f", labels=file).manifest
    assert [reason for _, reason in partly.excluded] == ["is not in the given split"]
    assert Note("1 of 36 images are left out, as they have no split", warning=True) in partly.notes
    file.write_text(file.read_text().replace(",VAL,", ",fold3,", 1))
    with pytest.raises(UserError, match=r"labels\.csv: line \d+: split 'fold3' is not one of train, validation, test"):
        read_collection(scans, labels=file)


# Tables in place


@pytest.mark.parametrize("inner", ["", "images", "batch1"])
def test_metadata_in_place_gives_the_labels_of_images_without_class_folders(
    scans: Path, tmp_path: Path, inner: str
) -> None:
    root = tmp_path / "hf"
    (root / inner).mkdir(parents=True)
    for path in paths_of(scans):
        shutil.copy(scans / path, root / inner / Path(path).name)
    lines = [f"{p},{label_of(n)}" for n, p in enumerate(paths_of(root))]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert counts(read_collection(root)) == NAMES
    manifest = build(root, tmp_path / "d").manifest
    assert manifest.class_names == tuple(NAMES)
    source = FolderSource(root, tuple(NAMES), 16)
    assert source.count == 36
    assert Counter(source.labels.tolist()) == {0: 12, 1: 12, 2: 12}


def test_metadata_in_each_folder_of_a_split(scans: Path, tmp_path: Path) -> None:
    """The same file names in each: paths are relative to the table."""
    root = tmp_path / "hf"
    for place, split in enumerate(("train", "validation", "test")):
        (root / split).mkdir(parents=True)
        names = []
        for number, path in enumerate(paths_of(scans)[12 * place : 12 * place + 12]):
            names.append(f"{number:04}.png")
            shutil.copy(scans / path, root / split / names[-1])
        lines = [f"{name},{label_of(n + place)},{n}" for n, name in enumerate(names)]
        (root / split / "metadata.csv").write_text("\n".join(["file_name,label,age", *lines]))
    manifest = build(root, tmp_path / "d").manifest
    assert manifest.counts == {split: dict.fromkeys(NAMES, 4) for split in ("train", "validation", "test")}
    assert [row.class_name for row in manifest.rows if row.path == "test/0000.png"] == ["Normal"]
    assert manifest.extra["age"] == tuple(str(n) for n in range(12)) * 3
    assert {(item.reason, item.files) for item in manifest.not_taken} == {(Reason.SHEET, 3)}


def test_metadata_in_the_only_folder(scans: Path, tmp_path: Path) -> None:
    root = tmp_path / "hf"
    (root / "train").mkdir(parents=True)
    for path in paths_of(scans):
        shutil.copy(scans / path, root / "train" / Path(path).name)
    lines = [f"{Path(p).name},{label_of(n)}" for n, p in enumerate(paths_of(root))]
    (root / "train/metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    found = read_collection(root)
    assert counts(found) == NAMES
    assert found.split_of is None


def test_labels_beside_class_folders_must_agree(tmp_path: Path) -> None:
    root = write_images(tmp_path / "source", {"COVID": 8, "Viral Pneumonia": 8}, database_layout=False)
    paths = paths_of(root)
    own = [path.split("/")[0] for path in paths]

    def table(labels: list[str]) -> None:
        lines = [f"{path},{label},{n}" for n, (path, label) in enumerate(zip(paths, labels, strict=True))]
        (root / "metadata.csv").write_text("\n".join(["file_name,label,age", *lines]))

    table([name.lower() for name in own])
    found = read_collection(root)
    assert counts(found) == {"COVID": 8, "Viral_Pneumonia": 8}
    assert len(found.extra["age"]) == 16
    table([str(LABELS.index("COVID")) for _ in own])
    with pytest.raises(
        UserError, match=r"gives 'COVID/COVID-0\.png' the label '0', but its folder is class 'COVID'.*--labels"
    ):
        read_collection(root)
    table([("a", "b")[n % 2] for n in range(16)])
    assert counts(read_collection(root, labels=root / "metadata.csv")) == {"a": 8, "b": 8}


def test_numbers_with_gaps_are_one_label(scans: Path, tmp_path: Path) -> None:
    file = text("path,label", lambda n, p: f"{p},{n % 2}" + (".0" if n % 3 else ""))(tmp_path, paths_of(scans))
    assert counts(read_collection(scans, labels=file)) == {"0": 18, "1": 18}


# What is wrong with a table


def test_images_without_a_label_are_counted_and_warned_of(scans: Path, tmp_path: Path) -> None:
    shown = [f"{p},{label_of(n)}" for n, p in enumerate(paths_of(scans))]
    lines = [line if n < 24 else line.partition(",")[0] + ",nan" for n, line in enumerate(shown[:30])]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["path,label", *lines]))
    found = read_collection(scans, labels=file)
    assert len(found.images) == 24
    assert {(item.reason, item.suffix, item.files) for item in found.not_taken} == {(Reason.UNLABELLED, ".png", 12)}
    assert Note("12 of 36 images have no label in labels.csv", warning=True) in found.notes


def test_lines_of_a_class_whose_images_are_not_there_are_an_error(scans: Path, tmp_path: Path) -> None:
    paths = paths_of(scans)
    for number, path in list(enumerate(paths))[::3]:
        paths[number] = path.replace(".png", ".heic")
        (scans / path).rename(scans / paths[number])
    file = text("path,label", lambda n, p: f"{p},{label_of(n)}")(tmp_path, paths)
    (scans / paths[1]).unlink()
    with pytest.raises(UserError) as caught:
        read_collection(scans, labels=file)
    message = str(caught.value)
    assert "labels.csv: images would be lost: COVID 12 of 12 (12 .heic: images in another format)" in message
    assert "Lung_Opacity 1 of 12 (1 .png: named in the table, without one file of that name)" in message
    assert "convert images" in message
    assert message.endswith("add the files, or remove their lines, or leave them out (build --on-error skip)")
    found = read_collection(scans, "skip", labels=file)
    assert counts(found) == {"Lung_Opacity": 11, "Normal": 12}
    assert sum(note.warning and note.text.startswith("left out by --on-error skip") for note in found.notes) == 2
    assert {(item.reason, item.files) for item in found.not_taken} == {(Reason.FORMAT, 12)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "path,lable\nx,y",
            r"needs the column path .*, and label .*; its columns are path, lable .rename it to label..",
        ),
        ("pth;label\nx;y", r"its columns are label, pth .rename it to path."),
        ("a,b\n1,2", "its columns are a, b"),
        ("path,label\nnone.png,x", r"none of its 1 lines names an image .line 2: 'none.png'.; .* such as 'batch1/"),
        ("path,label\nbatch1-1.png,x\nbatch1/batch1-1.png,y", "line 3: .* occurs twice, with different values"),
        ("path,label\nbatch1-1.png,Normal\nbatch1-2.png,normal", "labels 'Normal' and 'normal' differ but for case"),
        ("path,label\nbatch1-1.png,\u00c5\nbatch1-2.png,A\u030a", None),
        ("path,label\nbatch1-1.png,", "gives no image a label"),
        ("PAR1 but not a table", "is not a Parquet file"),
        ("\x00\udcff", "is not a CSV file in UTF-8"),
    ],
)
def test_a_table_that_cannot_be_used(scans: Path, tmp_path: Path, content: str, message: str | None) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(content.encode(errors="surrogateescape"))
    if message is None:
        assert len({image.class_name for image in read_collection(scans, labels=file).images}) == 1
        return
    with pytest.raises(UserError, match=message) as caught:
        read_collection(scans, labels=file)
    assert "labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_missing(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["build", str(scans), "--labels", "none.csv", "--dry-run"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: none.csv: cannot be read (No such file or directory)")


def test_masks_of_images_that_a_table_labels(scans: Path, tmp_path: Path) -> None:
    paths = paths_of(scans)
    (scans / "batch1/masks").mkdir()
    shutil.copy(scans / paths[0], scans / "batch1/masks" / Path(paths[0]).name)
    shutil.copy(scans / paths[1], scans / "batch1/masks" / Path(paths[1]).name)
    shutil.copy(scans / paths[2], scans / f"{paths[2].removesuffix('.png')}_mask.png")
    named = [path for path in paths if path != paths[1]]
    file = text("path,label", lambda n, p: f"{p},{label_of(n)}")(tmp_path, named)
    found = read_collection(scans, labels=file)
    assert {image.path: image.mask for image in found.images if image.mask} == {
        paths[0]: f"batch1/masks/{Path(paths[0]).name}",
        paths[2]: f"{paths[2].removesuffix('.png')}_mask.png",
    }
    assert {(item.reason, item.files) for item in found.not_taken} == {
        (Reason.UNLABELLED, 1),
        (Reason.MASK_UNUSED, 1),
    }
    named = [path for path in paths_of(scans) if "/masks/" not in path]
    file = text("path,label", lambda n, p: f"{p},{label_of(n)}")(tmp_path, named)
    assert len(read_collection(scans, labels=file).images) == 37, "what a table labels is an image, not a mask"
