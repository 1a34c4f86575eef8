"""Files that a plain walk finds are files that a collection accounts for, in any tree."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_dist.cli import main
from tests.tfrecords_builder.conftest import write_images
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.collect import Collection, read_collection
from tfrecords_builder.collection.layout import Sorted, recognise, sort_files
from tfrecords_builder.collection.scan import scan
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.eda.analysis import analyse
from tfrecords_builder.format.manifest import Manifest, read_manifest

PNG = b"\x89PNG\r\n\x1a\n"
SUFFIXES = (".png",) * 12 + (".jpg", ".JPEG", ".heic", ".nii.gz", ".txt", "", ".unknown", ".7")
CLASSES = ("COVID", "Lung Opacity", "Å", "normal", "2", "Test", "data")
ODD_FOLDERS = ("__MACOSX", ".ipynb_checkpoints", ".git", "masks", "Masks", "images", "empty", "line\nend", "lost+found")
ODD_FILES = (
    "._x.png",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "README",
    "notes.pdf",
    "x_mask.png",
    "\udcff.txt",
    "~$a.doc",
)


def walked(root: Path) -> int:
    """Files, and links to folders: what an independent walk finds that is no real folder."""
    return sum(
        len(files) + sum(Path(folder, name).is_symlink() for name in folders)
        for folder, folders, files in os.walk(root)
    )


def in_sorted(files: Sorted) -> int:
    folders = [files.loose, *files.folders.values()]
    counted = sum(item.files for item in files.not_taken)
    return counted + sum(len(folder.images) + len(folder.masks) for folder in folders)


def in_collection(found: Collection | Manifest, images: list[tuple[str, str | None]]) -> int:
    masks = {mask for _, mask in images if mask is not None}
    return len(images) + len(masks) + sum(item.files for item in found.not_taken)


class Tree:
    """A random collection of one of the layouts, with odd things in it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        root.mkdir()
        classes = self.random.sample(CLASSES, self.random.randint(1, 4))
        layouts: list[Callable[[Path, list[str]], None]] = [
            self.plain, self.plain, self.database, self.patients, self.splits, self.splits, self.flat, self.sites
        ]  # fmt: skip
        inner = root / "data" / "all" if self.random.random() < 0.3 else root
        self.random.choice(layouts)(inner, classes)
        if self.random.random() < 0.3:
            self.table()
        for _ in range(self.random.randint(0, 12)):
            self.odd()

    def plain(self, root: Path, classes: list[str]) -> None:
        for name in classes:
            self.pictures(root / name)

    def database(self, root: Path, classes: list[str]) -> None:
        for name in classes:
            self.pictures(root / name / "images")
            self.pictures(root / name / "masks")

    def patients(self, root: Path, classes: list[str]) -> None:
        for name in classes:
            for number in range(self.random.randint(1, 3)):
                self.pictures(root / name / f"p{number}")

    def splits(self, root: Path, classes: list[str]) -> None:
        for split in self.random.sample(("train", "val", "valid", "validation", "test", "Training"), 3):
            self.random.choice((self.plain, self.plain, self.patients, self.flat))(root / split, classes)

    def flat(self, root: Path, _: list[str]) -> None:
        self.pictures(root)

    def sites(self, root: Path, classes: list[str]) -> None:
        for site in ("one", "two"):
            self.plain(root / site, classes)

    def pictures(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.random.randint(0, 12)):
            (folder / f"{number}{self.random.choice(SUFFIXES)}").write_bytes(PNG)

    def folders(self) -> list[Path]:
        return [Path(folder) for folder, _, _ in os.walk(self.root)]

    def table(self) -> None:
        paths = [Path(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        lines = [
            f"{path.relative_to(self.root)},{self.random.choice('ab')},{number % 3}"
            for number, path in enumerate(paths)
        ]
        (self.root / "metadata.csv").write_text("\n".join(["file_name,label,patient", *lines]))

    def odd(self) -> None:
        folder = self.random.choice(self.folders())
        match self.random.randint(0, 5):
            case 0:
                inner = folder / self.random.choice(ODD_FOLDERS)
                inner.mkdir(exist_ok=True)
                if "empty" not in inner.name:
                    self.pictures(inner)
            case 1 | 2:
                (folder / self.random.choice(ODD_FILES)).write_bytes(PNG)
            case 3:
                target = self.random.choice((".", "..", "/nowhere.png", "0.png", "1.png", "COVID", str(self.root)))
                link = folder / self.random.choice(("link.png", "link", "images", "link.heic"))
                if not os.path.lexists(link):
                    link.symlink_to(target)
            case 4:
                if not os.path.lexists(folder / "pipe.png"):
                    os.mkfifo(folder / "pipe.png")
            case 5:
                first = next((path for path in folder.iterdir() if path.is_file() and not path.is_symlink()), None)
                if first is not None and not os.path.lexists(folder / "hard.png"):
                    (folder / "hard.png").hardlink_to(first)


@pytest.mark.parametrize("trees", [60, pytest.param(300, marks=pytest.mark.nightly)])
def test_every_file_of_a_random_tree_is_accounted_for(tmp_path: Path, trees: int) -> None:
    accepted = 0
    for seed in range(trees):
        root = tmp_path / str(seed) / "source"
        root.parent.mkdir()
        Tree(root, seed)
        walk, files = scan(root), walked(root)
        layout = recognise(walk)
        assert len(walk.files) == files, seed
        assert in_sorted(sort_files(walk, layout)) == files, seed
        for masks in ("read", "ignore"):
            try:
                found = read_collection(root, "skip", masks)
            except UserError:
                continue
            accepted += masks == "read"
            paths = [image.path for image in found.images]
            assert len(paths) == len(set(paths)), seed
            assert in_collection(found, [(image.path, image.mask) for image in found.images]) == files, seed
    assert accepted > trees / 4


def test_build_manifest_and_analysis_give_the_same_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(tmp_path / "source", {"COVID": 12, "Normal": 12})
    (source / "COVID/masks").mkdir()
    (source / "COVID/masks/COVID-1.png").write_bytes((source / "COVID/images/COVID-1.png").read_bytes())
    for path in ("COVID/x.heic", "README.md", ".DS_Store", "Normal/images/notes.unknown", "loose.png"):
        (source / path).write_bytes(b"")
    arguments = ["build", str(source), str(tmp_path / "d"), "--image-size", "16", "--workers", "1"]
    for again in (["--on-error", "skip"], ["--on-error", "skip", "--dry-run"]):
        main.main([*arguments, *again])
        assert "files: 30 (images: 24, masks: 1, not taken: 5)" in capsys.readouterr().out.splitlines()
    manifest = read_manifest(tmp_path / "d")
    assert in_collection(manifest, [(row.path, row.mask) for row in manifest.rows]) == walked(source) == 30
    numbers = analyse(tmp_path / "d").numbers["source_folder"]
    assert numbers["files"] == 30
    assert sum(item["files"] for item in numbers["not_taken"]) == 5


def test_a_class_that_is_left_out_is_said_in_manifest_and_analysis(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"COVID": 12, "Normal": 12, "Other": 9})
    for file in list((source / "Other/images").iterdir()):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"Other 9 of 9 \(9 \.heic: .*convert .*--on-error skip"):
        build_dataset(source, tmp_path / "d", BuildOptions(image_size=16, workers=1))
    build_dataset(source, tmp_path / "d", BuildOptions(image_size=16, workers=1, on_error="skip"))
    notes = analyse(tmp_path / "d").numbers["source_folder"]["notes"]
    assert notes == [
        {
            "text": "no class, as none of its pictures is taken: Other 9 of 9 (9 .heic: images in another format)",
            "warning": True,
        }
    ]
