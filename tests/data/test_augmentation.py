"""Augmentation against an independent resampler, and what it must leave alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from cxr_dist.config.schema import AugmentationConfig
from cxr_dist.data.augmentation import DRAWS, augment, draw

Array = npt.NDArray[Any]
NOTHING = {"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "contrast": 0.0, "brightness": 0.0}


def config(**shares: float) -> AugmentationConfig:
    return AugmentationConfig.model_validate(NOTHING | shares)


def images(batch: int = 4, height: int = 24, width: int = 24, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(0, 255, (batch, height, width, 1)).astype(np.float32)


def draws(batch: int = 4, seed: int = 1, **columns: Any) -> Array:
    rows = np.random.default_rng(seed).uniform(-1, 1, (batch, DRAWS)).astype(np.float32)
    names = ("rotation", "shift_y", "shift_x", "zoom", "contrast", "brightness")
    for name, value in columns.items():
        rows[:, names.index(name)] = value
    return rows


def run(pixels: Array, rows: Array, settings: AugmentationConfig, *, xla: bool = False) -> Array:
    import tensorflow as tf

    step = tf.function(lambda image, row: augment(image, row, settings), jit_compile=xla)
    result: Array = step(tf.constant(pixels), tf.constant(rows)).numpy()
    return result


def resampled(image: Array, row: Array, settings: AugmentationConfig) -> Array:
    """The same affine map by SciPy: output pixel p shows input pixel c + R(p - c)/z - t, bilinear, black outside."""
    height, width = image.shape
    angle = np.deg2rad(settings.rotation) * row[0]
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / (1 + settings.zoom * row[3])
    shift = settings.shift * np.array([height * row[1], width * row[2]])
    centre = (np.array([height, width]) - 1) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1) - centre
    source = grid @ matrix.T + centre - shift
    # A border of black lets SciPy interpolate between the edge and the outside, as the project does.
    padded = np.pad(image.astype(np.float64), 1)
    coordinates = np.moveaxis(source + 1, -1, 0)
    result: Array = scipy.ndimage.map_coordinates(padded, coordinates, order=1, mode="constant", cval=0.0)
    return result


@pytest.mark.parametrize("size", [(24, 24), (17, 30)])
@pytest.mark.parametrize(
    "shares",
    [
        {"rotation": 45.0},
        {"zoom": 0.5},
        {"rotation": 10.0, "zoom": 0.2, "shift": 0.2},
        {"rotation": 30.0, "shift": 0.5},
        {"zoom": 0.3, "shift": 0.05},
    ],
    ids=lambda shares: "+".join(shares),
)
def test_resampling_agrees_with_scipy(shares: dict[str, float], size: tuple[int, int]) -> None:
    settings, pixels, rows = config(**shares), images(6, *size), draws(6)
    result = run(pixels, rows, settings)
    assert result.shape == pixels.shape
    assert result.dtype == np.float32
    for image, row, changed in zip(pixels[..., 0], rows, result[..., 0], strict=True):
        # 255 grey levels times the float32 error of a coordinate, about 24 x 2^-23, with room.
        np.testing.assert_allclose(changed, resampled(image, row, settings), atol=0.02)


def test_a_point_turns_and_moves_the_right_way() -> None:
    """By hand, so that the reference cannot share a sign error: the top becomes the side; down is down."""
    pixels = np.zeros((1, 21, 21, 1), np.float32)
    pixels[0, 4, 10] = 255
    quarter = run(pixels, draws(1, rotation=1, zoom=0, shift_x=0, shift_y=0), config(rotation=45.0))
    at = np.unravel_index(quarter[0, ..., 0].argmax(), (21, 21))
    assert at in {(6, 6), (6, 14)}, "an eighth of a turn about the centre"
    opposite = run(pixels, draws(1, rotation=-1), config(rotation=45.0))
    np.testing.assert_allclose(opposite[0, :, ::-1], quarter[0], atol=1e-3)
    moved = run(pixels, draws(1, shift_y=1, shift_x=-0.5), config(shift=4 / 21))
    assert np.argwhere(moved[0, ..., 0]).tolist() == [[8, 8]], "down by 4, left by 2"
    for zoom, row in ((1.0, 1), (-1.0, 7)):  # 6 above the centre: 9 at a scale of 1.5, 3 at one of 0.5
        scaled = run(pixels, draws(1, zoom=zoom), config(zoom=0.5))
        assert np.unravel_index(scaled[0, ..., 0].argmax(), (21, 21)) == (row, 10)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(
    "shares",
    [{"rotation": 45.0, "zoom": 0.5, "shift": 0.5, "contrast": 0.9, "brightness": 0.9}, {"shift": 0.5}, {}],
    ids=["all", "shift", "none"],
)
def test_draws_of_zero_change_nothing(shares: dict[str, float], xla: bool) -> None:
    # Whole grey levels, as stored images have: mean + (x - mean) is exact to float32, and so compared.
    pixels = np.round(images(3, 20, 23))
    result = run(pixels, np.zeros((3, DRAWS), np.float32), config(**shares), xla=xla)
    if shares.get("contrast"):
        np.testing.assert_allclose(result, pixels, atol=1e-4)
    else:
        np.testing.assert_array_equal(result, pixels)


def test_nothing_configured_changes_nothing_whatever_is_drawn() -> None:
    np.testing.assert_array_equal(run(images(), draws(), config()), images())


@pytest.mark.parametrize("xla", [False, True])
def test_shifts_alone_move_by_whole_pixels(xla: bool) -> None:
    # Sixteen images: TensorFlow computes the elements of a long vector otherwise than those of a short one.
    pixels, rows, settings = images(16, 20, 30), draws(16), config(shift=0.3)
    result = run(pixels, rows, settings, xla=xla)
    for image, row, changed in zip(pixels[..., 0], rows, result[..., 0], strict=True):
        down, right = round(0.3 * 20 * row[1]), round(0.3 * 30 * row[2])
        expected = np.zeros_like(image)
        source = image[max(-down, 0) : 20 - max(down, 0), max(-right, 0) : 30 - max(right, 0)]
        expected[max(down, 0) : 20 - max(-down, 0), max(right, 0) : 30 - max(-right, 0)] = source
        np.testing.assert_array_equal(changed, expected)


def test_contrast_and_brightness() -> None:
    pixels, rows = images(6), draws(6)
    mean = pixels.mean(axis=(1, 2, 3), keepdims=True)
    contrast = (1 + 0.4 * rows[:, 4])[:, None, None, None]
    brightness = (255 * 0.3 * rows[:, 5])[:, None, None, None]
    for shares, expected in (
        ({"contrast": 0.4}, mean + contrast * (pixels - mean)),
        ({"brightness": 0.3}, pixels + brightness),
        ({"contrast": 0.4, "brightness": 0.3}, mean + contrast * (pixels - mean) + brightness),
    ):
        np.testing.assert_allclose(run(pixels, rows, config(**shares)), np.clip(expected, 0, 255), atol=1e-3)


def test_the_range_is_kept() -> None:
    extreme = np.sign(draws(8))
    settings = config(rotation=45.0, zoom=0.5, shift=0.5, contrast=0.99, brightness=0.99)
    result = run(np.where(images(8) > 127, 255, 0).astype(np.float32), extreme, settings)
    assert result.min() >= 0
    assert result.max() <= 255
    assert np.isfinite(result).all()


def test_compiled_by_xla_it_is_the_same() -> None:
    settings = config(rotation=20.0, zoom=0.2, shift=0.1, contrast=0.2, brightness=0.2)
    pixels, rows = images(5, 32, 32), draws(5)
    np.testing.assert_allclose(run(pixels, rows, settings, xla=True), run(pixels, rows, settings), atol=0.02)


def test_every_image_is_changed_by_its_own_row() -> None:
    settings = config(rotation=20.0, zoom=0.2, shift=0.1, contrast=0.2, brightness=0.2)
    pixels, rows = images(5), draws(5)
    together = run(pixels, rows, settings)
    for number in range(5):
        alone = run(pixels[number : number + 1], rows[number : number + 1], settings)
        np.testing.assert_allclose(alone, together[number : number + 1], atol=1e-3)


# Draws


def test_draws_do_not_depend_on_how_the_batch_is_divided() -> None:
    whole = draw([3, 7], np.arange(12, dtype=np.int32), 12).numpy()
    assert whole.shape == (12, DRAWS)
    assert whole.dtype == np.float32
    for replicas in (2, 3, 4, 12):
        parts = [draw([3, 7], slots, 12).numpy() for slots in np.arange(12, dtype=np.int32).reshape(replicas, -1)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_draws_are_uniform_and_differ_by_image_and_seed() -> None:
    slots = np.arange(2000, dtype=np.int32)
    rows = draw([0, 1], slots, 2000).numpy()
    assert rows.min() >= -1
    assert rows.max() < 1
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=0.06)  # 4.6 standard errors of sqrt(1/3/2000)
    np.testing.assert_allclose(rows.std(axis=0), 3**-0.5, atol=0.03)
    assert len(np.unique(rows[:, 0])) > 1990
    assert np.abs(np.corrcoef(rows.T) - np.eye(DRAWS)).max() < 0.12
    for other in ([1, 1], [0, 2]):
        assert np.mean(draw(other, slots, 2000).numpy() == rows) < 0.01
