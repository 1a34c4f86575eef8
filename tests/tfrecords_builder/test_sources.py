from pathlib import Path

import pytest

from tfrecords_builder.errors import UserError
from tfrecords_builder.sources import SourceImage, class_counts, find_images


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def test_both_layouts(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "COVID/images/b.png",
        "COVID/images/a.PNG",
        "COVID/masks/a.png",
        "COVID/COVID.metadata.xlsx",
        "Viral Pneumonia/x.jpeg",
        "Viral Pneumonia/y.jpg",
        "Viral Pneumonia/notes.txt",
        "Viral Pneumonia/.hidden.png",
        ".cache/z.png",
        "docs/read.txt",
        "loose.png",
    )
    found = find_images(tmp_path)
    assert found == [
        SourceImage("COVID/images/a.PNG", "COVID", "COVID/masks/a.png"),
        SourceImage("COVID/images/b.png", "COVID"),
        SourceImage("Viral Pneumonia/x.jpeg", "Viral_Pneumonia"),
        SourceImage("Viral Pneumonia/y.jpg", "Viral_Pneumonia"),
    ]
    assert class_counts(found) == {"COVID": 2, "Viral_Pneumonia": 2}


def test_images_beside_the_images_folder_are_not_lost(tmp_path: Path) -> None:
    touch(tmp_path, "A/images/x.png", "A/y.png")
    assert [image.path for image in find_images(tmp_path)] == ["A/images/x.png", "A/y.png"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no class folder"),
        (["a.png"], "no class folder"),
        (["docs/a.txt"], "no class folder"),
        (["A B/x.png", "A_B/x.png"], "are both class 'A_B'"),
        (["images/x.png", "masks/x.png"], "folder above"),
        (["A/x.png", "B/images/x.txt"], "B.*holds no image"),
        (["A/x.png", "B/images/x\udcff.png"], "not Unicode"),
    ],
)
def test_mistakes(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_images(touch(tmp_path, *paths))


def test_empty_class_folder_and_missing_root(tmp_path: Path) -> None:
    touch(tmp_path, "A/x.png")
    (tmp_path / "B").mkdir()
    with pytest.raises(UserError, match="B: this class folder holds no image"):
        find_images(tmp_path)
    for root in (tmp_path / "missing", tmp_path / "A/x.png"):
        with pytest.raises(UserError, match="no such folder"):
            find_images(root)
