"""Near-duplicates: found after what copies go through, and not among different images."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
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
    thumbnails = np.concatenate([np.stack([thumbnail(image) for image in originals]), noise, noise[:3] // 2])
    for measure, quick, close in (
        (near_duplicates._coarse, near_duplicates._coarse, 0.15),
        (near_duplicates._fine, near_duplicates._fine_by_products, 0.4),
    ):
        rows = measure(thumbnails)
        bounds = near_duplicates._upper_bounds(thumbnails, np.arange(len(thumbnails)), quick, 31)
        assert bounds.shape == (len(thumbnails), 32)
        excess = bounds @ bounds.T - rows @ rows.T
        assert excess.min() > -near_duplicates._ROUNDING / 10
        assert np.median(excess[: len(originals), : len(originals)]) < close


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(2, 40),
    sample=st.integers(1, 40),
    unbounded=st.sampled_from([-1.0, math.inf]),
)
def test_the_search_finds_what_all_pairs_in_full_find(seed: int, block: int, sample: int, unbounded: float) -> None:
    """Among images that are mixed so that many pairs lie about the thresholds, and odd ones."""
    thumbnails = about_the_thresholds(np.random.default_rng(seed))
    coarse, fine = (
        measure(thumbnails).astype(np.float64) for measure in (near_duplicates._coarse, near_duplicates._fine)
    )
    # How far a pair is above both thresholds; what is below one of them is negative.
    margin = np.minimum(coarse @ coarse.T - COARSE_THRESHOLD, fine @ fine.T - FINE_THRESHOLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_BLOCK", block)
        patch.setattr(near_duplicates, "_PIECE", max(block // 2, 1))
        patch.setattr(near_duplicates, "_SAMPLE", sample)
        patch.setattr(near_duplicates, "_UNBOUNDED_PAIRS", unbounded)
        found = near_duplicates.near_duplicates(thumbnails)
    assert len({(i, j) for i, j, _ in found}) == len(found)
    for i in range(len(thumbnails)):
        for j in range(i + 1, len(thumbnails)):
            if abs(margin[i, j]) > 1e-5:  # else rounding decides
                assert ((i, j) in {pair[:2] for pair in found}) == (margin[i, j] > 0), (i, j, margin[i, j])
    for i, j, score in found:
        assert score == pytest.approx(fine[i] @ fine[j], abs=1e-5)


def about_the_thresholds(rng: np.random.Generator) -> np.ndarray:
    """uint8 [60, 64, 64]."""
    y, x = np.mgrid[0:THUMBNAIL_SIZE, 0:THUMBNAIL_SIZE] / THUMBNAIL_SIZE
    bases = []
    for _ in range(6):
        waves = sum(rng.normal() * np.sin(rng.uniform(2, 40) * x + rng.uniform(2, 40) * y) for _ in range(12))
        bases.append(128 + 30 * (4 * (x - 0.5) ** 2 - y) + rng.uniform(2, 12) * waves)
    images = []
    for _ in range(50):
        one, other = rng.integers(0, len(bases), 2)
        share = rng.uniform(0, 0.5)
        mixed = (1 - share) * bases[one] + share * bases[other] + rng.normal(0, rng.uniform(0, 8), x.shape)
        images.append(rng.uniform(0.3, 1) * mixed + rng.uniform(-20, 20))
    flat = np.full((10, *x.shape), rng.integers(0, 256), np.float64)
    for number in range(10):  # all but flat: rounding is at its largest
        places = rng.integers(0, THUMBNAIL_SIZE, (2, int(rng.integers(0, 4))))
        flat[number][tuple(places)] = rng.integers(0, 256)
    return np.clip(np.rint(np.concatenate([images, flat])), 0, 255).astype(np.uint8)


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


def test_the_images_to_compare_can_be_named() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=np.uint8)
    noise[3] = noise[2] = noise[1]
    found = near_duplicates.near_duplicates(noise, np.array([0, 1, 3, 4]))
    assert [pair[:2] for pair in found] == [(1, 3)]


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
