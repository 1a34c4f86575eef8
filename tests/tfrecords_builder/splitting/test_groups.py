"""Near-duplicates, through a whole build: kept together, left out, or left alone, as it was asked."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.cli import main
from tests.tfrecords_builder.conftest import COUNTS
from tfrecords_builder.build import BuildOptions, BuildSummary, build_dataset
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from tfrecords_builder.splitting.splits import SPLITS, split_sizes
from tfrecords_builder.verify import verify_dataset


def build(source: Path, dataset: Path, **options: object) -> BuildSummary:
    return build_dataset(source, dataset, BuildOptions(workers=1, image_size=16, **options))  # type: ignore[arg-type]


def image(source: Path, name: str, number: int) -> Path:
    return source / name / "images" / f"{name}-{number}.png"


@pytest.fixture
def repeated(source: Path, tmp_path: Path) -> Path:
    """Of COVID-1 a copy, a re-exposed one and a re-encoded one; of COVID-5 a copy in class Normal."""
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    original = Image.open(image(folder, "COVID", 1)).resize((80, 80), Image.Resampling.BICUBIC)
    original.save(image(folder, "COVID", 1))
    shutil.copy(image(folder, "COVID", 1), image(folder, "COVID", 101))
    Image.fromarray((np.asarray(original) * 0.8 + 20).astype(np.uint8)).save(image(folder, "COVID", 102))
    original.save(image(folder, "COVID", 103).with_suffix(".jpg"), quality=80)
    shutil.copy(image(folder, "COVID", 5), image(folder, "Normal", 105))
    return folder


GROUP = {f"COVID/images/COVID-{name}" for name in ("1.png", "101.png", "102.png", "103.jpg")}
CONFLICT = {"COVID/images/COVID-5.png", "Normal/images/Normal-105.png"}


def splits_of(manifest: Manifest, paths: set[str]) -> Counter[str | None]:
    return Counter(row.split for row in manifest.rows if row.path in paths)


def test_leak_free_keeps_groups_together_and_leaves_conflicts_out(repeated: Path, tmp_path: Path) -> None:
    for seed in range(6):
        manifest = build(repeated, tmp_path / str(seed), seed=seed).manifest
        assert {row.path for row in manifest.near_duplicates["COVID/images/COVID-1.png"]} == GROUP
        assert len(splits_of(manifest, GROUP)) == 1
        assert {path for path, _ in manifest.excluded} == CONFLICT
        assert all("COVID and Normal" in reason for _, reason in manifest.excluded)
        counts = {"COVID": COUNTS["COVID"] + 3 - 1, "Normal": COUNTS["Normal"], "Viral_Pneumonia": 9}
        assert manifest.counts == {split: {n: split_sizes(c)[split] for n, c in counts.items()} for split in SPLITS}
    assert verify_dataset(tmp_path / "0").records == sum(counts.values())


def test_conflicts_can_be_kept_and_stay_together(repeated: Path, tmp_path: Path) -> None:
    for seed in range(6):
        manifest = build(repeated, tmp_path / str(seed), seed=seed, conflicts="keep").manifest
        assert manifest.excluded == []
        found = splits_of(manifest, CONFLICT)
        assert len(found) == 1
        assert None not in found
        verify_dataset(tmp_path / str(seed))


def test_published_is_the_plain_rule(repeated: Path, tmp_path: Path) -> None:
    manifests = [build(repeated, tmp_path / str(s), seed=s, split="published").manifest for s in range(6)]
    assert any(len(splits_of(manifest, GROUP)) > 1 for manifest in manifests), "copies straddle the splits"
    for manifest in manifests:
        assert manifest.excluded == []
        assert {row.path for rows in manifest.near_duplicates.values() for row in rows} >= GROUP, (
            "and are still reported"
        )
    verify_dataset(tmp_path / "0")


def split_file(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["note,path,split", *lines]) + "\n")
    return path


def test_a_given_split(source: Path, tmp_path: Path) -> None:
    paths = sorted(path.relative_to(source).as_posix() for path in source.glob("*/images/*"))
    left_out = paths[::10]
    given = {path: SPLITS[number % 3] for number, path in enumerate(paths) if path not in left_out}
    file = split_file(tmp_path, [f"x,{path},{split}" for path, split in given.items()])
    summary = build(source, tmp_path / "d", split_file=file)
    manifest = summary.manifest
    assert {row.path: row.split for row in manifest.rows if row.split} == given
    assert [path for path, _ in manifest.excluded] == left_out
    assert build(source, tmp_path / "d", split_file=file).reused
    file.write_text(file.read_text() + f"x,{left_out[0]},train\n")
    changed = build(source, tmp_path / "d", split_file=file)
    assert not changed.reused
    assert "split_rule file:" in changed.changes[0]


def printed(capsys: pytest.CaptureFixture[str], source: Path, dataset: Path, *options: str) -> list[str]:
    main.main(["build", str(source), str(dataset), "--image-size", "16", "--workers", "1", *options])
    return capsys.readouterr().out.splitlines()


def test_near_duplicates_and_patients_are_counted_apart(
    repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(path.relative_to(repeated).as_posix() for path in repeated.glob("*/images/*"))
    patients = [f"{path},{number // 2}" for number, path in enumerate(paths) if path not in GROUP | CONFLICT]
    lines = printed(capsys, repeated, tmp_path / "a")
    assert (
        "6 images are near-duplicates of others, in 2 groups (the largest has 4); each group is in one split" in lines
    )
    assert not any("patient" in line for line in lines)
    (repeated / "metadata.csv").write_text("\n".join(["path,patient", *patients]))
    several = Counter(line.rpartition(",")[2] for line in patients)
    count = sum(number > 1 for number in several.values())
    lines = printed(capsys, repeated, tmp_path / "a")
    assert (
        "6 images are near-duplicates of others, in 2 groups (the largest has 4); each group is in one split" in lines
    )
    assert f"{count} patients have several images; each patient is in one split" in lines

    # A split file may put them apart, and is told so.
    group = sorted(GROUP)
    of = {path: SPLITS[number % 3] for number, path in enumerate(paths) if path not in GROUP} | dict(
        zip(group, ["train", "train", "test", "train"], strict=True)
    )
    file = split_file(tmp_path, [f"x,{path},{split}" for path, split in of.items()])
    lines = printed(capsys, repeated, tmp_path / "b", "--split-file", str(file))
    rows = read_manifest(tmp_path / "b").rows
    apart = sum(len({row.split for row in rows if row.patient == patient}) > 1 for patient in several)
    assert apart > 1
    assert lines[-4:-2] == [
        "6 images are near-duplicates of others, in 2 groups (the largest has 4); "
        "warning: 1 group is in more than one split",
        f"{count} patients have several images; warning: {apart} patients are in more than one split",
    ]


def test_a_split_file_of_a_spreadsheet(source: Path, tmp_path: Path) -> None:
    paths = sorted(path.relative_to(source).as_posix() for path in source.glob("*/images/*"))
    words = ("Train", "VAL", "test")
    lines = [path.replace("/", "\\") + f";{words[number % 3]}" for number, path in enumerate(paths)]
    file = tmp_path / "split.csv"
    file.write_text("\r\n".join(["File Name;Split", *lines]), encoding="utf-8-sig", newline="")
    manifest = build(source, tmp_path / "d", split_file=file).manifest
    assert [row.split for row in manifest.rows] == [SPLITS[number % 3] for number in range(len(paths))]


def test_a_patient_in_every_split_of_a_file_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    paths = sorted(path.relative_to(copy).as_posix() for path in copy.glob("*/images/*"))
    (copy / "metadata.csv").write_text("\n".join(["path,patient", *(f"{path},one" for path in paths)]))
    file = split_file(tmp_path, [f"x,{path},{SPLITS[number % 3]}" for number, path in enumerate(paths)])
    lines = printed(capsys, copy, tmp_path / "d", "--split-file", str(file))
    assert "1 patient has several images; warning: 1 patient is in more than one split" in lines
    lines = printed(capsys, copy, tmp_path / "d", "--split-file", str(file), "--dry-run")
    assert "warning: 1 of 1 patients would be in more than one split" in lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,COVID/images/none.png,train", "line 2: 'COVID/images/none.png' is not an image"),
        ("x,COVID/images/COVID-1.png,tset", "line 2: split 'tset' is not one of train, validation, test"),
        ("x,COVID/images/COVID-1.png", "line 2"),
        ("x,COVID/images/COVID-1.png,test\nx,COVID/images/COVID-1.png,train", "line 3: .* in two splits"),
        ("x,COVID/images/COVID-1.png,test", "has no image for the train split"),
    ],
)
def test_a_split_file_that_cannot_be_used(source: Path, tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "d", split_file=split_file(tmp_path, [line]))
    assert not (tmp_path / "d" / MANIFEST_NAME).exists()


def test_split_files_that_are_none(source: Path, tmp_path: Path) -> None:
    for name, content in (("missing", None), ("binary", b"\xff\xfe\x00"), ("columns", b"a,b\n1,2\n"), ("empty", b"")):
        path = tmp_path / f"{name}.csv"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError):
            build(source, tmp_path / "d", split_file=path)
