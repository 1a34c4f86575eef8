"""The benchmark of the input compares like with like."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.bench import reading
from cxr_dist.phantoms import write_phantoms
from tfrecords_builder.build import BuildOptions, build_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading") / "phantoms"
    write_phantoms(folder, per_class=20, size=32, workers=1)
    build_dataset(folder, folder.parent / "dataset", BuildOptions(image_size=32, workers=1))
    return folder


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_both_ways_deliver_the_same_pixels(source: Path, memory_bytes: int) -> None:
    rates = reading.measure(source, source.parent / "dataset", batch_size=8, rounds=2, memory_bytes=memory_bytes)
    assert [rate.name for rate in rates] == ["image_dataset_from_directory", "cxr-dist"]
    assert len({rate.pixel_sum for rate in rates}) == 1
    assert all(len(figures) == 2 and min(figures) > 0 for rate in rates for figures in (rate.cold, rate.warm))
    lines = reading.table(rates)
    assert len(lines) == 3
    assert "1.0" in lines[1]


def test_other_pixels_are_no_comparison(source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    for path in other.rglob("images/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(RuntimeError, match="different pixels"):
        reading.measure(other, source.parent / "dataset", batch_size=8, rounds=1, memory_bytes=1 << 30)
