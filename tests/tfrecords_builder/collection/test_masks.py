"""Lung masks: in the records, in the manifest, and never in the way of the images."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.build import BuildOptions, BuildSummary, build_dataset
from tfrecords_builder.collection.download import FOLDER
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.record import Record, decode_example, decode_mask, encode_image, encode_mask
from tfrecords_builder.format.tfrecord import scan
from tfrecords_builder.images.decoded import ImageError
from tfrecords_builder.verify import verify_dataset

SIZE = 16
WITH_MASKS = ("COVID", "Normal")


def build(source: Path, dataset: Path, **options: object) -> BuildSummary:
    return build_dataset(source, dataset, BuildOptions(image_size=SIZE, workers=1, **options))  # type: ignore[arg-type]


def records(dataset: Path) -> dict[str, Record]:
    decoded = (decode_example(payload) for path in dataset.glob("cxr-*") for _, payload in scan(path))
    return {record.path: record for record in decoded}


def expected_mask(source: Path, mask: str | None) -> npt.NDArray[np.bool_]:
    if mask is None:
        return np.zeros((SIZE, SIZE), np.bool_)
    with Image.open(source / mask) as image:
        return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)) >= 128


@pytest.fixture(scope="module")
def masked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of two classes of three, smaller than their images and in colour, as the database has them."""
    root = Path(shutil.copytree(source, tmp_path_factory.mktemp("masked") / "source"))
    random = np.random.default_rng(0)
    for name in WITH_MASKS:
        (root / name / "masks").mkdir()
        for path in (root / name / "images").iterdir():
            inside = np.zeros((12, 12), np.uint8)
            top, left = random.integers(0, 6, 2)
            inside[top : top + 6, left : left + 5] = 255
            Image.fromarray(inside).convert("RGB").save(root / name / "masks" / path.name)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "COVID" / "masks" / "of-no-image.png")
    return root


@pytest.fixture
def mutable(masked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(masked, tmp_path / "source"))


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_every_record_has_the_mask_that_its_row_names(masked: Path, tmp_path: Path, encoding: str) -> None:
    manifest = build(masked, tmp_path / "d", encoding=encoding).manifest
    found = records(tmp_path / "d")
    assert len(found) == sum(COUNTS.values())
    for row in manifest.rows:
        folder, _, name = row.path.partition("/images/")
        assert row.mask == (f"{folder}/masks/{name}" if folder in WITH_MASKS else None)
        assert (row.mask_sha256 is None) == (row.mask is None)
        mask = found[row.path].mask
        assert mask is not None
        np.testing.assert_array_equal(decode_mask(mask, SIZE), expected_mask(masked, row.mask))
        assert expected_mask(masked, row.mask).any() == (row.mask is not None)
    assert verify_dataset(tmp_path / "d").records == len(found)
    assert build(masked, tmp_path / "d", encoding=encoding).reused


def test_tensorflow_datasets_reads_masks_and_our_builder_for_it_writes_them(masked: Path, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    from tfrecords_builder.tfds_builder import Covid19Radiography, SizeConfig

    mask_of = {row.path: row.mask for row in build(masked, tmp_path / "d").manifest.rows}
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / FOLDER).symlink_to(masked)
    names = tuple(sorted(name.replace(" ", "_") for name in COUNTS))
    config = SizeConfig(name="small", image_size=SIZE, masks=True, class_names=names)
    theirs = Covid19Radiography(data_dir=str(tmp_path / "data"), config=config)
    theirs.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(tmp_path / "manual")))
    for builder in (tfds.builder_from_directory(str(tmp_path / "d")), theirs):
        seen = 0
        for example in builder.as_dataset(split="all").as_numpy_iterator():
            inside = expected_mask(masked, mask_of[example["path"].decode()])
            np.testing.assert_array_equal(example["mask"][..., 0], np.where(inside, 255, 0))
            seen += 1
        assert seen == sum(COUNTS.values())


def test_without_masks_the_dataset_is_that_of_the_images_alone(masked: Path, source: Path, tmp_path: Path) -> None:
    ignored, plain = build(masked, tmp_path / "ignored", masks="ignore"), build(source, tmp_path / "plain")
    assert ignored.manifest.rows == plain.manifest.rows
    assert ignored.manifest.fingerprint == plain.manifest.fingerprint
    assert {record.mask for record in records(tmp_path / "ignored").values()} == {None}
    changes = build(masked, tmp_path / "ignored").changes
    assert changes == ("masks False -> True",)
    assert {row.split for row in read_manifest(tmp_path / "ignored").rows} == {row.split for row in plain.manifest.rows}


@pytest.mark.parametrize("damage", ["truncated", "unreadable"])
def test_a_damaged_mask_is_named(mutable: Path, tmp_path: Path, damage: str) -> None:
    mask = mutable / "Normal" / "masks" / "Normal-3.png"
    if damage == "truncated":
        mask.write_bytes(mask.read_bytes()[:-20])
    else:
        mask.unlink()
        mask.symlink_to(mask.name)  # a loop, which no one can read
    with pytest.raises(ImageError, match=r"Normal-3\.png: has a mask, Normal-3\.png, that"):
        build(mutable, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    manifest = build(mutable, tmp_path / "d", on_error="skip").manifest
    [(path, reason)] = manifest.rejected
    assert path == "Normal/images/Normal-3.png"
    assert reason.startswith("has a mask, Normal-3.png, that")
    assert build(mutable, tmp_path / "d", on_error="skip").reused
    assert not build(mutable, tmp_path / "without", masks="ignore").manifest.rejected


def test_another_mask_is_another_dataset(mutable: Path, tmp_path: Path) -> None:
    before = build(mutable, tmp_path / "d").manifest
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(mutable / "COVID" / "masks" / "COVID-1.png")
    again = build(mutable, tmp_path / "d")
    assert again.changes == ("source files changed: 1",)
    assert again.manifest.fingerprint != before.fingerprint
    mask = records(tmp_path / "d")["COVID/images/COVID-1.png"].mask
    assert mask is not None
    assert decode_mask(mask, SIZE).all()


def test_a_mask_of_other_levels_is_none() -> None:
    inside = np.eye(SIZE, dtype=np.bool_)
    np.testing.assert_array_equal(decode_mask(encode_mask(inside), SIZE), inside)
    with pytest.raises(ValueError, match="two levels"):
        decode_mask(encode_image(np.full((SIZE, SIZE), 7, np.uint8), "png"), SIZE)
    with pytest.raises(ValueError, match="expected"):
        decode_mask(encode_mask(inside), SIZE + 1)
