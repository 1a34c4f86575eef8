"""`leaks` finds what two collections share, and `evaluate` what the run has seen in another form."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.cli import main
from cxr_dist.data.image_folder import FolderSource
from cxr_dist.data.shards import ShardSource
from cxr_dist.evaluation.seen import _mark_between, _mark_within, _Marks, compared
from cxr_dist.runs import run_folder
from tests.html_page import Page
from tests.tfrecords_builder.images.test_dicom import dicom_bytes
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.format.manifest_rows import Row
from tfrecords_builder.splitting.overlap import Kind, find_matches

pytestmark = pytest.mark.usefixtures("small_network", "figures_not_drawn")


def rows_of(dataset: Path, split: str) -> list[Row]:
    return [row for row in read_manifest(dataset).rows if row.split == split]


def encoded_again(path: Path, out: Path) -> Path:
    """As JPEG at five thirds of the size."""
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(path).convert("L").resize((80, 80)).save(out, quality=90)
    return out


@pytest.fixture
def mixed(phantom_source: Path, dataset: Path, tmp_path: Path) -> Path:
    """Of each split three images: of the training split one as it is and two encoded again."""
    folder = tmp_path / "mixed"
    for split in ("train", "validation", "test"):
        for number, row in enumerate(rows_of(dataset, split)[::3][:3]):
            out = folder / row.class_name / f"{split}-{number}.jpg"
            if (split, number) == ("train", 0):
                out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(phantom_source / row.path, out.with_suffix(".png"))
            else:
                encoded_again(phantom_source / row.path, out)
    return folder


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_dataset_a_run_and_a_folder(
    finished_run: Path, dataset: Path, phantom_source: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, leaked in ((dataset, 9), (phantom_source, 9), (finished_run, 6)):
        main.main(["leaks", str(first), str(mixed), "--json"])
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["leaked"], numbers["identical"], numbers["near_duplicates"]) == (leaked, 1, leaked - 1)
        assert numbers["second"] == {
            "name": str(mixed), "kind": "folder", "images": 9, "patients": 0, "damaged": [],
        }  # fmt: skip
        for match in numbers["matches"]:
            assert match["score"] is None or match["score"] > 0.9
            split = Path(match["path"]).name.partition("-")[0]
            assert {row.path: row.split for row in read_manifest(dataset).rows}[match["match"]] == split
    main.main(["leaks", str(mixed), str(dataset)])
    printed = lines(capsys)
    assert printed[:2] == [
        f"A: {mixed} (folder): 9 images, no patient is known",
        f"B: {dataset} (dataset): 80 images, no patient is known",
    ]
    assert printed[-1] == "9 of 80 images of B leak (11.2%)"


def test_the_table_is_what_build_leaves_out(
    phantom_source: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(phantom_source, tmp_path / "other"))
    for path in sorted(other.glob("*/images/*.png"))[::2]:
        image = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(np.rot90(image)).save(path)  # no near-duplicate
    table = tmp_path / "leaks.csv"
    main.main(["leaks", str(dataset), str(other), "--out", str(table)])
    assert lines(capsys)[-1] == f"table: {table}"
    kept = build_dataset(other, tmp_path / "d", BuildOptions(image_size=32, workers=1, exclude=table)).manifest
    assert [row.path for row in kept.rows] == [
        path.relative_to(other).as_posix() for path in sorted(other.glob("*/images/*.png"))[::2]
    ]
    main.main(["leaks", str(dataset), str(tmp_path / "d")])
    assert lines(capsys)[-1] == "0 of 40 images of B leak (0.0%)"


def test_patients_in_clear_and_as_codes(
    phantom_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset of DICOM files holds codes alone; a folder whose table names the patients is compared all the same."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    rng = np.random.default_rng(1)
    for number in range(14):
        path = tmp_path / "dicom" / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(rng.integers(0, 4096, (16, 16)), np.ones((4, 4))).astype(np.uint16)
        path.write_bytes(dicom_bytes(pixels, PatientID=f"Pat {number}"))
    build_dataset(tmp_path / "dicom", tmp_path / "d", BuildOptions(image_size=32, workers=1))
    folder = tmp_path / "folder"
    folder.mkdir()
    images = sorted(phantom_source.glob("*/images/*.png"))[:4]
    for path in images:
        shutil.copy(path, folder)
    names = ["PAT 2", " pat 3", "pat 99", ""]
    table = [f"{path.name},{name}" for path, name in zip(images, names, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["path,patient", *table]) + "\n")
    for first, second in ((tmp_path / "d", folder), (tmp_path / "dicom", folder), (folder, tmp_path / "d")):
        main.main(["leaks", str(first), str(second), "--json"])
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["same_patient"], numbers["patients"], numbers["leaked"]) == (2, 2, 2)
        assert numbers["patients_comparable"]
    main.main(["leaks", str(tmp_path / "dicom"), str(tmp_path / "d"), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["identical"], numbers["same_patient"]) == (14, 14)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "of another user"))
    for first in (tmp_path / "dicom", folder):
        main.main(["leaks", str(first), str(tmp_path / "d")])
        assert "warning: the patients of A and B are coded by different keys, so they cannot be compared" in lines(
            capsys
        )


def test_what_cannot_be_compared_is_said(
    finished_run: Path, dataset: Path, tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mixed / "COVID").mkdir(exist_ok=True)
    (mixed / "COVID" / "cut.png").write_bytes(next(mixed.rglob("*.png")).read_bytes()[:200])
    (mixed / "notes.txt").write_text("nothing")
    main.main(["leaks", str(dataset), str(mixed)])
    printed = "\n".join(lines(capsys))
    assert f"{mixed} (folder): 9 images, no patient is known, 1 damaged" in printed
    assert f"warning: {mixed}: COVID/cut.png: is a damaged or truncated image" in printed

    def fails(first: Path, second: Path, *more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main(["leaks", str(first), str(second), *more])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "empty").mkdir()
    assert "empty: holds no image" in fails(dataset, tmp_path / "empty")
    assert "nowhere: no such folder" in fails(tmp_path / "nowhere", dataset)
    assert "is a folder" in fails(dataset, mixed, "--out", str(tmp_path))
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    move(run, tmp_path / "gone")
    assert "which does not exist; give the dataset itself" in fails(run, mixed)
    move(run, "s3://bucket/dataset")
    assert "which is not on this machine; give the dataset itself" in fails(run, mixed)


def move(run: Path, place: Path | str) -> None:
    info = json.loads((run / run_folder.RUN).read_text())
    (run / run_folder.RUN).write_text(json.dumps(info | {"dataset": str(place)}))


def test_an_evaluation_finds_what_was_encoded_again(
    finished_run: Path, dataset: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(finished_run), "--images", str(mixed), "--examine", "0", "--out"]
    main.main([*command, str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["seen"] == {
        "training": 3,
        "validation": 3,
        "share": 6 / 9,
        "asked_for": False,
        "kinds": {"identical": 1, "near-duplicate": 5, "patient": 0},
        "not_compared": None,
    }
    assert metrics["metrics_unseen"]["n"] == 3
    warning = next(line for line in lines(capsys) if line.startswith("WARNING: "))
    assert "3 match its training images and 3 match its validation images" in warning
    assert "By kind: 1 identical file, 5 near-duplicates." in warning
    # Without the dataset the files alone are known.
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    move(run, tmp_path / "gone")
    main.main(["evaluate", str(run), *command[2:], str(tmp_path / "less")])
    seen = json.loads((tmp_path / "less" / "metrics.json").read_text())["seen"]
    assert (seen["training"], seen["validation"]) == (1, 0)
    text = Page((tmp_path / "less" / "report.html").read_text()).text
    assert f"Near-duplicates and shared patients were not looked for: the run's dataset, {tmp_path}/gone" in text
    main.main(["evaluate", str(run), *command[2:], str(tmp_path / "moved"), "--dataset", str(dataset)])
    assert json.loads((tmp_path / "moved" / "metrics.json").read_text())["seen"] == metrics["seen"]


def test_inside_a_dataset_as_between_two(phantom_source: Path, tmp_path: Path) -> None:
    """What the build has noted of a split with leaks is what comparing the images finds."""
    source = Path(shutil.copytree(phantom_source, tmp_path / "source"))
    for path in sorted(source.glob("*/images/*.png"))[::3]:
        encoded_again(path, path.with_name(f"again-{path.stem}.jpg"))
    images = sorted(path.relative_to(source).as_posix() for path in source.glob("*/images/*"))
    table = [f"{path},P{number // 8}" for number, path in enumerate(images) if number % 3 == 0]
    (source / "metadata.csv").write_text("\n".join(["path,patient", *table]) + "\n")
    folder = tmp_path / "d"
    build_dataset(source, folder, BuildOptions(image_size=48, workers=1, split="published"))
    manifest = read_manifest(folder)
    test = ShardSource(folder, manifest, "test")
    inside, between = _Marks(test.count), _Marks(test.count)
    _mark_within(manifest, test.paths, inside)
    _mark_between(folder, manifest.fingerprint, test, between, None)
    one, other = (marks.origin(True, 0, None) for marks in (inside, between))
    assert one.training is not None
    assert one.validation is not None
    np.testing.assert_array_equal(one.training, other.training)
    np.testing.assert_array_equal(one.validation, other.validation)
    assert one.kinds == other.kinds
    assert one.kinds[Kind.NEAR_DUPLICATE] > 0
    assert one.kinds[Kind.PATIENT] > 0
    assert 0 < one.training.sum() < test.count


def test_real_training_images_are_recognised(xrays: Path, tmp_path: Path) -> None:
    """As they are, and as JPEG of quality 90 at 80 pixels, at the size that a run sees."""
    source, again = tmp_path / "source", tmp_path / "again"
    for folder in sorted(path for path in xrays.iterdir() if path.is_dir()):
        for path in sorted((folder / "images").glob("*.png"))[:60]:
            out = source / folder.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out)
            encoded_again(path, (again / folder.name / path.name).with_suffix(".jpg"))
    manifest = build_dataset(source, tmp_path / "d", BuildOptions(masks="ignore")).manifest
    known = compared(ShardSource(tmp_path / "d", manifest, "train"))
    stems = [Path(path).stem for path in manifest.split("train").paths]
    for folder in (source, again):
        evaluated = FolderSource(folder, manifest.class_names, 224)
        of_image = {match.second: match.first for match in find_matches(known, compared(evaluated))}
        rows = [row for row, path in enumerate(evaluated.paths) if Path(path).stem in set(stems)]
        assert np.mean([row in of_image for row in rows]) >= (1.0 if folder == source else 0.98)
        left_out = {Path(path).stem for path, _ in manifest.excluded}
        assert {Path(evaluated.paths[row]).stem for row in set(of_image) - set(rows)} <= left_out, "no other image"
