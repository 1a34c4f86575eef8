"""The numbers of the analysis: held against NumPy on all images at once, the source files, and plain counting."""

import json
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tfrecords_builder.eda import eda_images
from tests.tfrecords_builder.eda.eda_images import CONFLICT, PAIR, REJECTED, TRIPLE, build, draw, draw_varied, read_all
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.eda import analysis as eda, counts as eda_counts, typical
from tfrecords_builder.eda.analysis import Analysis, PixelStatistics, analyse
from tfrecords_builder.format.manifest import read_manifest, write_manifest
from tfrecords_builder.splitting.splits import SPLITS

NAMES = ("COVID", "Normal", "Viral_Pneumonia")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_varied(tmp_path_factory.mktemp("eda") / "source")


@pytest.fixture(scope="module")
def dataset(source: Path) -> Path:
    return build(source, source.parent / "dataset")


@pytest.fixture(scope="module")
def analysis(dataset: Path) -> Analysis:
    return analyse(dataset)


def test_numbers_are_json_and_the_same_each_time(analysis: Analysis, dataset: Path) -> None:
    again = analyse(dataset)
    assert json.dumps(again.numbers, allow_nan=False) == json.dumps(analysis.numbers, allow_nan=False)
    assert np.array_equal(again.means, analysis.means)
    assert json.loads(json.dumps(analysis.numbers)) == analysis.numbers, "no keys that JSON would change"


def test_counts(analysis: Analysis, dataset: Path) -> None:
    manifest, images = read_all(dataset)
    counts = analysis.numbers["counts"]
    # Of COVID one is the conflict, two are further copies; the damaged file counts nowhere.
    assert counts["classes"] == {"COVID": 40 + 2 - 1, "Normal": 30 + 1, "Viral_Pneumonia": 20}
    assert counts["images"] == len(images)
    assert counts["source_files"] == len(manifest.rows) == len(images) + 3
    assert (counts["largest"], counts["smallest"], counts["imbalance"]) == ("COVID", "Viral_Pneumonia", 41 / 20)
    expected = Counter((row.split, row.class_name) for row, _ in images)
    for split, target in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        for name in NAMES:
            item = counts["splits"][split][name]
            assert item["images"] == expected[split, name]
            assert item["share"] == pytest.approx(expected[split, name] / counts["classes"][name])
            assert item["deviation"] == pytest.approx(item["share"] - target)


def test_pixels_are_those_of_all_images_at_once(analysis: Analysis, dataset: Path) -> None:
    _, images = read_all(dataset)
    assert set(analysis.numbers["pixels"]["classes"]) == set(NAMES)
    for label, name in enumerate(NAMES):
        stack = np.stack([image for row, image in images if row.class_name == name]).astype(np.float64)
        np.testing.assert_allclose(analysis.means[label], stack.mean(0), atol=1e-4)
        np.testing.assert_allclose(analysis.deviations[label], stack.std(0), atol=1e-3)
        numbers = analysis.numbers["pixels"]["classes"][name]
        assert numbers["images"] == len(stack)
        assert numbers["pixel_deviation"] == pytest.approx(stack.std(0).mean(), abs=1e-3)
        for key, values, top in (
            ("brightness", stack.mean((1, 2)), 256),
            ("contrast", stack.std((1, 2)), 128),
        ):
            found = numbers[key]
            assert found["mean"] == pytest.approx(values.mean())
            assert found["deviation"] == pytest.approx(values.std())
            for quantile, share in (("q05", 0.05), ("q25", 0.25), ("median", 0.5), ("q75", 0.75), ("q95", 0.95)):
                exact = np.quantile(values, share, method="inverted_cdf")
                assert found[quantile] == pytest.approx(exact, abs=0.125), quantile
            histogram, _ = np.histogram(values, np.arange(0, top + 1, 4))
            assert found["histogram"] == histogram.tolist()
    for item in analysis.numbers["pixels"]["mean_image_differences"]:
        one, other = (analysis.means[NAMES.index(name)] for name in item["classes"])
        assert item["difference"] == pytest.approx(np.abs(one - other).mean(), rel=1e-5)
    assert len(analysis.numbers["pixels"]["mean_image_differences"]) == 3


@pytest.mark.parametrize("kind", ["noise", "white", "black", "half"])
def test_streaming_gives_what_all_at_once_gives(kind: str) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    if kind != "noise":
        images[:] = {"white": 255, "black": 0, "half": 0}[kind]
    if kind == "half":
        images[:, :4] = 255
    labels = rng.integers(0, 2, 300)
    forward, backward = PixelStatistics(3, 8), PixelStatistics(3, 8)
    for image, label in zip(images, labels, strict=True):
        assert forward.add(label, image) == pytest.approx((image.mean(), image.std()))
    for image, label in zip(images[::-1], labels[::-1], strict=True):
        backward.add(label, image)
    assert np.array_equal(forward.means, backward.means)
    assert np.array_equal(forward.deviations, backward.deviations)
    for label in (0, 1):
        chosen = images[labels == label].astype(np.float64)
        np.testing.assert_allclose(forward.means[label], chosen.mean(0), atol=1e-4)
        np.testing.assert_allclose(forward.deviations[label], chosen.std(0), atol=1e-3)
        numbers = forward.levels.contrast[label].numbers()
        assert sum(numbers["histogram"]) == len(chosen)
        assert numbers["median"] == pytest.approx(np.median(chosen.std((1, 2))), abs=0.2)
    assert not forward.means[2].any()
    assert not forward.deviations[2].any()


def test_sizes_and_kinds_are_those_of_the_source_files(analysis: Analysis, source: Path, dataset: Path) -> None:
    rows = [row for row in read_manifest(dataset).rows if row.status == "ok"]
    sizes = {row.path: Image.open(source / row.path).size for row in rows}
    numbers = analysis.numbers["source_sizes"]
    assert numbers["distinct"] == len(set(sizes.values()))
    together = Counter(sizes.values())
    assert [
        sum(item["images"].values()) for item in numbers["commonest"]
    ] == [count for _, count in together.most_common(eda_counts.SIZES_LISTED)]  # fmt: skip
    for item in numbers["commonest"]:
        for name in NAMES:
            of = [row for row in rows if row.class_name == name and sizes[row.path] == (item["width"], item["height"])]
            assert item["images"][name] == len(of)
    for name in NAMES:
        for position, side in enumerate(("width", "height")):
            values = sorted(sizes[row.path][position] for row in rows if row.class_name == name)
            found = numbers["classes"][name][side]
            assert (found["least"], found["greatest"]) == (values[0], values[-1])
            assert found["median"] == values[(len(values) - 1) // 2]
    kinds = analysis.numbers["categories"]["file_kind"]
    assert list(kinds) == [".png", ".jpg"], "in small letters, the commonest first"
    assert kinds[".jpg"] == {"COVID": 0, "Normal": 0, "Viral_Pneumonia": 8}


def test_samples_are_of_the_training_split_and_depend_on_paths_alone(
    analysis: Analysis, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, images = read_all(dataset)
    split_of = {row.path: (row.class_name, row.split) for row, _ in images}
    for name, paths in analysis.numbers["samples"].items():
        assert len(set(paths)) == len(paths) == min(12, manifest.counts["train"][name])
        assert {split_of[path] for path in paths} == {(name, "train")}
    image_of = {row.path: image for row, image in images}
    for path, picture in analysis.pictures.items():
        assert np.array_equal(picture, image_of[path]), "20 pixels are small enough as they are"
    assert {path for paths in analysis.numbers["samples"].values() for path in paths} <= set(analysis.pictures)
    monkeypatch.setattr(eda, "SAMPLES_PER_CLASS", 5)
    fewer = eda.choose_samples(manifest)
    assert fewer == {name: paths[:5] for name, paths in analysis.numbers["samples"].items()}
    in_order = sorted(row.path for row in manifest.rows if row.split == "train" and row.class_name == "COVID")
    assert fewer["COVID"] != in_order[:5], "the first by name are often of one source"


def test_duplicates(analysis: Analysis, dataset: Path) -> None:
    numbers = analysis.numbers["duplicates"]
    shown = [[image["path"] for image in group] for group in numbers["largest"]]
    assert shown == [sorted(TRIPLE), sorted(PAIR), sorted(CONFLICT)], "the largest first, then those with pictures"
    assert numbers["pairs"] == len(read_manifest(dataset).duplicates) == 4
    assert (numbers["groups"], numbers["images"], numbers["sizes"]) == (3, 7, {"2": 2, "3": 1})
    assert (numbers["straddling_splits"], numbers["straddling_classes"]) == (0, 1)
    assert [image["split"] for image in numbers["largest"][2]] == [None, None]
    assert set(TRIPLE) | set(PAIR) <= set(analysis.pictures)


def test_size_and_brightness_of_each_source(source: Path, tmp_path: Path, analysis: Analysis) -> None:
    assert analysis.numbers["sources"] == {}
    copy = Path(shutil.copytree(source, tmp_path / "s"))
    dataset = build(source, tmp_path / "plain")
    accepted = [row for row in read_all(dataset)[0].rows if row.status == "ok"]
    said = {row.path: ("north", "south")[number % 2] for number, row in enumerate(accepted) if number % 5}
    lines = [f"{path},{name}" for path, name in said.items()]
    (copy / "metadata.csv").write_text("\n".join(["path,source", *lines]))
    found = analyse(build(copy, tmp_path / "d")).numbers["sources"]
    images = {row.path: (row, gray) for row, gray in read_all(tmp_path / "d")[1]}
    assert list(found) == sorted(found, key=lambda name: -found[name]["images"])
    for name, item in found.items():
        of = [images[path] for path in said if said[path] == name]
        assert item["images"] == len(of)
        np.testing.assert_allclose(item["brightness"]["mean"], np.mean([gray.mean() for _, gray in of]))
        np.testing.assert_allclose(item["contrast"]["deviation"], np.std([gray.std() for _, gray in of]))
        assert item["width"]["median"] == np.quantile([row.width for row, _ in of], 0.5, method="inverted_cdf")
        assert item["height"]["greatest"] == max(row.height for row, _ in of)


def test_copies_across_splits_are_counted_and_warned_of(source: Path, tmp_path: Path) -> None:
    seen = set()
    for seed in range(4):
        dataset = build(source, tmp_path / str(seed), split="published", seed=seed)
        splits = {row.path: row.split for row in read_manifest(dataset).rows}
        expected = sum(len({splits[path] for path in group}) > 1 for group in (TRIPLE, PAIR, CONFLICT))
        numbers = analyse(dataset).numbers
        assert numbers["duplicates"]["straddling_splits"] == expected
        warned = [text for text in numbers["warnings"] if text.startswith("Near-duplicates across splits")]
        assert len(warned) == (expected > 0)
        assert all(f"{expected} of 3 groups" in text for text in warned)
        seen.add(expected > 0)
    assert True in seen


def test_patients_across_splits_are_counted_and_warned_of(source: Path, tmp_path: Path, analysis: Analysis) -> None:
    assert analysis.numbers["patients"] == {"several_images": 0, "images": 0, "straddling_splits": 0}
    copy = Path(shutil.copytree(source, tmp_path / "s"))
    paths = sorted(path.relative_to(copy).as_posix() for path in copy.glob("*/images/*"))
    lines = [f"{path},{number // 3}" for number, path in enumerate(paths)]
    (copy / "metadata.csv").write_text("\n".join(["path,patient", *lines]))
    for split in ("leak-free", "published"):
        dataset = build(copy, tmp_path / split, split=split)
        splits: dict[str | None, set[str | None]] = {}
        for row in read_manifest(dataset).rows:
            splits.setdefault(row.patient, set()).add(row.split)
        expected = sum(len(of - {None}) > 1 for of in splits.values())
        numbers = analyse(dataset).numbers
        assert numbers["patients"]["several_images"] == len(splits)
        assert numbers["patients"]["straddling_splits"] == expected
        assert (expected > 0) == (split == "published")
        assert numbers["duplicates"]["groups"] == 3, "a patient's images are no near-duplicates"
        warned = [text for text in numbers["warnings"] if text.startswith("Patients across splits")]
        assert len(warned) == (expected > 0)


def test_the_files_of_the_source_folder_add_up(source: Path, tmp_path: Path, analysis: Analysis) -> None:
    images = sum(eda_images.COUNTS.values()) + 5
    assert analysis.numbers["source_folder"] == {
        "files": images, "images": images, "masks": 0, "not_taken": [], "notes": []
    }  # fmt: skip
    copy = Path(shutil.copytree(source, tmp_path / "s"))
    (copy / "COVID/masks").mkdir()
    for name in ("COVID-7", "COVID-8", "stranger"):
        shutil.copy(copy / "COVID/images/COVID-7.png", copy / f"COVID/masks/{name}.png")
    (copy / "COVID/images/x.heic").write_bytes(b"")
    for masks, used in (("read", 2), ("ignore", 0)):
        dataset = build(copy, tmp_path / masks, masks=masks)
        numbers = json.loads(json.dumps(analyse(dataset).numbers["source_folder"]))
        assert (numbers["files"], numbers["images"], numbers["masks"]) == (images + 4, images, used)
        files = {item["reason"]: item["files"] for item in numbers["not_taken"]}
        assert files["images in another format"] == 1
        assert sum(files.values()) == 4 - used
        assert [note["text"] for note in numbers["notes"]] == [
            "left out by --on-error skip: COVID 1 of 44 (1 .heic: images in another format)",
            *["41 of 43 images of COVID have no mask"][: used // 2],
        ]


def test_what_was_left_out_is_listed_with_its_reason(analysis: Analysis, dataset: Path) -> None:
    left_out = analysis.numbers["left_out"]
    manifest = read_manifest(dataset)
    for status, paths in (("rejected", [REJECTED]), ("excluded", sorted(CONFLICT))):
        reasons = {row.path: row.reason for row in manifest.rows}
        assert left_out[status]["files"] == [{"path": path, "reason": reasons[path]} for path in paths]
        assert left_out[status]["images"] == len(paths)
        assert left_out[status]["reasons"] == Counter(reasons[path] for path in paths)


# Trivial features


def suspicious(numbers: dict[str, Any]) -> set[str]:
    found = {name for name, item in numbers["shortcuts"].items() if item["suspicious"]}
    warned = {name for name in eda.FEATURES if any(f": {eda.FEATURES[name]} alone" in w for w in numbers["warnings"])}
    assert warned == found
    return found


EVEN = {"COVID": 80, "Normal": 80}


def test_noise_gives_no_warning(tmp_path: Path) -> None:
    numbers = analyse(build(draw(tmp_path / "s", EVEN), tmp_path / "d")).numbers
    assert suspicious(numbers) == set()
    assert numbers["warnings"] == []
    assert set(numbers["shortcuts"]) == set(eda.FEATURES)
    for name in ("source_size", "file_kind"):
        assert numbers["shortcuts"][name]["constant"]
        assert numbers["shortcuts"][name]["accuracy"] == 0.5
    assert {item["train_images"] for item in numbers["shortcuts"].values()} == {112}
    assert {item["validation_images"] for item in numbers["shortcuts"].values()} == {24}


def test_brightness_that_tells_the_class_is_warned_of(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", EVEN, lambda label, rng: rng.uniform(90, 110) + 40 * label)
    numbers = analyse(build(source, tmp_path / "d")).numbers
    assert {"brightness", "border", "thumbnail"} <= suspicious(numbers)
    assert numbers["shortcuts"]["brightness"]["accuracy"] == 1
    assert not numbers["shortcuts"]["contrast"]["suspicious"]
    assert "mean brightness alone has an accuracy of 100.0%" in numbers["warnings"][0]
    assert "always predicting the largest class has 50.0%" in numbers["warnings"][0]


def test_a_mark_at_the_border_is_warned_of(tmp_path: Path) -> None:
    """A pixel in a corner, as the letters of one hospital: hardly any brightness, but a place."""
    source = draw(tmp_path / "s", EVEN)
    for path in (source / "COVID").glob("*/*.png"):
        pixels = np.array(Image.open(path))
        pixels[0, :3] = 255
        Image.fromarray(pixels).save(path)
    found = suspicious(analyse(build(source, tmp_path / "d")).numbers)
    assert "border" in found
    assert not found & {"brightness", "source_size", "file_kind"}


def test_the_size_and_the_kind_of_the_file_are_warned_of(tmp_path: Path) -> None:
    """The sizes of one class lie on both sides of the other's: no threshold of one number divides them."""
    source = draw(tmp_path / "s", EVEN)
    for number, path in enumerate(sorted((source / "Normal").glob("*/*.png"))):
        save_as = path.with_suffix(".jpg")
        Image.open(path).resize((10, 10) if number % 2 else (30, 30)).save(save_as, quality=95)
        path.unlink()
    numbers = analyse(build(source, tmp_path / "d")).numbers
    assert {"source_size", "file_kind"} <= suspicious(numbers)
    assert numbers["shortcuts"]["source_size"]["accuracy"] == 1
    assert numbers["shortcuts"]["file_kind"]["accuracy"] == 1


def test_categories_are_coded_by_the_training_images(dataset: Path) -> None:
    """Also where another one is commonest among the validation images: columns must mean the same in both."""
    manifest, images = read_all(dataset)
    of_kind = {kind: [item for item in images if item[0].path.endswith(kind)] for kind in (".png", ".JPG")}
    tables = []
    for png, jpg in ((4, 2), (1, 3)):
        chosen = of_kind[".png"][:png] + of_kind[".JPG"][:jpg]
        features = eda._TrivialFeatures(row.path for row, _ in chosen)
        for row, image in chosen[::-1]:
            features.add(row, image, image.mean(), image.std())
        tables.append((features, sorted(row.path for row, _ in chosen)))
    (train, _), (validation, paths) = tables
    found = validation.tables(train)
    assert found["file_kind"].tolist() == [[1, 0] if path.endswith(".png") else [0, 1] for path in paths]
    assert [manifest.class_names[label] for label in validation.labels] == [
        path.partition("/")[0].replace(" ", "_") for path in paths
    ]
    image_of = {row.path: image for row, image in images}
    np.testing.assert_allclose(found["brightness"][:, 0], [image_of[path].mean() for path in paths], rtol=1e-6)
    np.testing.assert_allclose(found["contrast"][:, 0], [image_of[path].std() for path in paths], rtol=1e-6)


def test_the_test_split_has_no_part_in_them(tmp_path: Path) -> None:
    """Test images of any brightness leave every number of the features; a validation image does not."""
    source = draw(tmp_path / "s", EVEN, lambda label, rng: rng.uniform(90, 150) + 10 * label)
    before = analyse(build(source, tmp_path / "d"))
    split_of = {row.path: row.split for row in read_manifest(tmp_path / "d").rows}

    def changed(split: str, folder: str) -> Analysis:
        copy = Path(shutil.copytree(source, tmp_path / folder))
        for number, path in enumerate(path for path, of in split_of.items() if of == split):
            rng = np.random.default_rng([7, number])
            eda_images.save(copy / path, 200 if path.startswith("COVID") else 40, rng, (25, 25))
        return analyse(build(copy, tmp_path / f"{folder}-dataset"))

    test, validation = changed("test", "test"), changed("validation", "validation")
    assert {row.path: row.split for row in read_manifest(tmp_path / "test-dataset").rows} == split_of
    assert test.numbers["shortcuts"] == before.numbers["shortcuts"]
    assert test.numbers["samples"] == before.numbers["samples"]
    assert not np.array_equal(test.means, before.means), "the change was seen"
    for name in ("brightness", "thumbnail"):
        assert validation.numbers["shortcuts"][name] != before.numbers["shortcuts"][name]


def test_large_splits_are_sampled(dataset: Path, analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eda, "SAMPLE_LIMIT", 12)
    numbers = analyse(dataset).numbers
    assert {item["train_images"] for item in numbers["shortcuts"].values()} == {12}
    assert {item["validation_images"] for item in numbers["shortcuts"].values()} == {12}
    assert analyse(dataset).numbers == numbers
    assert numbers["pixels"] == analysis.numbers["pixels"], "all images count where no model is fitted"


# Reading


def test_the_encoding_changes_no_number(source: Path, analysis: Analysis, tmp_path: Path) -> None:
    numbers = analyse(build(source, tmp_path / "png", encoding="png")).numbers
    for part in ("counts", "pixels", "shortcuts", "samples", "duplicates"):
        assert numbers[part] == analysis.numbers[part]


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eda, "SAMPLE_LIMIT", 20)
    for limit in ("BLOCK", "MEDIAN_SAMPLE"):
        monkeypatch.setattr(typical, limit, 20)
    peaks = []
    for count in (20, 120):
        dataset = build(
            draw(tmp_path / f"s{count}", dict.fromkeys(EVEN, count), side=128), tmp_path / f"d{count}", image_size=128
        )
        analyse(dataset)  # what is loaded at first use is no part of it
        tracemalloc.start()
        analyse(dataset)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    images = 2 * (120 - 20) * 128 * 128
    assert peaks[1] - peaks[0] < images / 4, "rows of the manifest, and a buffer"


def test_progress_counts_every_image(dataset: Path) -> None:
    calls: list[tuple[int, int]] = []
    analyse(dataset, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 92) for done in range(1, 93)]


def test_damage_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset folder"):
        analyse(tmp_path / "missing")
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    shards = [copy / shard.name for shard in read_manifest(copy).shards]
    data = bytearray(shards[1].read_bytes())
    data[len(data) // 2] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(UserError, match=f"{shards[1].name}.*checksum") as caught:
        analyse(copy)
    assert len(str(caught.value).splitlines()) == 1
    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name}: this shard is missing"):
        analyse(copy)


@pytest.mark.parametrize("column", ["path", "shard", "index"])
def test_records_that_are_not_where_the_manifest_says_are_noticed(column: str, dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    manifest = read_manifest(copy)
    rows = list(manifest.rows)
    number = next(number for number, row in enumerate(rows) if row.split == "test")
    wrong = {"path": "other.png", "shard": manifest.shards[0].name, "index": 99}
    rows[number] = replace(rows[number], **{column: wrong[column]})
    write_manifest(copy, replace(manifest, rows=tuple(rows)))
    with pytest.raises(UserError, match=r"cxr-test.*the manifest has elsewhere"):
        analyse(copy)
