"""Folders as people have them: each is read, or refused with what was seen and what to do."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_dist.cli import main
from tests.tfrecords_builder.conftest import write_images
from tfrecords_builder.build import BuildOptions, BuildSummary, build_dataset
from tfrecords_builder.collection.collect import read_collection
from tfrecords_builder.collection.file_kinds import Reason
from tfrecords_builder.collection.find import list_source
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.splitting.splits import SPLITS
from tfrecords_builder.verify import verify_dataset

CLASSES = {"COVID": 12, "Normal": 12, "Viral Pneumonia": 9}
NAMES = {"COVID": 12, "Normal": 12, "Viral_Pneumonia": 9}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Three classes, directly in the class folders."""
    return write_images(tmp_path / "source", CLASSES, database_layout=False)


def counts(root: Path) -> dict[str, int]:
    return dict(Counter(image.class_name for image in read_collection(root).images))


def notes(root: Path) -> list[str]:
    return [note.text for note in read_collection(root).notes]


def pngs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def build(source: Path, dataset: Path, **options: object) -> BuildSummary:
    return build_dataset(source, dataset, BuildOptions(image_size=16, workers=1, **options))  # type: ignore[arg-type]


def to_patients(folder: Path, files: list[Path]) -> None:
    for number, file in enumerate(files):
        patient = folder / f"patient{number // 2}"
        patient.mkdir(exist_ok=True)
        file.rename(patient / file.name)


# Folders below and above the class folders


def test_images_in_deeper_folders_are_taken_and_said(flat: Path, tmp_path: Path) -> None:
    (flat / "COVID/2020/March").mkdir(parents=True)
    for file in pngs(flat / "COVID")[:3]:
        file.rename(flat / "COVID/2020/March" / file.name)
    to_patients(flat / "Normal", pngs(flat / "Normal"))
    assert counts(flat) == NAMES
    assert notes(flat) == [
        "images in folders below their class folder: 3 of COVID (COVID/2020/March/COVID-0.png), 12 of Normal "
        "(Normal/patient0/Normal-0.png); where these are patients, say so in a table (metadata.csv)"
    ]
    manifest = build(flat, tmp_path / "d").manifest
    assert len(manifest.rows) == 33
    verify_dataset(tmp_path / "d")


def test_all_classes_in_folders_of_patients(flat: Path) -> None:
    for name in CLASSES:
        to_patients(flat / name, pngs(flat / name))
    assert counts(flat) == NAMES, "two images of a patient make no class of its folder"


def test_masks_of_images_that_have_one_name_in_several_folders(tmp_path: Path) -> None:
    images = ("A/p1/1.png", "A/p2/images/1.png", "A/p3/1.png", "B/x.png")
    for path in (*images, "A/p1/masks/1.png", "A/p2/Masks/1_mask.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert {image.path: image.mask for image in list_source(tmp_path).images} == {
        "A/p1/1.png": "A/p1/masks/1.png",
        "A/p2/images/1.png": "A/p2/Masks/1_mask.png",
        "A/p3/1.png": None,
        "B/x.png": None,
    }


@pytest.mark.parametrize("wrapper", ["data", "a/b/c", "images"])
def test_a_folder_around_the_classes(flat: Path, tmp_path: Path, wrapper: str) -> None:
    root = tmp_path / "wrapper"
    (root / wrapper).parent.mkdir(parents=True)
    flat.rename(root / wrapper)
    (root / "README.md").write_text("read me")
    (root / "__MACOSX/x").mkdir(parents=True)
    (root / "__MACOSX/x/._COVID-0.png").write_bytes(b"")
    (root / "loose.png").write_bytes(b"")
    assert counts(root) == NAMES
    assert notes(root) == [f"the classes are the folders of {wrapper}"]
    reasons = {item.reason: item.files for item in list_source(root).not_taken}
    assert reasons == {Reason.DOCUMENT: 1, Reason.SYSTEM: 1, Reason.LOOSE: 1}


def test_a_table_in_the_folder_around_the_classes(flat: Path, tmp_path: Path) -> None:
    paths = [path.relative_to(flat).as_posix() for path in pngs(flat)]
    (flat / "metadata.csv").write_text("\n".join(["path,patient", *(f"{path},{path}" for path in paths)]))
    (tmp_path / "root").mkdir()
    flat.rename(tmp_path / "root/data")
    found = read_collection(tmp_path / "root")
    assert len({about.patient for about in found.metadata.values()}) == 33
    assert [item.reason for item in found.not_taken] == [Reason.SHEET]


def test_an_empty_folder_may_be_a_class_so_nothing_wraps_the_rest(flat: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    to_patients(flat / "COVID", pngs(flat / "COVID"))
    (flat / "COVID").rename(root / "COVID")
    (root / "Normal").mkdir()
    with pytest.raises(UserError, match="Normal: this class folder contains no image"):
        list_source(root)


def test_collections_beside_one_another_are_refused(flat: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(flat, root / "hospital1")
    shutil.copytree(flat, root / "hospital2")
    with pytest.raises(UserError, match=r"the folders hospital1, hospital2 hold folders of the same names.*--labels"):
        list_source(root)


# A given split


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """train, val and test of two classes, with leaks: a file twice, and persons that a table names."""
    root = tmp_path / "divided"
    for number, (name, count) in enumerate({"train": 24, "val": 8, "test": 10}.items()):
        of = {"NORMAL": count, "PNEUMONIA": count}
        write_images(root / name, of, database_layout=False, size=20 + number)
    shutil.copy(root / "train/NORMAL/NORMAL-3.png", root / "test/NORMAL/copy.png")
    return root


def wrapped(root: Path) -> Path:
    inner = root / "chest_xray"
    inner.mkdir()
    for name in ("train", "val", "test"):
        (root / name).rename(inner / name)
    return root


def plain(root: Path) -> Path:
    return root


@pytest.mark.parametrize("change", [plain, wrapped])
def test_a_given_split_is_kept_and_its_leaks_are_said(
    divided: Path, tmp_path: Path, change: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = change(divided)
    main.main(["build", str(source), str(tmp_path / "d"), "--image-size", "16", "--workers", "1"])
    lines = capsys.readouterr().out.splitlines()
    manifest = read_manifest(tmp_path / "d")
    assert manifest.settings.split_rule.startswith("given:")
    folder_of = {"train": "train", "validation": "val", "test": "test"}
    for row in manifest.rows:
        assert row.split is not None
        assert f"{folder_of[row.split]}/{row.class_name}/" in row.path
    assert manifest.counts == {
        "train": {"NORMAL": 24, "PNEUMONIA": 24},
        "validation": {"NORMAL": 8, "PNEUMONIA": 8},
        "test": {"NORMAL": 11, "PNEUMONIA": 10},
    }
    assert any("are near-duplicates" in line and "in more than one split" in line for line in lines)
    assert "note: the given split is kept; --split leak-free divides all images anew" in lines
    [few] = [line for line in lines if "validation images" in line]
    assert few.startswith("warning: the given split has 16 validation images (8 of NORMAL, 8 of PNEUMONIA), too few")
    verify_dataset(tmp_path / "d")


def test_leak_free_replaces_a_given_split(divided: Path, tmp_path: Path) -> None:
    given = build(divided, tmp_path / "d").manifest
    summary = build(divided, tmp_path / "d", split="leak-free")
    assert summary.changes[0].startswith("split_rule given:")
    anew = summary.manifest
    for rows in anew.near_duplicates.values():
        assert len({row.split for row in rows} - {None}) == 1
    assert {row.path: row.split for row in anew.rows} != {row.path: row.split for row in given.rows}
    assert "the given split is replaced (--split leak-free)" in [note.text for note in anew.notes]
    assert build(divided, tmp_path / "d").changes, "without the option it is the given one again"


def test_patients_that_cross_a_given_split_are_said(
    divided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [path.relative_to(divided).as_posix() for path in pngs(divided)]
    lines = [f"{path},{'P0' if n % 20 == 0 else n}" for n, path in enumerate(paths)]
    (divided / "metadata.csv").write_text("\n".join(["path,patient", *lines]))
    main.main(["build", str(divided), "--dry-run"])
    assert "warning: 1 of 81 patients would be in more than one split" in capsys.readouterr().out.splitlines()
    main.main(["build", str(divided), str(tmp_path / "d"), "--image-size", "16", "--workers", "1"])
    assert "1 patient has several images; warning: 1 patient is in more than one split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Train", "Valid", "Test"), SPLITS),
        (("training", "validation", "testing"), SPLITS),
        (("train", "dev", "TEST"), SPLITS),
    ],
)
def test_names_of_splits(divided: Path, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    for old, new in zip(("train", "val", "test"), names, strict=True):
        (divided / old).rename(divided / f"{new}_")
        (divided / f"{new}_").rename(divided / new)
    split_of = read_collection(divided).split_of
    assert split_of is not None
    for name, split in zip(names, expected, strict=True):
        assert split_of[f"{name}/NORMAL/NORMAL-0.png"] == split


def test_a_split_that_lacks_a_class_or_is_missing_names_the_way_on(divided: Path, tmp_path: Path) -> None:
    shutil.rmtree(divided / "val")
    with pytest.raises(UserError, match=r"no image for the validation split .*--split leak-free"):
        build(divided, tmp_path / "d")
    assert build(divided, tmp_path / "d", split="leak-free").manifest.counts["validation"]["NORMAL"] > 0
    shutil.rmtree(divided / "test")
    assert read_collection(divided).split_of is None, "a folder train alone wraps the classes"


def test_pictures_beside_the_folders_of_the_splits(divided: Path) -> None:
    shutil.copytree(divided / "train", divided / "again/train")
    with pytest.raises(UserError, match=r"again 48 of 48 \(48 \.png: images beside the folders of the splits\); move"):
        read_collection(divided)
    found = read_collection(divided, "skip")
    assert len(found.images) == 85
    assert any(note.warning and "again 48 of 48" in note.text for note in found.notes)


@pytest.mark.parametrize("name", ["normal", "NORMAL\u00b2"])
def test_a_class_that_is_named_otherwise_in_another_split(divided: Path, name: str) -> None:
    (divided / "train/NORMAL2").mkdir()
    shutil.copy(divided / "train/NORMAL/NORMAL-1.png", divided / "train/NORMAL2")
    (divided / "val/NORMAL").rename(divided / "val" / name)
    with pytest.raises(UserError, match=r"folders '.*' and '.*' are but for case or Unicode form both class"):
        read_collection(divided)


def test_an_empty_class_of_one_split_is_named(divided: Path, tmp_path: Path) -> None:
    shutil.rmtree(divided / "val/NORMAL")
    (divided / "val/NORMAL").mkdir()
    assert "empty folders: val/NORMAL" in notes(divided)
    with pytest.raises(UserError, match="class 'NORMAL' has no image for the validation split"):
        build(divided, tmp_path / "d")


# A build that is not done


def test_a_dry_run_says_what_would_be_taken_and_writes_nothing(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (flat / "x.heic").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    for dataset in ([], [str(tmp_path / "d")]):
        main.main(["build", str(flat), *dataset, "--dry-run"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "not taken: 1 .heic: images outside of the class folders (x.heic)",
            "files: 34 (images: 33, masks: 0, not taken: 1)",
        ]
        assert lines[-1] == "dry run: nothing was written"
    assert sorted(tmp_path.rglob("*")) == before
    main.main(["build", str(flat), str(tmp_path / "d"), "--image-size", "16", "--workers", "1"])
    done = capsys.readouterr().out.splitlines()
    assert done[:7] == lines[:7], "without near-duplicates the build does just that"


def test_a_dry_run_has_the_errors_of_the_build(flat: Path) -> None:
    for file in pngs(flat / "COVID"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(SystemExit) as caught:
        main.main(["build", str(flat), "--dry-run"])
    assert caught.value.code == 2


def test_a_build_needs_a_dataset(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["build", str(flat)])
    assert capsys.readouterr().err.startswith("error: DATASET: is missing")
