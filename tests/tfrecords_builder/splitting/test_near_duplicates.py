"""Near-duplicates: found after what copies go through, and not among different images."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.phantoms import CLASS_FOLDERS, draw_phantom, phantom_rng
from tfrecords_builder.images.decode import decode_gray
from tfrecords_builder.images.resizing import squares
from tfrecords_builder.images.thumbnails import THUMBNAIL
from tfrecords_builder.splitting import near_duplicates
from tfrecords_builder.splitting.near_duplicates import (
    COARSE_THRESHOLD,
    FINE_THRESHOLD,
    THUMBNAIL_SIZE,
    conflicts,
    find_duplicates,
    group_of,
)

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def reencoded(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(40, 95)))
    return Image.open(buffer)


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(image.width * rng.uniform(0.5, 1.5))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def reexposed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32) * rng.uniform(0.9, 1.1) + rng.uniform(-12, 12)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


CHANGES: dict[str, Change] = {
    "re-encoded": reencoded,
    "resized": resized,
    "re-exposed": reexposed,
    "all": lambda image, rng: reencoded(reexposed(resized(image, rng), rng), rng),
}


def thumbnail(image: Image.Image) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    gray = decode_gray(buffer.getvalue(), Path("x")).gray
    return squares([gray], [THUMBNAIL])[0][0]


def phantoms(per_class: int) -> list[Image.Image]:
    return [
        Image.fromarray(draw_phantom(name, 128, phantom_rng(name, number, 0))[0])
        for name in CLASS_FOLDERS
        for number in range(1, per_class + 1)
    ]


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return phantoms(10)


def test_different_images_are_no_duplicates(originals: list[Image.Image]) -> None:
    assert near_duplicates.near_duplicates(np.stack([thumbnail(image) for image in originals])) == []


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(originals: list[Image.Image], kind: str) -> None:
    rng = np.random.default_rng(0)
    copies = [CHANGES[kind](image, rng) for image in originals]
    thumbnails = np.stack([thumbnail(image) for image in [*originals, *copies]])
    found = {(i, j) for i, j, _ in near_duplicates.near_duplicates(thumbnails)}
    count = len(originals)
    assert found == {(i, i + count) for i in range(count)}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, originals: list[Image.Image]) -> None:
    """The search in blocks finds what one product of all with all finds."""
    thumbnails = np.stack([thumbnail(image) for image in [*originals, *originals[3:9], originals[0]]])
    whole = sorted(near_duplicates.near_duplicates(thumbnails))
    assert len(whole) == 7
    monkeypatch.setattr(near_duplicates, "_BLOCK", 5)
    for (i, j, score), (k, m, other) in zip(sorted(near_duplicates.near_duplicates(thumbnails)), whole, strict=True):
        assert (i, j) == (k, m)
        assert score == pytest.approx(other, abs=1e-5)


def test_the_measure_against_a_plain_computation(originals: list[Image.Image]) -> None:
    """Correlations by NumPy's own corrcoef, the band by an explicit mean over windows."""
    from scipy.ndimage import uniform_filter

    pixels = np.stack([thumbnail(image) for image in originals[:6]]).astype(np.float64)
    band = pixels - uniform_filter(pixels, (0, 9, 9), mode="nearest")
    expected = np.corrcoef(uniform_filter(band, (0, 3, 3), mode="nearest").reshape(6, -1))
    fine = near_duplicates._fine(pixels.astype(np.uint8))
    np.testing.assert_allclose(fine @ fine.T, expected, atol=2e-3)
    coarse = near_duplicates._coarse(pixels.astype(np.uint8))
    means = pixels.reshape(6, 16, 4, 16, 4).mean((2, 4)).reshape(6, -1)
    np.testing.assert_allclose(coarse @ coarse.T, np.corrcoef(means), atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_one_and_a_close_one(seed: int, originals: list[Image.Image]) -> None:
    """No pair is passed over for want of the numbers that are left out."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (40, THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=np.uint8)
    rows = near_duplicates._coarse(
        np.concatenate([np.stack([thumbnail(image) for image in originals]), noise, noise[:3] // 2])
    )
    bounds = near_duplicates._upper_bounds(rows)
    assert bounds.shape[1] < rows.shape[1] // 4
    excess = bounds @ bounds.T - rows @ rows.T
    assert excess.min() > -near_duplicates._ROUNDING
    assert np.median(excess[: len(originals), : len(originals)]) < 0.15


def test_flat_images_are_like_nothing() -> None:
    flat = np.full((3, THUMBNAIL_SIZE, THUMBNAIL_SIZE), 7, np.uint8)
    assert near_duplicates.near_duplicates(flat) == []
    assert near_duplicates.near_duplicates(flat[:0]) == []


def test_equal_files_are_pairs_with_their_first() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=np.uint8)
    noise[3] = noise[1]
    pairs = find_duplicates(["a", "b", "a", "c", "a"], noise)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 2), (0, 4), (1, 3)]
    assert [pair.score for pair in pairs] == pytest.approx([1, 1, 1])


def test_groups_are_what_pairs_connect() -> None:
    assert group_of(8, [(5, 6), (1, 3), (3, 6), (2, 7)]) == [0, 1, 2, 1, 4, 1, 1, 2]
    assert conflicts([0, 1, 1, 3, 3], ["a", "a", "b", "c", "c"]) == {1: ["a", "b"]}


@pytest.mark.real
def test_real_xrays(xrays: Path) -> None:
    """A sample of real images and changed copies of them: no pair is missed, and hardly one is wrong."""
    rng = np.random.default_rng(0)
    paths = sorted(path for path in xrays.glob("*/images/*") if path.suffix == ".png")
    chosen = [Image.open(paths[i]).convert("L") for i in rng.choice(len(paths), 150, replace=False)]
    copies = [CHANGES["all"](image, rng) for image in chosen]
    thumbnails = np.stack([thumbnail(image) for image in [*chosen, *copies]])
    found = {(i, j): score for i, j, score in near_duplicates.near_duplicates(thumbnails)}
    made = {(i, i + len(chosen)) for i in range(len(chosen))}
    assert made <= found.keys()
    # Among the 150 themselves real duplicates may be; their copies then pair up crosswise.
    assert len(found) - len(made) <= 8
    assert min(found.values()) > FINE_THRESHOLD
    assert COARSE_THRESHOLD < 1
