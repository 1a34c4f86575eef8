"""Squares: together or alone, with the same pixels."""

import numpy as np
import pytest
from PIL import Image

from tfrecords_builder.images.resizing import BANDS, RESAMPLING, Square, shrunk, squares

WANTED = [Square(1), Square(31), Square(64, reducing_gap=1.0), Square(224)]


def noise(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng([width, height, seed]).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (224, 224), (299, 299), (640, 480), (2000, 1900)])
def test_together_and_alone_the_pixels_are_the_same(size: tuple[int, int]) -> None:
    images = [noise(*size, seed) for seed in range(BANDS)]
    for (side, gap), found in zip(WANTED, squares(images, WANTED), strict=True):
        for image, square in zip(images, found, strict=True):
            alone = np.asarray(Image.fromarray(image).resize((side, side), RESAMPLING, reducing_gap=gap))
            np.testing.assert_array_equal(square, alone)
            assert square.dtype == np.uint8


@pytest.mark.parametrize("sizes", [[], [40], [40, 40, 40], [40, 40, 41, 40], [30, 40, 50, 60]])
def test_images_of_any_number_and_sizes_come_back_in_order(sizes: list[int]) -> None:
    images = [np.full((20, side), 10 * number, np.uint8) for number, side in enumerate(sizes)]
    for found in squares(images, WANTED):
        assert [np.unique(square).tolist() for square in found] == [[10 * n] for n in range(len(sizes))]


@pytest.mark.parametrize(("width", "height"), [(62, 93), (2000, 31), (64, 100), (1, 50), (999, 7)])
@pytest.mark.parametrize("factors", [(1, 2), (2, 2), (3, 3), (5, 1), (4, 4), (31, 31), (7, 30), (300, 2)])
@pytest.mark.parametrize("level", [None, 255])
def test_shrunk_as_pillow_does(width: int, height: int, factors: tuple[int, int], level: int | None) -> None:
    image = noise(width, height, 0) if level is None else np.full((height, width), level, np.uint8)
    y, x = min(factors[0], height), min(factors[1], width)
    np.testing.assert_array_equal(shrunk(image, y, x), np.asarray(Image.fromarray(image).reduce((x, y))))
