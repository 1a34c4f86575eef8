"""Small source folders for the analysis: noise whose brightness, size and kind of file each test chooses."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.format import record, tfrecord
from tfrecords_builder.format.manifest import Manifest, read_manifest
from tfrecords_builder.format.manifest_rows import Row
from tfrecords_builder.splitting.splits import SPLITS

IMAGE_SIZE = 20
COUNTS = {"COVID": 40, "Normal": 30, "Viral Pneumonia": 20}
REJECTED = "COVID/images/damaged.png"
CONFLICT = ("COVID/images/COVID-5.png", "Normal/images/copy.png")
TRIPLE = ("COVID/images/COVID-1.png", "COVID/images/COVID-1b.png", "COVID/images/COVID-1c.png")
PAIR = ("Normal/images/Normal-2.png", "Normal/images/Normal-2b.png")

Level = Callable[[int, np.random.Generator], float]


def any_level(_label: int, rng: np.random.Generator) -> float:
    return rng.uniform(90, 160)


def draw(
    source: Path, counts: Mapping[str, int], level: Level = any_level, *, side: int = IMAGE_SIZE, seed: int = 0
) -> Path:
    """Noise about the level that `level` gives for a class's number, each image different."""
    for label, (name, count) in enumerate(counts.items()):
        folder = source / name / "images"
        folder.mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([seed, label, number])
            save(folder / f"{name}-{number}.png", level(label, rng), rng, (side, side))
    return source


def save(path: Path, level: float, rng: np.random.Generator, size: tuple[int, int]) -> None:
    pixels = level + rng.uniform(20, 60) * rng.uniform(-1, 1, (size[1], size[0]))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def draw_varied(source: Path) -> Path:
    """`COUNTS` images, and: other sizes, JPEGs in one class, groups of copies, a conflict, and a damaged file."""
    draw(source, COUNTS)
    rng = np.random.default_rng(1)
    for number in range(10, 25):
        save(source / f"COVID/images/COVID-{number}.png", 120, rng, (30, 24 + number))
    for number in range(8):
        path = source / f"Viral Pneumonia/images/Viral Pneumonia-{number}.png"
        save(path.with_suffix(".JPG"), 100, rng, (26, 26))
        path.unlink()
    for first, *copies in (TRIPLE, PAIR, CONFLICT):
        for copy in copies:
            shutil.copy(source / first, source / copy)
    (source / REJECTED).write_bytes((source / TRIPLE[0]).read_bytes()[:-40])
    return source


def build(source: Path, dataset: Path, **options: object) -> Path:
    options = {"image_size": IMAGE_SIZE, "on_error": "skip"} | options
    build_dataset(source, dataset, BuildOptions(workers=1, **options))  # type: ignore[arg-type]
    return dataset


def read_all(dataset: Path) -> tuple[Manifest, list[tuple[Row, npt.NDArray[np.uint8]]]]:
    """Every record by its place in the manifest: another way than the analysis's."""
    manifest = read_manifest(dataset)
    row_of = {row.path: row for row in manifest.rows}
    found = []
    for split in SPLITS:
        index = manifest.split(split)
        for path, shard, offset, length in zip(index.paths, index.shard, index.offset, index.length, strict=True):
            with (dataset / index.shard_names[shard]).open("rb") as file:
                payload = tfrecord.read_at(file.fileno(), int(offset), int(length))
            image = record.decode_image(record.decode_example(payload).image, manifest.image_size, manifest.encoding)
            found.append((row_of[path], image))
    return manifest, found
