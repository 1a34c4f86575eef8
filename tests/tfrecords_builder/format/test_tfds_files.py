"""TensorFlow Datasets reads a dataset with nothing of ours, and our builder for it makes the same records."""

from pathlib import Path

import numpy as np
import pytest

from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.download import FOLDER
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.record import decode_example, decode_image, encode_image
from tfrecords_builder.format.tfds_files import FILES
from tfrecords_builder.format.tfrecord import scan
from tfrecords_builder.images.decode import load_gray
from tfrecords_builder.splitting.splits import SPLITS
from tfrecords_builder.verify import verify_dataset

SIZE = 16


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_builder_from_directory_reads_every_split(source: Path, tmp_path: Path, encoding: str) -> None:
    import tensorflow_datasets as tfds

    build_dataset(source, tmp_path / "d", BuildOptions(image_size=SIZE, workers=1, encoding=encoding))
    manifest = read_manifest(tmp_path / "d")
    builder = tfds.builder_from_directory(str(tmp_path / "d"))
    assert tuple(builder.info.features["label"].names) == manifest.class_names
    assert builder.info.features["image"].shape == (SIZE, SIZE, 1)
    assert builder.info.supervised_keys == ("image", "label")
    assert "Chowdhury" in builder.info.citation
    assert "leak-free" in builder.info.description
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        split: sum(counts.values()) for split, counts in manifest.counts.items()
    }
    for split in SPLITS:
        examples = list(builder.as_dataset(split=split, shuffle_files=False).as_numpy_iterator())
        assert [example["path"].decode() for example in examples] == manifest.split(split).paths
        for example in examples:
            row = manifest.rows[example["index"]]
            assert (row.path, row.label) == (example["path"].decode(), example["label"])
            expected = load_gray(source / row.path, SIZE)
            if encoding == "jpeg":
                expected = decode_image(encode_image(expected, "jpeg"), SIZE, "jpeg")
            # TFDS decodes JPEG with TensorFlow's faster transform: a few gray levels from Pillow's.
            tolerance = 8 if encoding == "jpeg" else 0
            np.testing.assert_allclose(example["image"][..., 0].astype(int), expected.astype(int), atol=tolerance)
    batch = next(iter(builder.as_dataset(split="train", as_supervised=True, batch_size=4)))
    assert batch[0].shape == (4, SIZE, SIZE, 1)


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_file_that_is_not_what_was_written(built: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = Path(shutil.copytree(built, tmp_path / "d"))
    verify_dataset(copy)
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"COVID", b"COVIT").replace(b"tfrec", b"tfrek"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(UserError, match=name):
        verify_dataset(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        verify_dataset(copy)


def test_our_builder_for_tfds_makes_the_same_records(source: Path, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    from tfrecords_builder.tfds_builder import Covid19Radiography, SizeConfig

    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / FOLDER).symlink_to(source)
    names = tuple(sorted(name.replace(" ", "_") for name in COUNTS))
    config = SizeConfig(name="small", image_size=SIZE, class_names=names)
    builder = Covid19Radiography(data_dir=str(tmp_path / "data"), config=config)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(tmp_path / "manual")))
    build_dataset(source, tmp_path / "ours", BuildOptions(image_size=SIZE, workers=1, split="published"))
    ours = [decode_example(payload) for path in (tmp_path / "ours").glob("cxr-*") for _, payload in scan(path)]
    files = Path(builder.data_dir).glob("*.tfrecord-*")
    theirs = {record.path: record for path in files for record in (decode_example(p) for _, p in scan(path))}
    assert len(ours) == len(theirs) == sum(COUNTS.values())
    for record in ours:
        assert record == theirs[record.path]
