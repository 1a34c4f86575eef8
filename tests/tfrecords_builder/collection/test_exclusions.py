"""Images that `build --exclude` leaves out: they are counted, and everything else is as if they were not there."""

import shutil
from pathlib import Path

import pytest

from cxr_dist.cli import main
from tests.tfrecords_builder.test_build import build, content
from tfrecords_builder.collection.collect import Collection
from tfrecords_builder.collection.exclusions import read_excluded, without_excluded
from tfrecords_builder.collection.file_kinds import Reason
from tfrecords_builder.collection.find import SourceImage
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.verify import verify_dataset

GONE = ("COVID/images/COVID-3.png", "COVID/images/COVID-7.png", "Normal/images/Normal-1.png")


def table(folder: Path, paths: tuple[str, ...], head: str = "path,class,rank,score,reason") -> Path:
    file = folder / "suspects.csv"
    file.write_text("\n".join([head, *(f"{path},x,1,9.00,blurred" for path in paths)]) + "\n")
    return file


def test_the_records_are_those_of_a_source_without_the_images(source: Path, tmp_path: Path) -> None:
    file = table(tmp_path, GONE)
    summary = build(source, tmp_path / "d", exclude=file)
    less = Path(shutil.copytree(source, tmp_path / "less"))
    for path in GONE:
        (less / path).unlink()
    build(less, tmp_path / "e")
    shards = {name: data for name, data in content(tmp_path / "d").items() if ".tfrecord-" in name}
    assert shards == {name: data for name, data in content(tmp_path / "e").items() if ".tfrecord-" in name}
    assert shards
    verify_dataset(tmp_path / "d")
    assert not {row.path for row in summary.manifest.rows} & set(GONE)
    counted = {item.folder: item.files for item in summary.manifest.not_taken if item.reason is Reason.EXCLUDED}
    assert counted == {"COVID": 2, "Normal": 1}
    assert build(source, tmp_path / "d", exclude=file).reused
    assert build(source, tmp_path / "d").changes == ("source files added: 3",)


def test_the_output_counts_them(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table(tmp_path, GONE)
    main.main(
        ["build", str(source), str(tmp_path / "d"), "--image-size", "16", "--workers", "1", "--exclude", str(file)]
    )
    assert "not taken: COVID: 2 .png: left out by --exclude (COVID/images/COVID-3.png)" in capsys.readouterr().out


def test_a_damaged_image_may_be_left_out(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / GONE[0]).write_bytes(b"no image")
    assert not build(copy, tmp_path / "d", exclude=table(tmp_path, GONE[:1])).manifest.rejected


def test_the_mask_goes_with_its_image(tmp_path: Path) -> None:
    images = [SourceImage(f"A/images/{n}.png", "A", f"A/masks/{n}.tif") for n in range(3)]
    listing = without_excluded(Collection(tuple(images)), table(tmp_path, ("A/images/1.png", "A/images/1.png")))
    assert listing.images == (images[0], images[2])
    assert sorted((item.suffix, item.files) for item in listing.not_taken) == [(".png", 1), (".tif", 1)]


@pytest.mark.parametrize(
    ("paths", "head", "message"),
    [
        (("COVID/nowhere.png",), "path,a,b,c,d", "line 2: 'COVID/nowhere.png' is not an image of the source"),
        (GONE, "file,a,b,c,d", "needs the column path in its first line"),
        (
            tuple(f"Viral Pneumonia/images/Viral Pneumonia-{n}.png" for n in range(9)),
            "path,a,b,c,d",
            "names every image of class 'Viral_Pneumonia'",
        ),
    ],
)
def test_a_table_that_cannot_be_used(
    source: Path, tmp_path: Path, paths: tuple[str, ...], head: str, message: str
) -> None:
    file = table(tmp_path, paths, head)
    with pytest.raises(UserError, match=message) as caught:
        build(source, tmp_path / "d", exclude=file)
    assert str(caught.value).startswith(str(file))
    assert not (tmp_path / "d").exists() or not any((tmp_path / "d").glob("*.parquet"))


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .* --exclude"):
        read_excluded(tmp_path / "none.csv", ())
    (tmp_path / "image.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a CSV file in UTF-8"):
        read_excluded(tmp_path / "image.csv", ())


def test_marks_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufeffpath,reason\r\nA/ä.png,x\r\n".encode())
    assert read_excluded(tmp_path / "t.csv", {"A/ä.png"}) == {"A/ä.png"}
