"""The folder of an analysis: a page that loads nothing and trusts nobody, figures that show the numbers, and writing
that is whole or not there."""

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cxr_dist.cli import main
from tests.html_page import Page
from tests.tfrecords_builder.eda.eda_images import CONFLICT, TRIPLE, build, draw, draw_varied
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.eda import figures, page as eda_page, pixel_figures
from tfrecords_builder.eda.analysis import analyse
from tfrecords_builder.eda.page import NUMBERS, PAGE, SUSPECTS, write_analysis

SOURCES = ("<i>https://example.org/$y_2$?a&b", "an archive with a long name, of which little can be said in a legend")
HOSTILE = {"<b>A&B": 40, "$x_1$ 'and' \"y\"": 40}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eda")
    return build(draw_varied(folder / "source"), folder / "dataset")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without duplicates, of two brightnesses, and with names that are markup and formulas elsewhere."""
    folder = tmp_path_factory.mktemp("plain")
    source = draw(folder / "source", HOSTILE, lambda label, _: 90.0 + 60 * label)
    with (source / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "source"])
        for number, path in enumerate(sorted(source.glob("*/images/*.png"))):
            writer.writerow([path.relative_to(source).as_posix(), SOURCES[number % 3 > 0]])
    return build(source, folder / "dataset")


@pytest.fixture(scope="module")
def out(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("out") / "new" / "analysis"
    write_analysis(dataset, folder)
    return folder


@pytest.fixture(scope="module")
def plain_out(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("out") / "plain"
    write_analysis(plain, folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NUMBERS).read_text())


# The page


@pytest.mark.parametrize("which", ["out", "plain_out"])
def test_the_page_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    page = Page((folder / PAGE).read_text())
    assert not {"script", "iframe", "object", "embed", "video", "audio", "base", "form"} & {tag for tag, _ in page.tags}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert not re.search(r"url\(|@import|@font-face", page.style)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for path in folder.glob("*.svg"):
        for element in ElementTree.parse(path).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "text")
            for name, value in element.attrib.items():
                if name.rpartition("}")[2] == "href":
                    assert value.startswith(("#", "data:image/png;base64,"))
                assert "http" not in value
                assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", value))


@pytest.mark.parametrize("which", ["out", "plain_out"])
def test_the_page_shows_every_figure_with_its_caption(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    page = Page((folder / PAGE).read_text())
    figures = numbers_of(folder)["figures"]
    assert {path.name for path in folder.iterdir()} == {NUMBERS, PAGE, SUSPECTS, *figures}
    shown = {image["alt"]: base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img")}
    assert len(page.all("img")) == len(page.all("figcaption")) == len(figures)
    for file, words in figures.items():
        assert shown[f"{words['title']}. {words['caption']}"] == (folder / file).read_bytes()
        assert words["caption"] in page.text
        assert words["caption"].endswith(".")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert {attributes["aria-labelledby"] for attributes in page.all("section")} <= set(ids)


def test_the_page_is_for_every_reader(out: Path) -> None:
    page = Page((out / PAGE).read_text())
    assert page.all("html")[0]["lang"] == "en"
    metas = {meta.get("name"): meta.get("content") for meta in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    for media in ("(prefers-color-scheme: dark)", "(max-width: 30rem)", "print"):
        assert f"@media {media}" in page.style
    assert "not for diagnosis" in page.text


def test_the_page_lists_duplicates_and_what_was_left_out(out: Path, plain_out: Path) -> None:
    text = Page((out / PAGE).read_text()).text
    for path in (*TRIPLE, *CONFLICT, "COVID/images/damaged.png"):
        assert path in text
    assert "is a near-duplicate of an image of another class (COVID and Normal)" in text
    assert {"groups.svg", "group_sizes.svg"} <= set(numbers_of(out)["figures"])
    assert "No image is a near-duplicate of another." in Page((plain_out / PAGE).read_text()).text
    assert not {"groups.svg", "group_sizes.svg"} & set(numbers_of(plain_out)["figures"])


def test_warnings_are_on_the_page(out: Path, plain_out: Path) -> None:
    for folder in (out, plain_out):
        warnings = numbers_of(folder)["warnings"]
        text = Page((folder / PAGE).read_text()).text
        assert all(warning in text for warning in warnings)
        assert ("No trivial feature predicts the class better" in text) == (not warnings)
    assert any("mean brightness" in text for text in numbers_of(plain_out)["warnings"])
    assert numbers_of(out)["warnings"] == []


def test_names_are_text_and_nothing_else(plain_out: Path) -> None:
    page = Page((plain_out / PAGE).read_text())
    assert not page.all("b")
    names = numbers_of(plain_out)["dataset"]["class_names"]
    assert len(names) == 2
    for name in names:
        assert name.replace("_", " ") in page.text


def test_sources_are_on_the_page_where_they_are_known(out: Path, plain_out: Path) -> None:
    page = Page((plain_out / PAGE).read_text())
    assert all(name in page.text for name in SOURCES)
    assert not page.all("i")
    assert "All 2 sources with 80 of 80 images of known source" in page.text
    assert (plain_out / "sources.svg").is_file()
    assert not (out / "sources.svg").exists()


def test_the_numbers_are_those_of_the_analysis(out: Path, dataset: Path) -> None:
    numbers = numbers_of(out)
    figures = numbers.pop("figures")
    assert numbers == analyse(dataset).numbers
    assert next(iter(figures)) == "counts.svg"


# Captions


def count_numbers(**classes: int) -> dict[str, Any]:
    ordered = sorted(classes, key=classes.__getitem__)
    deviations = {"train": 0.02, "validation": -0.034, "test": 0.014}
    return {
        "classes": classes,
        "largest": ordered[-1],
        "smallest": ordered[0],
        "imbalance": classes[ordered[-1]] / classes[ordered[0]],
        "splits": {
            split: {name: {"images": 1, "deviation": deviation / row} for row, name in enumerate(classes, start=1)}
            for split, deviation in deviations.items()
        },
    }


def test_the_caption_of_counts() -> None:
    text = figures.counts(count_numbers(Lung_Opacity=3000, COVID=1200)).caption
    assert "Lung Opacity has the most images (3,000), 2.50 times as many as COVID" in text
    assert "from the split 70/15/15 is 3.4 percentage points (Lung Opacity, validation)" in text, "of either sign"
    assert "Every class has 20 images" in figures.counts(count_numbers(A=20, B=20)).caption


def size_numbers(*widths: int, distinct: int = 7) -> dict[str, Any]:
    names = "ABCDE"
    return {
        "distinct": distinct,
        "commonest": [{"width": 299, "height": 300, "images": {"A": 5, "B": 7}}],
        "classes": {names[n]: {"width": {"median": w}, "height": {"median": 1}} for n, w in enumerate(widths)},
    }


def test_the_caption_of_sizes() -> None:
    text = figures._sizes_caption(size_numbers(512, 299, 1024))
    assert "7 different sizes, most often 299 x 300 pixels (12 images)" in text
    assert "from 299 pixels (B) to 1,024 (C)" in text
    assert "299 pixels in every class" in figures._sizes_caption(size_numbers(299, 299))
    assert figures._sizes_caption(size_numbers(299, distinct=1)).startswith("Every source image has 299 x 300 pixels")


def test_the_caption_of_distributions() -> None:
    def item(brightness: float, contrast: float) -> dict[str, Any]:
        return {
            "brightness": {"mean": brightness, "deviation": 10.0, "histogram": [1, 2]},
            "contrast": {"mean": contrast, "deviation": 2.0, "histogram": [1, 2]},
        }

    classes = {"A": item(120, 40), "B": item(100, 50), "C": item(110, 45)}
    text = pixel_figures.distributions({"histogram_step": 4, "classes": classes}).caption
    assert "Images of B are the darkest on average (100.0), those of A the brightest (120.0)" in text
    assert "Images of A have the least contrast on average (40.0), those of B the most (50.0)" in text
    assert text.endswith("the standard deviation within a class is 2.0.")


def test_the_caption_of_mean_images() -> None:
    pixels = {
        "mean_image_differences": [
            {"classes": ["A", "B"], "difference": 3.0},
            {"classes": ["A", "C"], "difference": 9.0},
            {"classes": ["B", "C"], "difference": 1.0},
        ],
        "classes": {"A": {"pixel_deviation": 5.0}, "B": {"pixel_deviation": 7.0}, "C": {"pixel_deviation": 6.0}},
    }
    images = np.zeros((3, 8, 8), np.float32)
    text = pixel_figures.means("ABC", pixels, images, images).caption
    assert "A and C (9.0 gray levels per pixel) differ most and those of B and C (1.0 gray" in text
    assert "vary most between images of B (by 7.0 gray levels)" in text


def test_the_captions_of_duplicates() -> None:
    numbers: dict[str, Any] = {
        "pairs": 5, "groups": 3, "images": 8, "sizes": {"2": 1, "3": 2}, "straddling_splits": 1,
        "straddling_classes": 2, "largest": [["a", "b", "c"], ["d", "e"]],
    }  # fmt: skip
    text = figures.group_sizes(numbers).caption
    assert "5 pairs of near-duplicates join 8 images into 3 groups, the largest of 3" in text
    assert "1 group lies in more than one split, and 2 in more than one class" in text
    none = figures.group_sizes(numbers | {"straddling_splits": 0, "straddling_classes": 0}).caption
    assert none.endswith("no group lies in more than one split or class.")
    picture = np.zeros((4, 4), np.uint8)
    text = figures.groups(numbers, [[picture, None], [picture, picture]]).caption
    assert "The 2 largest of 3 groups, 4 images in all" in text
    assert "1 more are in the table" in text
    assert "1 of them was excluded from the dataset" in text


def test_the_caption_of_trivial_features() -> None:
    def item(accuracy: float, suspicious: bool) -> dict[str, Any]:
        judged = {"guess": 0.5, "margin": 0.1, "validation_images": 600}
        return judged | {"accuracy": accuracy, "suspicious": suspicious}

    text = figures.shortcuts({"brightness": item(0.55, False), "border": item(0.81, True)}).caption
    assert "largest class has an accuracy of 50.0% on 600 validation images" in text
    assert "a single feature is 81.0% (border of the image). 1 of 2 features" in text
    assert "no single feature has a higher accuracy" in figures.shortcuts({"brightness": item(0.5, False)}).caption


# Figures


def test_figures_show_the_numbers(out: Path) -> None:
    numbers = numbers_of(out)
    names = list(numbers["counts"]["classes"])
    axes = figures._draw_counts(numbers["counts"]).axes[0]
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(3, len(names))
    assert widths.tolist() == [[of[n]["images"] for n in names] for of in numbers["counts"]["splits"].values()]
    assert [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()] == [
        name.replace("_", " ") for name in names
    ]
    panels = pixel_figures._draw_distributions(numbers["pixels"], "class").axes
    for axes, key in zip(panels, ("brightness", "contrast"), strict=True):
        for steps, item in zip(axes.patches, numbers["pixels"]["classes"].values(), strict=True):
            np.testing.assert_allclose(steps.get_data().values, np.array(item[key]["histogram"]) / item["images"])
        assert len({(steps.get_edgecolor(), steps.get_linestyle()) for steps in axes.patches}) == len(names)
    axes = figures._draw_shortcuts(numbers["shortcuts"]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [item["accuracy"] for item in numbers["shortcuts"].values()]
    assert [text.get_text().endswith("(warning)") for text in axes.texts] == [
        item["suspicious"] for item in numbers["shortcuts"].values()
    ]
    sizes = numbers["source_sizes"]["classes"]
    for axes, side in zip(figures._draw_sizes(sizes).axes, ("width", "height"), strict=True):
        boxes = [(box.get_x(), box.get_x() + box.get_width()) for box in axes.patches]
        assert boxes == [(sizes[name][side]["q25"], sizes[name][side]["q75"]) for name in names]
        assert axes.lines[0].get_xdata().tolist() == [sizes[name][side]["median"] for name in names]
    axes = figures._draw_group_sizes({"2": 7, "5": 1}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [7, 1]


def test_mean_images_are_shown_by_class() -> None:
    means, deviations = np.random.default_rng(0).uniform(0, 200, (2, 6, 8, 8)).astype(np.float32)
    figure = pixel_figures._draw_means([f"class {number}" for number in range(6)], means, deviations)
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.get_title()}
    for number in range(6):
        assert np.array_equal(shown[f"class {number}"], means[number])
    placed = {}
    for axes in figure.axes:
        if axes.images:
            place = axes.get_subplotspec()
            placed[place.rowspan.start, place.colspan.start] = axes.images[0].get_array()
    assert len(placed) == 12
    for (row, column), image in placed.items():
        if row % 2 == 0:
            number = next(n for n in range(6) if np.array_equal(image, means[n]))
            assert np.array_equal(placed[row + 1, column], deviations[number]), "below its mean"
    scales = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert len(scales) == 2, "one scale for all means, one for all deviations"


def test_samples_are_in_reading_order() -> None:
    pictures = [np.full((4, 4), number, np.uint8) for number in range(8)]
    sheet = pixel_figures._draw_samples(pictures).axes[0].images[0].get_array()
    places = [[int(sheet[top + 1, left + 1]) for left in range(0, 44, 8)] for top in (0, 8)]
    assert places == [[0, 1, 2, 3, 4, 5], [6, 7, 255, 255, 255, 255]]


# The folder


def test_the_same_dataset_gives_the_same_bytes(out: Path, dataset: Path, tmp_path: Path) -> None:
    write_analysis(dataset, tmp_path / "again")
    assert content(tmp_path / "again") == content(out)


def test_an_earlier_analysis_is_replaced(plain: Path, plain_out: Path, out: Path, tmp_path: Path) -> None:
    """One of three classes with duplicates, by one of two classes without: figures that are no more are gone."""
    target = Path(shutil.copytree(out, tmp_path / "analysis"))
    (target / ".counts.svg.k3_x9a1b.tmp").write_text("of one that was stopped")
    write_analysis(plain, target)
    assert content(target) == content(plain_out)


def test_an_analysis_that_is_stopped_anywhere(
    plain: Path, plain_out: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes: nothing vouches for what is there, no file is half, and the next one goes through."""
    analysis = analyse(plain)
    monkeypatch.setattr(eda_page.eda, "analyse", lambda *_: analysis)
    drawn = eda_page.draw(analysis)
    monkeypatch.setattr(eda_page, "draw", lambda _: drawn)
    rename = Path.replace
    for stop in count():
        for before in (None, out):
            target = tmp_path / f"{stop}-{before is not None}"
            if before is not None:
                shutil.copytree(before, target)
            left = iter(range(stop))

            def failing(path: Path, to: Path, left: Any = left) -> Path:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return rename(path, to)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", failing)
                try:
                    write_analysis(plain, target)
                    assert before is not None or stop == len(drawn) + 3, "page, figures, suspects, numbers"
                    finished = True
                except KeyboardInterrupt:
                    finished = False
                    assert not (target / NUMBERS).exists()
                    for name, data in content(target).items():
                        assert data in (content(out).get(name), content(plain_out).get(name)), name
            write_analysis(plain, target)
            assert content(target) == content(plain_out)
        if finished:
            break


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"counts.svg": "<svg/>"},
        {NUMBERS: "{}"},
        {NUMBERS: "not JSON"},
        {NUMBERS: '["kind"]'},
        {PAGE: "<html></html>"},
        {"notes.txt": "mine", NUMBERS: json.dumps({"kind": eda_page.eda.KIND})},
    ],
    ids=lambda files: " ".join(files),
)
def test_a_folder_that_holds_something_else_is_refused(files: dict[str, str], dataset: Path, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(UserError, match="contains other files than an analysis") as caught:
        write_analysis(dataset, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert content(tmp_path) == before


def test_the_dataset_itself_and_files_are_refused(dataset: Path, tmp_path: Path) -> None:
    before = content(dataset)
    with pytest.raises(UserError, match="contains other files"):
        write_analysis(dataset, dataset)
    assert content(dataset) == before
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=f"^{path}: .*is a file; give a folder"):
            write_analysis(dataset, path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "counts.svg").mkdir(parents=True)
    (tmp_path / "out" / PAGE).write_bytes(b'<meta name="generator" content="cxr-dist eda">')
    with pytest.raises(UserError, match=r"contains other files.*counts\.svg"):
        write_analysis(dataset, tmp_path / "out")


def test_a_dataset_that_is_none_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset folder"):
        write_analysis(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_lists_the_other_files_of_the_source_folder(plain_out: Path, tmp_path: Path) -> None:
    text = " ".join(Page((plain_out / PAGE).read_text()).text.split())
    assert "that are neither image nor mask, of 81 files." in text
    assert "(none)metadata of the images.csv1" in text
    source = draw(tmp_path / "source", {"A": 12, "B": 12})
    (source / "A" / "<i>.heic").write_bytes(b"")
    (source / "A" / "empty").mkdir()
    write_analysis(build(source, tmp_path / "d"), tmp_path / "out")
    text = " ".join(Page((tmp_path / "out" / PAGE).read_text()).text.split())
    assert "Aimages in another format.heic1" in text
    assert "empty folders: A/empty" in text


# The command


def test_the_command_says_what_was_found(
    dataset: Path,
    out: Path,
    plain: Path,
    plain_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.main(["eda", str(dataset), "--out", str(tmp_path / "a")])
    lines = capsys.readouterr().out.splitlines()
    assert content(tmp_path / "a") == content(out)
    assert lines[0].split() == ["class", "train", "validation", "test", "all"]
    assert lines[1].split() == ["COVID", "28", "6", "7", "41"]
    assert "the largest class, COVID, is 2.05 times the smallest, Viral_Pneumonia" in lines
    assert "4 pairs of near-duplicates: 7 images in 3 groups, 0 of them in more than one split" in lines
    assert "1 files were rejected and 2 excluded" in lines
    assert "0 of 95 files of the source folder are neither image nor mask" in lines
    warnings = numbers_of(plain_out)["warnings"]
    assert warnings
    main.main(["eda", str(plain), "--out", str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {text}" for text in warnings]
    assert lines[-1] == f"report: {tmp_path / 'b' / PAGE}"


@pytest.mark.parametrize("arguments", [["missing", "--out", "new"], ["DATASET", "--out", "DATASET"], ["DATASET"]])
def test_the_commands_errors_are_one_line(
    arguments: list[str], dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["eda", *(str(dataset) if argument == "DATASET" else argument for argument in arguments)])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")


def test_no_tensorflow_is_loaded(plain: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tfrecords_builder.eda.page import write_analysis; "
        "write_analysis(Path(sys.argv[1]), Path(sys.argv[2])); "
        "print(sorted({'tensorflow', 'keras', 'ray', 'cxr_dist', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = Path(main.__file__).parents[2]
    arguments = [sys.executable, "-c", code, str(plain), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
