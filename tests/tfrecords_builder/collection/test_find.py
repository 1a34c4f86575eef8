from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.collection.file_kinds import Reason
from tfrecords_builder.collection.find import SourceImage, class_counts, class_name_of, list_source
from tfrecords_builder.collection.masks import match_masks
from tfrecords_builder.common.errors import UserError


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
        (
            ["Normal/x.png", "normal/x.png"],
            "'Normal' and 'normal' are but for case or Unicode form both class 'normal'",
        ),
        (["Å/x.png", "A\u030a/x.png"], r"'A.u030a' and '.xc5' are both class 'Å'; rename or merge one"),
        (["No 2/x.png", "No ²/x.png"], "but for case or Unicode form both class"),
        (["A/x.png", "b/images/x.png", "B/Images/x.png"], "but for case or Unicode form both class"),
        (["images/x.png", "masks/x.png"], "folder above"),
        (["A/x.png", "B/images/x.txt"], "B.*contains no image"),
        (["A/x.png", "B/masks/x.png"], "B.*contains no image"),
        (["A/x.png", "B/images/x\udcff.png"], "not Unicode"),
    ],
)
def test_mistakes(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_images(touch(tmp_path, *paths))


def test_empty_class_folder_and_missing_root(tmp_path: Path) -> None:
    touch(tmp_path, "A/x.png")
    (tmp_path / "B").mkdir()
    with pytest.raises(UserError, match="B: this class folder contains no image"):
        find_images(tmp_path)
    for root in (tmp_path / "missing", tmp_path / "A/x.png"):
        with pytest.raises(UserError, match="no such folder"):
            find_images(root)


def test_a_class_name_has_one_unicode_form() -> None:
    assert class_name_of("Pneumonie\u0301  virale") == class_name_of("Pneumoni\xe9 virale") == "Pneumoni\xe9_virale"


@pytest.mark.parametrize(
    ("masks", "belong"),
    [
        (["x.png", "y.png"], {"x": "x.png", "y": "y.png"}),
        (["x.JPG"], {"x": "x.JPG"}),
        (["X.png"], {"x": "X.png"}),
        (["x_mask.png", "mask-y.png"], {"x": "x_mask.png", "y": "mask-y.png"}),
        (["x_Lung_Mask.png", "y segmentation.png"], {"x": "x_Lung_Mask.png", "y": "y segmentation.png"}),
        (["x_seg.png", "x_mask.png"], {}),  # which?
        (["x.png", "x_mask.png"], {"x": "x.png"}),
        (["xmask.png", "mask.png", "z.png", "x1_mask.png"], {}),
    ],
)
def test_a_mask_belongs_to_the_image_of_its_name(tmp_path: Path, masks: list[str], belong: dict[str, str]) -> None:
    touch(tmp_path, "A/x.png", "A/y.png", "B/x.png", *(f"A/Masks/{mask}" for mask in masks))
    listing = list_source(tmp_path)
    used = {image.path: image.mask for image in listing.images if image.mask}
    assert used == {f"A/{stem}.png": f"A/Masks/{mask}" for stem, mask in belong.items()}
    unused = {item.files for item in listing.not_taken if item.reason is Reason.MASK_UNUSED}
    assert sum(unused) == len(masks) - len(belong)
    notes = [note.text for note in listing.notes]
    assert notes == (["1 of 2 images of A have no mask"] if len(belong) == 1 else [])
    ignored = list_source(tmp_path, masks="ignore")
    assert sum(item.files for item in ignored.not_taken if item.reason is Reason.MASK_IGNORED) == len(masks)
    assert not any(image.mask for image in ignored.images)


def test_masks_beside_their_images_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "A/x.png", "A/x_mask.png", "A/without_mask.png", "B/y.png", "B/y.jpg", "B/masks/y.png")
    assert find_images(tmp_path) == [
        SourceImage("A/without_mask.png", "A"),
        SourceImage("A/x.png", "A", "A/x_mask.png"),
        SourceImage("B/y.jpg", "B", "B/masks/y.png"),
        SourceImage("B/y.png", "B", "B/masks/y.png"),
    ]


@given(
    st.lists(st.sampled_from(["a", "A", "a_mask", "b", "b_mask", "mask_b", "c_seg", "mask"]), unique=True), st.data()
)
def test_no_mask_has_two_names_and_no_file_is_lost(stems: list[str], data: st.DataObject) -> None:
    images = [f"C/{stem}.png" for stem in stems]
    masks = data.draw(
        st.lists(st.sampled_from([f"C/masks/{stem}.png" for stem in stems] or ["C/masks/z.png"]), unique=True)
    )
    taken, mask_of = match_masks(images, masks)
    assert set(mask_of) <= set(taken) <= set(images)
    assert set(mask_of.values()) <= {*masks, *images} - set(taken)
    for mask in set(mask_of.values()):
        stems_of = {Path(path).stem for path, of in mask_of.items() if of == mask}
        assert len(stems_of) == 1
    by_name = {f"C/{stem}.png" for stem in stems if f"C/masks/{stem}.png" in masks} & set(taken)
    assert all(mask_of[path] == path.replace("C/", "C/masks/") for path in by_name)
