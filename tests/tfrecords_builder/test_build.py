import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.tfrecords_builder.conftest import COUNTS, write_images
from tests.tfrecords_builder.poisoned import POISON, half_written_ingest, poisoned_ingest
from tfrecords_builder import build as build_module
from tfrecords_builder.build import BuildOptions, BuildSummary, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.format.manifest import MANIFEST_NAME, read_manifest
from tfrecords_builder.format.record import decode_image, encode_image, parse_batch
from tfrecords_builder.format.tfrecord import read_at
from tfrecords_builder.images import decode as images
from tfrecords_builder.images.decode import load_gray
from tfrecords_builder.images.decoded import ImageError
from tfrecords_builder.splitting.splits import SPLITS, split_sizes
from tfrecords_builder.verify import verify_dataset
from tfrecords_builder.writing import output_folder, parts
from tfrecords_builder.writing.output_folder import WORK_FOLDER
from tfrecords_builder.writing.writer import IngestTask, ShardTask, WrittenShard, ingest, write_shard

Task = TypeVar("Task")
Result = TypeVar("Result")
SIZE = 16
LIMIT_S = 300.0
TOTAL = sum(COUNTS.values())


def build(source: Path, dataset: Path, workers: int = 1, **options: object) -> BuildSummary:
    progress = options.pop("progress", None)
    chosen = BuildOptions(workers=workers, **{"image_size": SIZE, **options})  # type: ignore[arg-type]
    return build_dataset(source, dataset, chosen, progress=progress)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mutable(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


def left_parts(dataset: Path) -> int:
    """Parts that a failed build left; nothing else is left but the dataset that it was to replace."""
    work = dataset / WORK_FOLDER
    names = {path.name for path in work.iterdir()}
    parts_ = {name for name in names if re.fullmatch(r"part-\d{5}", name)}
    assert names == parts_ | {f"{name}.json" for name in parts_}
    if not (dataset / MANIFEST_NAME).exists():
        assert [path.name for path in dataset.iterdir()] == [WORK_FOLDER]
    return len(parts_)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Images that this process decodes, in order; a part holds 8 of them."""
    paths: list[Path] = []
    real_decode = images.decode_gray

    def decode(data: bytes, path: Path) -> images.Decoded:
        paths.append(path)
        return real_decode(data, path)

    monkeypatch.setattr(images, "decode_gray", decode)
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 8)
    return paths


# What a build makes


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_tensorflow_reads_back_every_image(source: Path, tmp_path: Path, encoding: str) -> None:
    summary = build(source, tmp_path / "d", encoding=encoding)
    manifest = read_manifest(tmp_path / "d")
    seen = Counter[str]()
    for split in SPLITS:
        names = [str(tmp_path / "d" / name) for name in manifest.split(split).shard_names]
        records = tf.data.TFRecordDataset(names).batch(7).map(lambda s: parse_batch(s, SIZE, encoding))
        images, labels, indices = [], [], []
        for batch in records.as_numpy_iterator():
            images += list(batch["image"][..., 0])
            labels += batch["label"].tolist()
            indices += batch["index"].tolist()
        # The order of the manifest's index is that of the files.
        assert [manifest.rows[index].path for index in indices] == manifest.split(split).paths
        assert labels == manifest.split(split).labels.tolist()
        for image, index, label in zip(images, indices, labels, strict=True):
            row = manifest.rows[index]
            expected = load_gray(source / row.path, SIZE)
            if encoding == "jpeg":
                expected = decode_image(encode_image(expected, "jpeg"), SIZE, "jpeg")
            np.testing.assert_array_equal(image, expected)
            assert manifest.class_names[label] == row.path.split("/")[0].replace(" ", "_")
            seen[row.path] += 1
        assert Counter(manifest.class_names[label] for label in labels) == summary.manifest.counts[split]
    assert set(seen.values()) == {1}
    assert len(seen) == TOTAL
    assert summary.manifest.fingerprint == manifest.fingerprint


def test_random_access_by_offset(source: Path, built: Path) -> None:
    index = read_manifest(built).split("train")
    descriptors = [os.open(built / name, os.O_RDONLY) for name in index.shard_names]
    try:
        for i in np.random.default_rng(0).permutation(len(index)):
            record = read_at(descriptors[index.shard[i]], int(index.offset[i]), int(index.length[i]))
            image = parse_batch(tf.constant([record]), SIZE, "raw")["image"][0, ..., 0]
            np.testing.assert_array_equal(image, load_gray(source / index.paths[i], SIZE))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_same_bytes_for_any_number_of_workers(tmp_path: Path, source: Path, built: Path) -> None:
    build(source, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(built)


def test_both_layouts_make_the_same_dataset_but_for_paths(tmp_path: Path, built: Path) -> None:
    plain = write_images(tmp_path / "plain", COUNTS, database_layout=False)
    summary = build(plain, tmp_path / "d")
    assert summary.manifest.counts == read_manifest(built).counts
    by_digest = {row.sha256: row for row in read_manifest(built).rows}
    for row in read_manifest(tmp_path / "d").rows:
        assert row.class_name == by_digest[row.sha256].class_name


def test_shards_mix_classes_and_seeds_differ(source: Path, tmp_path: Path, built: Path) -> None:
    index = read_manifest(built).split("train")
    assert len(index.shard_names) == 4
    for shard in range(4):
        assert len(set(index.labels[index.shard == shard].tolist())) > 1
    build(source, tmp_path / "d", seed=1)
    other = read_manifest(tmp_path / "d")
    assert set(other.split("train").paths) != set(index.paths)
    assert other.counts == read_manifest(built).counts


def test_progress_counts_every_image(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build(source, tmp_path / "d", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(set(calls))
    assert calls[-1] == (TOTAL, TOTAL)


# An output folder that is not empty


def test_the_same_dataset_again_is_left_alone(source: Path, built: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    before = {path: path.stat().st_mtime_ns for path in dataset.iterdir()}
    summary = build(source, dataset)
    assert summary.reused
    assert summary.manifest.fingerprint == read_manifest(built).fingerprint
    assert summary.manifest.counts == read_manifest(built).counts
    assert {path: path.stat().st_mtime_ns for path in dataset.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"seed": 1}, ["seed 0 -> 1"]),
        ({"image_size": 17}, ["image_size 16 -> 17"]),
        ({"encoding": "png", "seed": 7}, ["encoding raw -> png", "seed 0 -> 7"]),
        ({"split": "published"}, ["split_rule leak-free -> published", "conflicts exclude -> keep"]),
    ],
)
def test_other_settings_build_anew_and_are_named(
    source: Path, built: Path, tmp_path: Path, options: dict[str, object], changes: list[str]
) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    summary = build(source, dataset, **options)
    assert not summary.reused
    assert list(summary.changes) == changes
    build(source, tmp_path / "new", **options)
    assert content(dataset) == content(tmp_path / "new")


def test_other_images_build_anew_and_are_counted(mutable: Path, built: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    paths = sorted((mutable / "COVID/images").iterdir())
    paths[0].unlink()
    shutil.copy(paths[2], paths[1])
    for name in ("x.png", "y.png"):
        shutil.copy(paths[2], mutable / "COVID/images" / name)
    summary = build(mutable, dataset)
    assert list(summary.changes) == [
        "source files added: 2",
        "source files removed: 1",
        "source files changed: 1",
    ]
    build(mutable, tmp_path / "new")
    assert content(dataset) == content(tmp_path / "new")
    assert build(mutable, dataset).reused


def test_a_failed_rebuild_leaves_the_earlier_dataset(mutable: Path, built: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    damage(mutable)
    with pytest.raises(ImageError):
        build(mutable, dataset)
    assert content(dataset) == content(built), "no part was whole, so no work folder is left"
    verify_dataset(dataset)
    with pytest.raises(UserError, match="has no image for the train split"):
        build(mutable, dataset, on_error="skip", split_file=one_image(tmp_path))
    assert left_parts(dataset) == 2
    verify_dataset(dataset)
    shutil.rmtree(dataset / WORK_FOLDER)
    assert content(dataset) == content(built)


def test_a_dataset_that_lost_a_shard_is_not_called_complete(source: Path, built: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    (dataset / "cxr-test.tfrecord-00001-of-00004").unlink()
    with pytest.raises(UserError, match=r"cxr-test\.tfrecord-00001-of-00004: this shard is missing"):
        build(source, dataset)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "cxr-train.tfrecord-00000-of-00004", "COVID/x.png"])
def test_what_is_not_ours_is_refused_and_kept(source: Path, tmp_path: Path, name: str) -> None:
    dataset = tmp_path / "d"
    (dataset / name).parent.mkdir(parents=True)
    (dataset / name).write_text("precious")
    with pytest.raises(UserError, match=f"contains other files than a dataset .'{name.split('/')[0]}'"):
        build(source, dataset)
    assert content(dataset) == {name: b"precious"}
    # Nor does the mark of an unfinished build give leave to remove it, unless it is a shard.
    (dataset / WORK_FOLDER).mkdir()
    if not name.startswith("cxr-"):
        with pytest.raises(UserError, match="contains other files"):
            build(source, dataset)
        assert content(dataset) == {name: b"precious"}


def test_output_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for dataset in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="is not a folder"):
            build(source, dataset)
    assert (tmp_path / "file").read_text() == "precious"


def test_two_builds_into_one_folder(source: Path, tmp_path: Path) -> None:
    with output_folder.locked_folder(tmp_path / "d"):
        with pytest.raises(UserError, match="another build is writing to this folder"):
            build(source, tmp_path / "d")
        assert [path.name for path in (tmp_path / "d").iterdir()] == [LOCK]
    assert not (tmp_path / "d").exists()
    build(source, tmp_path / "d")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image-size: must be from 1"),
        ({"encoding": "gif"}, "encoding: must be one of raw, png, jpeg, not 'gif'"),
        ({"workers": 0}, "workers: must be at least 1, not 0"),
        ({"on_error": "ignore"}, "on-error: must be one of stop, skip, not 'ignore'"),
    ],
)
def test_options(source: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


def test_too_few_images_or_classes(tmp_path: Path) -> None:
    few = write_images(tmp_path / "few", {"A": 7, "B": 6})
    with pytest.raises(UserError, match="class 'B' has 6 images; at least 7"):
        build(few, tmp_path / "d")
    one = write_images(tmp_path / "one", {"A": 7})
    with pytest.raises(UserError, match="only one class, 'A'"):
        build(one, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    enough = write_images(tmp_path / "enough", {"A": 7, "B": 7})
    assert build(enough, tmp_path / "d").manifest.counts["validation"] == {"A": 1, "B": 1}


def one_image(folder: Path) -> Path:
    """A split file with which no dataset can be built."""
    file = folder / "split.csv"
    file.write_text("path,split\nCOVID/images/COVID-1.png,test\n")
    return file


def damage(source: Path) -> list[str]:
    """Truncate two images and replace one by text; their paths, in order."""
    victims = ["COVID/images/COVID-3.png", "COVID/images/COVID-7.png", "Normal/images/Normal-2.png"]
    for victim in victims[::2]:
        data = (source / victim).read_bytes()
        (source / victim).write_bytes(data[: len(data) // 2])
    (source / victims[1]).write_text("no image")
    return victims


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_names_the_first_damaged_file(mutable: Path, tmp_path: Path, workers: int) -> None:
    first = damage(mutable)[0]
    (tmp_path / "e").mkdir()
    for name in "de":
        with pytest.raises(ImageError, match="truncated") as caught:
            build(mutable, tmp_path / name, workers=workers)
        assert caught.value.path == mutable / first
        if workers == 1:  # another process may have decoded the second part meanwhile
            assert (tmp_path / name).exists() == (name == "e"), "a folder that the build made is gone again"
            assert list((tmp_path / name).glob("*")) == []


def test_what_was_decoded_before_a_damaged_file_is_not_decoded_again(
    mutable: Path, built: Path, tmp_path: Path, decoded: list[Path]
) -> None:
    last = mutable / "Viral Pneumonia/images/Viral Pneumonia-8.png"
    whole = last.read_bytes()
    last.write_bytes(b"no image")
    with pytest.raises(ImageError, match="is not a PNG, JPEG") as caught:
        build(mutable, tmp_path / "d")
    kept = left_parts(tmp_path / "d")
    assert kept == TOTAL // 8
    [note] = caught.value.__notes__
    assert note.startswith(f"{tmp_path / 'd' / WORK_FOLDER}: keeps the images that were decoded")
    last.write_bytes(whole)
    decoded.clear()
    build(mutable, tmp_path / "d")
    assert len(decoded) == TOTAL - 8 * kept
    assert content(tmp_path / "d") == content(built)


def test_skip_lists_damaged_files_and_splits_the_rest_exactly(mutable: Path, tmp_path: Path) -> None:
    victims = damage(mutable)
    summary = build(mutable, tmp_path / "d", on_error="skip")
    assert [path for path, _ in summary.manifest.rejected] == victims
    assert "truncated" in summary.manifest.rejected[0][1]
    assert "not a PNG, JPEG" in summary.manifest.rejected[1][1]
    accepted = {"COVID": 18, "Normal": 12, "Viral_Pneumonia": 9}
    assert summary.manifest.counts == {
        split: {n: split_sizes(c)[split] for n, c in accepted.items()} for split in SPLITS
    }
    manifest = read_manifest(tmp_path / "d")
    assert len(manifest.rows) == TOTAL
    for row in manifest.rows:
        placed = (row.split, row.shard, row.index, row.offset, row.length)
        assert (row.path in victims) == (row.status == "rejected") == (row.reason is not None)
        assert all(value is None for value in placed) == (row.status == "rejected")
        assert row.sha256 is not None
    assert verify_dataset(tmp_path / "d").rejected == 3
    # The same again: with "skip" there is nothing to do, with "stop" it is still an error.
    assert build(mutable, tmp_path / "d", on_error="skip").reused
    with pytest.raises(ImageError, match="COVID-3"):
        build(mutable, tmp_path / "d")


def test_too_few_whole_images(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", {"A": 7, "B": 9})
    for number in range(3):
        (source / f"B/images/B-{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"class 'B' has 6 images \(without 3 rejected\)"):
        build(source, tmp_path / "d", on_error="skip")
    assert left_parts(tmp_path / "d") == 1


def test_mixed_kinds_of_images(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", {"A": 7, "B": 7})
    rng = np.random.default_rng(0)
    for number, (shape, kind) in enumerate([((30, 50, 3), "jpg"), ((9, 9), "jpeg"), ((40, 31, 4), "png")]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(source / f"A/images/x{number}.{kind}")
    wide = rng.integers(0, 65_536, (33, 21), dtype=np.uint16)
    Image.fromarray(wide).save(source / "A/images/x3.png")
    build(source, tmp_path / "d")
    rows = {row.path: row for row in read_manifest(tmp_path / "d").rows}
    assert (rows["A/images/x0.jpg"].width, rows["A/images/x0.jpg"].height) == (50, 30)
    assert (rows["A/images/x3.png"].width, rows["A/images/x3.png"].height) == (21, 33)
    assert verify_dataset(tmp_path / "d").records == 18


# A build that does not come to its end


def test_an_interrupted_build_goes_on(source: Path, built: Path, tmp_path: Path, decoded: list[Path]) -> None:
    """What was decoded before is not decoded again, and nothing is taken for a dataset in between."""

    def interrupt(done: int, total: int) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "d", progress=interrupt)
    with pytest.raises(UserError, match="not a complete dataset"):
        read_manifest(tmp_path / "d")
    assert len(decoded) == 24
    assert not build(source, tmp_path / "d").reused
    assert len(decoded) == len(set(decoded)) == TOTAL
    assert content(tmp_path / "d") == content(built)


@pytest.mark.parametrize("change", ["data", "index", "source", "settings"])
def test_what_an_interrupted_build_left_is_used_only_when_it_is_right(
    mutable: Path, tmp_path: Path, change: str
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(mutable, tmp_path / "d", progress=interrupt)
    part = tmp_path / "d" / WORK_FOLDER / "part-00000"
    options: dict[str, object] = {}
    if change == "data":
        content_ = bytearray(part.read_bytes())
        content_[100] ^= 1
        part.write_bytes(content_)
    elif change == "index":
        index = part.with_name("part-00000.json")
        index.write_text(index.read_text()[:-7])
    elif change == "source":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(mutable / "COVID/images/COVID-0.png")
    else:
        options["image_size"] = 11
    build(mutable, tmp_path / "d", **options)
    build(mutable, tmp_path / "new", **options)
    assert content(tmp_path / "d") == content(tmp_path / "new")


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("step", ["ingest", "write_shard", "sync", "write_manifest"])
def test_a_full_disk_costs_no_decoding(
    source: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[Path],
    step: str,
    replaced: bool,
) -> None:
    dataset = tmp_path / "d"
    if replaced:
        build(source, dataset, seed=1)
        decoded.clear()
    before = content(dataset)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module if step in ("ingest", "write_shard") else output_folder, step, fail)
        with pytest.raises(UserError, match=r"d: cannot be written \(No space left on device\); free space") as caught:
            build(source, dataset)
    if step == "ingest":
        assert content(dataset) == before, "without parts nothing is left"
        assert dataset.exists() == replaced
    else:
        assert left_parts(dataset) == -(-TOTAL // 8)
        assert str(dataset / WORK_FOLDER) in caught.value.__notes__[0], "what may be removed to make room"
        if step == "write_shard":
            assert content(dataset).items() >= before.items()
    build(source, dataset)
    assert len(decoded) == len(set(decoded)) == TOTAL
    assert content(dataset) == content(built)


def test_what_is_left_of_a_task_that_was_given_up_is_removed(source: Path, built: Path, tmp_path: Path) -> None:
    work = tmp_path / "d" / WORK_FOLDER
    work.mkdir(parents=True)
    for name in (".part-00000.0a1b.tmp", ".cxr-train.tfrecord-00000-of-00004.0a1b.tmp", "part-00099", "part-00000"):
        (work / name).write_bytes(b"begun")
    (work / "cxr-train.tfrecord-00000-of-00004").write_bytes(b"begun")
    build(source, tmp_path / "d")
    assert content(tmp_path / "d") == content(built)


@pytest.mark.parametrize("lock", [b"", b"left"])
def test_the_lock_file_of_a_killed_build_does_no_harm(source: Path, built: Path, tmp_path: Path, lock: bytes) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / LOCK).write_bytes(lock)
    build(source, tmp_path / "d")
    assert content(tmp_path / "d") == content(built)
    (tmp_path / "d" / LOCK).write_bytes(lock)
    verify_dataset(tmp_path / "d")
    assert build(source, tmp_path / "d").reused
    assert content(tmp_path / "d") == content(built)


# Worker processes that are lost


def kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def test_a_build_survives_killed_workers(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 8)
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        killed.append(done)
        kill_children()

    build(source, tmp_path / "d", workers=2, progress=kill)
    assert len(killed) == -(-TOTAL // 8), "at every part"
    assert content(tmp_path / "d") == content(built)


def test_an_image_that_kills_its_process_is_named(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 8)
    monkeypatch.setenv(POISON, "Normal-3.png")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "ingest", poisoned_ingest)
        with pytest.raises(UserError, match=r"^the images .* to .*: the process was lost 3 times \(killed") as caught:
            build(source, tmp_path / "d", workers=2)
    first, last = re.findall(r"[^/]*\.png", str(caught.value))[:2]
    order = [row.path.rpartition("/")[2] for row in read_manifest(built).rows]
    assert order.index(first) <= order.index("Normal-3.png") <= order.index(last)
    assert "start the same command again to resume" in str(caught.value)
    assert left_parts(tmp_path / "d") > 0
    build(source, tmp_path / "d", workers=2)
    assert content(tmp_path / "d") == content(built)


def test_a_part_of_which_only_the_data_was_written_is_removed(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losing one process ends the others of the pool too, at any moment."""
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 8)
    monkeypatch.setenv(POISON, "Normal-3.png")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "ingest", half_written_ingest)
        with pytest.raises(UserError, match="the process was lost 3 times"):
            build(source, tmp_path / "d", workers=2)
    assert left_parts(tmp_path / "d") > 0
    work = tmp_path / "d" / WORK_FOLDER
    (work / "part-00000").unlink()
    with pytest.raises(UserError, match="has no image for the train split"):
        build(source, tmp_path / "d", split_file=one_image(tmp_path))
    assert left_parts(tmp_path / "d") == -(-TOTAL // 8)
    build(source, tmp_path / "d", workers=2)
    assert content(tmp_path / "d") == content(built)


def test_attempts_at_one_task_at_the_same_time_leave_the_same_bytes(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them is killed in the middle."""
    monkeypatch.setattr(build_module, "ingest", ingest_often)
    monkeypatch.setattr(build_module, "write_shard", write_shard_often)
    build(source, tmp_path / "d")
    assert content(tmp_path / "d") == content(built)


def ingest_often(task: IngestTask) -> parts.Part | parts.EncodedImage:
    parts.write_part(task.folder, task.number, "of other settings", [], [], b"other content")
    return often(ingest, task)


def write_shard_often(task: ShardTask) -> WrittenShard:
    (task.folder / task.name).write_bytes(b"what an attempt without a temporary file left")
    return often(write_shard, task)


def often(function: Callable[[Task], Result], task: Task) -> Result:
    """Two attempts at once, and one after them; of the first one, writing stops in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            function(task)
    with ThreadPoolExecutor(2) as threads:
        attempts = [*threads.map(function, [task, task]), function(task)]
    assert attempts[0] == attempts[1] == attempts[2]
    return attempts[0]


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


SLOW_BUILD = """
import multiprocessing, signal, sys, time
from pathlib import Path
from tfrecords_builder.build import BuildOptions, build_dataset

def hold(done, total):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    # A shell's background job ignores SIGINT, and so would this child of tests that run in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    build_dataset(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(image_size=16, workers=2), progress=hold)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_is_no_dataset_and_is_replaced(
    source: Path, built: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_BUILD)
    process = subprocess.Popen(
        [sys.executable, script, source, tmp_path / "d"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(build_module.__file__).parents[1])},
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    with pytest.raises(UserError, match="not a complete dataset"):
        read_manifest(tmp_path / "d")
    if number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and to the workers
    else:
        process.kill()
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    deadline = time.monotonic() + LIMIT_S
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlived the build"
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, "the parent's own; its workers keep silent, also as they start"
    assert (tmp_path / "d" / WORK_FOLDER).exists()
    with pytest.raises(UserError, match="not a complete dataset"):
        read_manifest(tmp_path / "d")
    assert not build(source, tmp_path / "d").reused
    assert content(tmp_path / "d") == content(built)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("published", [0, 1, 12])
def test_killed_while_publishing(source: Path, built: Path, tmp_path: Path, published: int) -> None:
    """The states that a kill between two renames leaves behind."""
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    (dataset / MANIFEST_NAME).rename(dataset / f".{MANIFEST_NAME}.k3_x9a1b.tmp")
    (dataset / WORK_FOLDER).mkdir()
    for path in sorted(dataset.glob("cxr-*"))[published:]:
        path.rename(dataset / WORK_FOLDER / path.name)
    with pytest.raises(UserError, match="not a complete dataset"):
        read_manifest(dataset)
    assert not build(source, dataset).reused
    assert content(dataset) == content(built)


def test_killed_after_the_manifest(source: Path, built: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(built, tmp_path / "d"))
    (dataset / WORK_FOLDER).mkdir()
    (dataset / WORK_FOLDER / "part-00000").write_bytes(b"left")
    verify_dataset(dataset)
    assert build(source, dataset).reused
    assert content(dataset) == content(built)


KILLED_BUILD = """
import os, random, signal, sys, threading
from pathlib import Path
from tfrecords_builder.build import BuildOptions, build_dataset

if __name__ == "__main__":
    delay = float(sys.argv[3])
    if delay:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    build_dataset(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(image_size=16, workers=1))
    os._exit(0)
"""


def test_killed_at_any_moment_and_started_again_the_bytes_are_the_same(
    source: Path, built: Path, tmp_path: Path
) -> None:
    """Each build is killed once at a random moment, from its first write to after its last."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED_BUILD)
    rng = np.random.default_rng(0)
    killed = 0
    for attempt in range(6):
        dataset = tmp_path / str(attempt)
        environment = {**os.environ, "PYTHONPATH": str(Path(build_module.__file__).parents[1])}
        line = [sys.executable, script, source, dataset, str(rng.uniform(0.02, 0.25))]
        killed += subprocess.run(line, env=environment, check=False, timeout=LIMIT_S).returncode == -signal.SIGKILL
        build(source, dataset)
        assert content(dataset) == content(built), line
    assert killed


def test_starts_without_tensorflow() -> None:
    code = (
        "import sys, tfrecords_builder.build, tfrecords_builder.verify;"
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras', 'ray', 'cxr_dist')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(build_module.__file__).parents[1])
