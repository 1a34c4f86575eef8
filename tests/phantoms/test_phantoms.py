"""Phantoms: the same for any number of workers, signs inside the lungs, and no class to be read off a thumbnail."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_dist.phantoms import CLASS_FOLDERS, draw_phantom, phantom_rng, write_phantoms, writer
from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.common.errors import UserError

PER_CLASS = 150
SIZE = 64
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)


@cache
def sample() -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64]]:
    """Images uint8 [N, S, S], lungs bool [N, S, S] and labels int64 [N] of `PER_CLASS` phantoms of each class."""
    drawn = [
        (*draw_phantom(name, SIZE, phantom_rng(name, number, seed=11)), label)
        for label, name in enumerate(CLASS_FOLDERS)
        for number in range(PER_CLASS)
    ]
    images, masks, labels = zip(*drawn, strict=True)
    return np.stack(images), np.stack(masks) > 0, np.array(labels)


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def area_average(images: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    count, size, _ = images.shape
    step = size // side
    return images.reshape(count, side, step, side, step).mean((2, 4))


# What is written


def test_the_layout_is_the_databases_own(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    seen: list[tuple[int, int]] = []
    counts = write_phantoms(folder, per_class=3, size=40, workers=1, progress=lambda done, of: seen.append((done, of)))
    assert counts == {"COVID": 3, "Lung_Opacity": 3, "Normal": 3, "Viral Pneumonia": 3}
    expected = {f"{c}/{part}/{c}-{n}.png" for c in counts for part in ("images", "masks") for n in (1, 2, 3)}
    assert set(read_tree(folder)) == expected
    assert seen == [(done, 12) for done in range(1, 13)]
    assert len(find_images(folder)) == 12  # the masks are not taken for images
    assert [path.name for path in tmp_path.iterdir()] == ["phantoms"]
    for name in expected:
        with Image.open(folder / name) as image:
            assert (image.size, image.mode, image.format) == ((40, 40), "L", "PNG")
            values = set(np.unique(np.asarray(image)))
        assert values == {0, 255} if "/masks/" in name else len(values) > 50


def test_a_phantom_depends_on_seed_class_and_number_alone(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "alone", per_class=4, size=32, seed=3, workers=1)
    write_phantoms(tmp_path / "pair", per_class=9, size=32, seed=3, workers=2)
    write_phantoms(tmp_path / "other", per_class=4, size=32, seed=4, workers=1)
    alone, pair, other = (read_tree(tmp_path / name) for name in ("alone", "pair", "other"))
    assert alone == {name: pair[name] for name in alone}
    for part in ("images", "masks"):  # nor are there twins, of one class or of two
        files = [data for tree in (pair, other) for name, data in tree.items() if f"/{part}/" in name]
        assert len(set(files)) == len(files) == 4 * 9 + 4 * 4


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, _total: int) -> None:
        assert not (tmp_path / "phantoms").exists()
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "phantoms", per_class=2, size=32, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_drawing_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(writer, "draw_phantom", broken)
    with pytest.raises(RuntimeError, match="broken"):
        write_phantoms(tmp_path / "phantoms", per_class=1, size=32, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_any_other_is_left_alone(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write_phantoms(empty, per_class=1, size=32, workers=1)
    before = read_tree(empty)
    with pytest.raises(UserError, match="other files than phantoms"):
        write_phantoms(empty, per_class=1, size=32, seed=1, workers=1)
    assert read_tree(empty) == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_phantoms(file, per_class=1, size=32, workers=1)
    with pytest.raises(UserError, match="is a file"):
        write_phantoms(file / "below", per_class=1, size=32, workers=1)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"), [("per_class", 0), ("size", 31), ("size", 5000), ("seed", -1), ("workers", 0)]
)
def test_a_number_out_of_range_is_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"^{name}: .*{value}"):
        write_phantoms(tmp_path / "phantoms", **{"per_class": 1, "size": 32, name: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# What is drawn


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Viral Pneumonia.*'Viral_Pneumonia'"):
        draw_phantom("Viral_Pneumonia", 32, np.random.default_rng(0))


def test_masks_are_two_lungs() -> None:
    _, lungs, labels = sample()
    assert all(ndimage.label(mask)[1] == 2 for mask in lungs)
    shares = lungs.mean((1, 2))
    assert shares.min() > 0.12
    assert shares.max() < 0.45
    # The heart lies on the patient's left, the image's right: it takes its part of that lung.
    halves = [[part.sum() for part in _lungs_left_to_right(mask)] for mask in lungs]
    assert np.mean([left > right for left, right in halves]) > 0.9
    # The anatomy tells nothing of the class.
    means = [shares[labels == label].mean() for label in range(4)]
    assert np.ptp(means) < 0.02


def _lungs_left_to_right(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    parts, count = ndimage.label(mask)
    lungs = [parts == index for index in range(1, count + 1)]
    return sorted(lungs, key=lambda lung: float(np.nonzero(lung)[1].mean()))


@pytest.mark.parametrize("name", [name for name in CLASS_FOLDERS if name != "Normal"])
def test_the_sign_is_all_that_a_class_changes_and_lies_inside_the_lungs(name: str) -> None:
    for seed in range(12):
        image, mask = draw_phantom(name, 96, np.random.default_rng(seed))
        healthy, same_mask = draw_phantom("Normal", 96, np.random.default_rng(seed))
        np.testing.assert_array_equal(mask, same_mask)
        changed = image != healthy
        assert not changed[mask == 0].any()
        assert np.abs(image.astype(int) - healthy)[mask > 0].max() > 25
        left, right = (changed[lung].mean() for lung in _lungs_left_to_right(mask > 0))
        if name == "Lung_Opacity":
            assert min(left, right) == 0  # one lung alone
        if name == "Viral Pneumonia":
            assert min(left, right) > 0.5  # both, all over


def test_a_phantom_is_the_same_patient_at_every_size() -> None:
    drawn = {
        (name, size): draw_phantom(name, size, np.random.default_rng(5)) for name in CLASS_FOLDERS for size in (64, 128)
    }
    _, small_mask = drawn["Normal", 64]
    _, large_mask = drawn["Normal", 128]
    assert ((area_average(large_mask[None], 64)[0] > 127) != (small_mask > 0)).mean() < 0.02
    healthy, large_healthy = drawn["Normal", 64][0], area_average(drawn["Normal", 128][0][None], 64)[0]
    assert np.corrcoef(healthy.ravel(), large_healthy.ravel())[0, 1] > 0.99
    for name in CLASS_FOLDERS:
        if name != "Normal":
            sign = drawn[name, 64][0] - healthy.astype(float)
            large_sign = area_average(drawn[name, 128][0][None], 64)[0] - large_healthy
            assert np.corrcoef(sign.ravel(), large_sign.ravel())[0, 1] > 0.8


# What can be read off


@pytest.mark.parametrize("reading", ["mean", "mean_and_spread", "thumbnail"])
def test_no_linear_reading_of_brightness_tells_the_classes(reading: str) -> None:
    images, _, labels = sample()
    thumbnails = area_average(images, 16).reshape(len(images), -1)
    mean, spread = images.mean((1, 2)), images.std((1, 2))
    features = {
        "mean": mean[:, None],
        "mean_and_spread": np.stack([mean, spread], axis=1),
        "thumbnail": thumbnails,
    }[reading]
    for strength in (1e-3, 1e-2, 1e-1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        assert cross_val_score(model, features, labels, cv=FOLDS).mean() < 0.55


def test_local_contrast_inside_the_lungs_tells_them() -> None:
    images, lungs, labels = sample()
    features = [lung_texture(image, mask) for image, mask in zip(images.astype(np.float64), lungs, strict=True)]
    model = ExtraTreesClassifier(200, random_state=0)
    assert cross_val_score(model, features, labels, cv=FOLDS).mean() > 0.9


def lung_texture(image: NDArray[np.float64], mask: NDArray[np.bool_]) -> list[float]:
    """Spread of band-passed brightness in both lungs, and of smoothed brightness in each."""
    inner = ndimage.binary_erosion(mask, iterations=2)
    weight = inner.astype(np.float64)

    def smooth(sigma: float) -> NDArray[np.float64]:
        near = np.maximum(ndimage.gaussian_filter(weight, sigma), 0.02)
        smoothed: NDArray[np.float64] = ndimage.gaussian_filter(image * weight, sigma) / near
        return smoothed

    scales = [smooth(sigma) for sigma in (0.6, 1.5, 3.0, 6.0)]
    features: list[float] = []
    for fine, coarse in pairwise(scales):
        band = (fine - coarse)[inner]
        features += [band.std(), *np.quantile(band, [0.02, 0.1, 0.9, 0.98])]
    outward = np.nonzero(inner)[1].mean()
    left = inner & (np.arange(image.shape[1]) < outward)
    for smoothed in scales[1:3]:
        for lung in (left, inner & ~left):
            features += list(np.quantile(smoothed[lung], [0.5, 0.75, 0.95]) - np.quantile(smoothed[lung], 0.1))
    return features
