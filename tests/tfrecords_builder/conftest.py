from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfrecords_builder.build import BuildOptions, build_dataset

COUNTS = {"COVID": 20, "Normal": 13, "Viral Pneumonia": 9}


def write_images(root: Path, counts: Mapping[str, int], *, database_layout: bool = True, size: int = 20) -> Path:
    """Gray PNGs of noise, every one different, in either layout."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        folder = root / name / "images" if database_layout else root / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
    return root


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: 42 images of three classes in the database's layout."""
    return write_images(tmp_path_factory.mktemp("source"), COUNTS)


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: the raw dataset of `source` at 16 pixels. Copy it to damage it."""
    dataset = tmp_path_factory.mktemp("built") / "dataset"
    build_dataset(source, dataset, BuildOptions(image_size=16, workers=1))
    return dataset
