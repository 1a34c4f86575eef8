"""Exploratory analysis of a dataset: all its numbers, and the pictures that belong to them.

The manifest tells of counts, sizes and duplicates. The images are read once, shard by shard. What is kept of them are
sums, histograms, a fixed number of small pictures, the trivial features of a bounded sample (`shortcuts`), and 290
bytes of each image, by which odd ones are found (`odd_images`).
"""

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.eda import odd_images, shortcuts
from tfrecords_builder.eda.counts import (
    QUANTILES,
    accepted,
    category_numbers,
    count_numbers,
    duplicate_numbers,
    largest_groups,
    left_out_numbers,
    patient_numbers,
    quantiles,
    size_numbers,
    source_folder_numbers,
)
from tfrecords_builder.eda.odd_images import OddImages, Suspect
from tfrecords_builder.eda.records import every_image, some_images
from tfrecords_builder.eda.shortcuts import Features, Gray
from tfrecords_builder.format.manifest import Manifest, check_shards, read_manifest
from tfrecords_builder.format.manifest_rows import Row

FORMAT_VERSION = 1
KIND = "exploratory analysis of a dataset"
"""What `eda.json` says that it is."""
SAMPLES_PER_CLASS = 12
ODD_SHOWN = 12
"""Of each class, with their pictures."""
IMAGES_SHOWN_PER_GROUP = 6
PICTURE_SIDE = 128
"""Samples and duplicates are shown at this side or less, in pixels."""
SAMPLE_LIMIT = 20_000
"""Images of a split, at most, that the shortcuts are fitted or judged on."""
BIN_WIDTH = 0.25
"""Of the histograms that quantiles are taken from, in gray levels."""

FEATURES = {
    "brightness": "mean brightness",
    "contrast": "standard deviation of the pixels",
    "border": "border of the image",
    "source_size": "width and height of the source image",
    "file_kind": "kind of file (suffix)",
    "source": "source of the image, by the collection",
    "thumbnail": "thumbnail of 16 x 16 pixels",
}
"""The trivial features, by their names in the page."""
CATEGORIES: dict[str, Callable[[Row], str]] = {
    "file_kind": lambda row: PurePosixPath(row.path).suffix.lower(),
    "source": lambda row: row.source or "unknown source",
}
"""What is counted by class, and tried as a feature."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Analysis:
    """An analysis: `numbers` are JSON as it stands, the rest is pictures."""

    numbers: dict[str, Any]
    means: npt.NDArray[np.float32]
    """[C, S, S]: mean image of each class, 0 to 255."""
    deviations: npt.NDArray[np.float32]
    """[C, S, S]: standard deviation of each pixel over the images of a class."""
    pictures: dict[str, Gray]
    """Small pictures by path, of the samples, the odd images, and the duplicates that are shown and have a record."""
    suspects: list[Suspect]
    """The odd images of each class, the oddest first."""


@dataclass
class Distribution:
    """Numbers from 0 to `top`, as sums and a histogram of fine bins."""

    top: int
    count: int = 0
    _sum: float = 0.0
    _squares: float = 0.0
    _bins: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._bins = np.zeros(round(self.top / BIN_WIDTH), np.int64)

    def add(self, value: float) -> None:
        self.count += 1
        self._sum += value
        self._squares += value * value
        self._bins[min(int(value / BIN_WIDTH), len(self._bins) - 1)] += 1

    def numbers(self) -> dict[str, Any]:
        """Mean, deviation and quantiles (the middle of their bin), and the histogram in bins of four levels."""
        mean = self._sum / max(self.count, 1)
        below = np.cumsum(self._bins)
        return {
            "mean": mean,
            "deviation": max(self._squares / max(self.count, 1) - mean**2, 0.0) ** 0.5,
            **{name: (int(np.searchsorted(below, q * self.count)) + 0.5) * BIN_WIDTH for name, q in QUANTILES.items()},
            "histogram": self._bins.reshape(-1, round(HISTOGRAM_STEP / BIN_WIDTH)).sum(1).tolist(),
        }


class Levels:
    """Brightness and contrast of images, by what they belong to: a class, or a source."""

    def __init__(self) -> None:
        self.brightness: dict[int | str, Distribution] = defaultdict(lambda: Distribution(256))
        self.contrast: dict[int | str, Distribution] = defaultdict(lambda: Distribution(128))

    def add(self, key: int | str, mean: float, deviation: float) -> None:
        self.brightness[key].add(mean)
        self.contrast[key].add(deviation)

    def numbers(self, key: int | str) -> dict[str, Any]:
        return {"brightness": self.brightness[key].numbers(), "contrast": self.contrast[key].numbers()}


class PixelStatistics:
    """Mean and deviation images, brightness and contrast by class, from one image at a time.

    Sums are of integers and so exact, in any order: up to 2**48 images do not overflow them.
    """

    def __init__(self, classes: int, image_size: int) -> None:
        self._count = np.zeros(classes, np.int64)
        self._sums = np.zeros((classes, image_size, image_size), np.uint64)
        self._squares = np.zeros_like(self._sums)
        self.levels = Levels()

    def add(self, label: int, gray: Gray) -> tuple[float, float]:
        """Count uint8 [S, S]; its brightness and contrast (mean and standard deviation of its pixels)."""
        squares = np.square(gray, dtype=np.uint32)
        self._count[label] += 1
        self._sums[label] += gray
        self._squares[label] += squares
        mean = int(gray.sum(dtype=np.uint64)) / gray.size
        variance = int(squares.sum(dtype=np.uint64)) / gray.size - mean**2
        deviation = max(variance, 0.0) ** 0.5
        self.levels.add(label, mean, deviation)
        return mean, deviation

    @property
    def means(self) -> npt.NDArray[np.float32]:
        """[C, S, S]; zeros where a class has no image."""
        return (self._sums / self._divisor()).astype(np.float32)

    @property
    def deviations(self) -> npt.NDArray[np.float32]:
        """[C, S, S], of the images of a class, divided by their number; zeros where it has none."""
        variance = self._squares / self._divisor() - (self._sums / self._divisor()) ** 2
        return np.sqrt(np.maximum(variance, 0)).astype(np.float32)

    def _divisor(self) -> npt.NDArray[np.int64]:
        return np.maximum(self._count, 1)[:, None, None]


HISTOGRAM_STEP = 4
"""Gray levels a bin, of the histograms that are drawn."""


def analyse(dataset: Path, progress: Progress | None = None) -> Analysis:
    """Read a dataset once and analyse it. The same dataset gives the same numbers, to the last bit.

    Args:
        dataset: A folder that `build.build_dataset` made.
        progress: Called with (images read, images in all).

    Raises:
        UserError: It is no complete dataset, or damaged; names the file.
    """
    manifest = read_manifest(dataset)
    check_shards(dataset, manifest)
    samples = choose_samples(manifest)
    shown = [row.path for rows in largest_groups(manifest) for row in rows[:IMAGES_SHOWN_PER_GROUP]]
    wanted = {path for paths in samples.values() for path in paths} | set(shown)
    statistics, levels = PixelStatistics(len(manifest.class_names), manifest.image_size), Levels()
    trivial = {
        split: _TrivialFeatures(_least_hashes((row.path for row in manifest.rows if row.split == split), SAMPLE_LIMIT))
        for split in ("train", "validation")
    }
    pictures: dict[str, Gray] = {}
    total = sum(shard.records for shard in manifest.shards)
    odd = OddImages(total, manifest.image_size)
    for done, (row, gray) in enumerate(every_image(dataset, manifest), start=1):
        mean, deviation = statistics.add(row.label, gray)
        odd.add(row, gray)
        if row.source is not None:
            levels.add(row.source, mean, deviation)
        if row.split in trivial:
            trivial[row.split].add(row, gray, mean, deviation)
        if row.path in wanted:
            pictures[row.path] = shortcuts.reduced(gray, PICTURE_SIDE)
        if progress is not None:
            progress(done, total)
    odd_numbers, suspects = _find_odd(odd, manifest.class_names)
    found = measure_shortcuts(trivial["train"], trivial["validation"])
    numbers = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "dataset": {
            "fingerprint": manifest.fingerprint,
            "class_names": list(manifest.class_names),
            **asdict(manifest.settings),
        },
        "counts": count_numbers(manifest),
        "source_sizes": size_numbers(manifest),
        "categories": {name: category_numbers(manifest, of) for name, of in CATEGORIES.items()},
        "pixels": _pixel_numbers(manifest, statistics),
        "sources": source_numbers(manifest, levels),
        "samples": samples,
        "duplicates": duplicate_numbers(manifest),
        "odd_images": odd_numbers,
        "patients": patient_numbers(manifest),
        "source_folder": source_folder_numbers(manifest),
        "left_out": left_out_numbers(manifest),
        "shortcuts": {name: asdict(item) | {"suspicious": item.suspicious} for name, item in found.items()},
    }
    numbers["warnings"] = warnings_of(numbers)
    pictures |= _odd_pictures(dataset, manifest, odd.rows, suspects)
    return Analysis(numbers, statistics.means, statistics.deviations, pictures, suspects)


def _find_odd(odd: OddImages, class_names: Sequence[str]) -> tuple[dict[str, Any], list[Suspect]]:
    """The numbers of the odd images, and the suspects."""
    scores, labels = odd.scores(), [row.label for row in odd.rows]
    suspects = odd_images.rank(scores, [row.path for row in odd.rows], labels, class_names)
    shown: dict[str, list[dict[str, Any]]] = {name: [] for name in class_names}
    for suspect in suspects:
        if suspect.rank <= ODD_SHOWN:
            shown[suspect.class_name].append(asdict(suspect))
    gathered = [asdict(item) for item in odd_images.gathered(scores, labels, class_names)]
    return {"listed": len(suspects), "classes": shown, "gathered": gathered}, suspects


def _odd_pictures(dataset: Path, manifest: Manifest, rows: Sequence[Row], suspects: list[Suspect]) -> dict[str, Gray]:
    """Of the suspects that are shown: which they are is known only when all images have been read."""
    oddest = {suspect.path for suspect in suspects if suspect.rank <= ODD_SHOWN}
    found = some_images(dataset, manifest, [row for row in rows if row.path in oddest])
    return {row.path: shortcuts.reduced(gray, PICTURE_SIDE) for row, gray in found}


def source_numbers(manifest: Manifest, levels: Levels) -> dict[str, dict[str, Any]]:
    """Size, brightness and contrast of the images of each source, the commonest first; empty when none is known."""
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in accepted(manifest):
        if row.source is not None:
            rows_of[row.source].append(row)
    return {
        source: {
            "images": len(rows),
            "width": quantiles([row.width for row in rows if row.width is not None]),
            "height": quantiles([row.height for row in rows if row.height is not None]),
            **levels.numbers(source),
        }
        for source, rows in sorted(rows_of.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def choose_samples(manifest: Manifest) -> dict[str, list[str]]:
    """Paths of some training images of each class; which, depends on the paths alone.

    Of the training split: who looks at test images tunes to them.
    """
    of_class: dict[str, list[str]] = {name: [] for name in manifest.class_names}
    for row in manifest.rows:
        if row.split == "train":
            of_class[row.class_name].append(row.path)
    return {name: _least_hashes(paths, SAMPLES_PER_CLASS) for name, paths in of_class.items()}


def measure_shortcuts(train: "_TrivialFeatures", validation: "_TrivialFeatures") -> dict[str, shortcuts.Shortcut]:
    """Each of `FEATURES` alone, fitted on training images and judged on validation images."""
    fitted, judged = train.tables(train), validation.tables(train)
    return {
        name: shortcuts.measure(fitted[name], train.labels, judged[name], validation.labels)
        for name in FEATURES
        if name in fitted
    }


def warnings_of(numbers: Mapping[str, Any]) -> list[str]:
    """A sentence for everything in the numbers that can make a test result better than the truth."""
    found = []
    for name, item in numbers["shortcuts"].items():
        if item["suspicious"]:
            found.append(
                f"A trivial feature predicts the class: {FEATURES[name]} alone has an accuracy of "
                f"{100 * item['accuracy']:.1f}% on the validation images (balanced "
                f"{100 * item['balanced_accuracy']:.1f}%), whereas always predicting the largest class has "
                f"{100 * item['guess']:.1f}% (balanced {100 * item['balanced_guess']:.1f}%)."
            )
    duplicates = numbers["duplicates"]
    if straddling := duplicates["straddling_splits"]:
        found.append(
            f"Near-duplicates across splits: {straddling:,} of {duplicates['groups']:,} groups of near-duplicates "
            "are in more than one split, so memorised images count as correct predictions."
        )
    patients = numbers["patients"]
    if straddling := patients["straddling_splits"]:
        found.append(
            f"Patients across splits: {straddling:,} of {patients['several_images']:,} patients with several images "
            "are in more than one split, so memorised patients count as correct predictions."
        )
    return found + odd_images.gathered_warnings(numbers["odd_images"]["gathered"])


class _TrivialFeatures:
    """The trivial features of chosen images of one split, kept in order of their paths."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._row_of = {path: number for number, path in enumerate(sorted(paths))}
        self._rows: list[Row | None] = [None] * len(self._row_of)
        self._pixels: dict[str, Features] = {}

    def add(self, row: Row, gray: Gray, mean: float, deviation: float) -> None:
        """Note an image, if it is one of the chosen."""
        number = self._row_of.get(row.path)
        if number is None:
            return
        self._rows[number] = row
        values = {
            "brightness": np.array([mean], np.float32),
            "contrast": np.array([deviation], np.float32),
            "border": shortcuts.border(gray),
            "thumbnail": shortcuts.thumbnail(gray).ravel(),
        }
        for name, value in values.items():
            if name not in self._pixels:
                self._pixels[name] = np.zeros((len(self._rows), len(value)), np.float32)
            self._pixels[name][number] = value

    @property
    def rows(self) -> list[Row]:
        return [row for row in self._rows if row is not None]

    @property
    def labels(self) -> shortcuts.Labels:
        return np.array([row.label for row in self.rows], np.int64)

    def tables(self, train: "_TrivialFeatures") -> dict[str, Features]:
        """float [N, D] of each feature; what is a category is coded by its values in `train`."""

        def coded(of: Callable[[Row], str]) -> Features:
            return shortcuts.one_hot([of(row) for row in train.rows], [of(row) for row in self.rows])

        # The sizes that are common as such too: one source often has one size, neither large nor small.
        sizes = np.array([(row.width or 0, row.height or 0) for row in self.rows], np.float32)
        common = coded(lambda row: f"{row.width} x {row.height}")
        categories = {name: coded(of) for name, of in CATEGORIES.items()}
        return self._pixels | {"source_size": np.hstack([sizes, common])} | categories


def _pixel_numbers(manifest: Manifest, statistics: PixelStatistics) -> dict[str, Any]:
    means, deviations = statistics.means, statistics.deviations
    return {
        "histogram_step": HISTOGRAM_STEP,
        "classes": {
            name: {
                "images": statistics.levels.brightness[label].count,
                **statistics.levels.numbers(label),
                "pixel_deviation": float(deviations[label].mean(dtype=np.float64)),
            }
            for label, name in enumerate(manifest.class_names)
        },
        "mean_image_differences": [
            {
                "classes": [manifest.class_names[one], manifest.class_names[other]],
                "difference": float(np.abs(means[one] - means[other]).mean(dtype=np.float64)),
            }
            for one in range(len(means))
            for other in range(one + 1, len(means))
        ],
    }


def _least_hashes(paths: Iterable[str], count: int) -> list[str]:
    """`count` of `paths` at most, as if drawn at random; the draw depends on each path alone."""
    return heapq.nsmallest(count, paths, key=lambda path: (hashlib.sha256(f"eda\0{path}".encode()).digest(), path))
