"""What a trivial feature tells of the class: held against scikit-learn used plainly, and against loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tfrecords_builder.eda import shortcuts


def blocks(length: int, count: int) -> list[slice]:
    edges = [math.floor(length * number / count) for number in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def gray(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (224, 224), (37, 51), (10, 10), (1, 1)])
def test_thumbnails_are_means_of_blocks(shape: tuple[int, int]) -> None:
    image = gray(*shape)
    rows, columns = (blocks(length, min(16, length)) for length in shape)
    expected = [[image[row, column].mean(dtype=np.float64) for column in columns] for row in rows]
    np.testing.assert_allclose(shortcuts.thumbnail(image), expected, rtol=1e-6)


def test_white_does_not_overflow() -> None:
    white = np.full((1024, 1024), 255, np.uint8)
    assert np.all(shortcuts.thumbnail(white) == 255)
    assert np.all(shortcuts.border(white) == 255)
    assert np.all(shortcuts.reduced(white, 128) == 255)


@pytest.mark.parametrize(("side", "width"), [(224, 18), (64, 5), (20, 2), (9, 1), (1, 1)])
def test_the_border_is_the_outer_frame(side: int, width: int) -> None:
    image = gray(side, side)
    strips = (image[:width], image[side - width :], image[:, :width].T, image[:, side - width :].T)
    expected = [strip[:, block].mean(dtype=np.float64) for strip in strips for block in blocks(side, min(16, side))]
    before = shortcuts.border(image)
    np.testing.assert_allclose(before, expected, rtol=1e-6)
    inside = image.copy()
    inside[width : side - width, width : side - width] ^= 255
    assert np.array_equal(shortcuts.border(inside), before)


@pytest.mark.parametrize(
    ("side", "limit", "expected"), [(224, 128, 112), (128, 128, 128), (20, 128, 20), (130, 64, 43)]
)
def test_pictures_are_reduced_by_a_whole_factor(side: int, limit: int, expected: int) -> None:
    image = gray(side, side)
    small = shortcuts.reduced(image, limit)
    assert small.shape == (expected, expected)
    assert small.dtype == np.uint8
    factor = side // expected
    for row, column in ((0, 0), (expected - 1, expected // 2)):
        block = image[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        assert small[row, column] == np.rint(block.mean())


def test_categories_are_those_of_the_training_images() -> None:
    train = ["a"] * 3 + ["c"] * 5 + ["b"] * 3
    assert shortcuts.one_hot(train, ["c", "a", "b", "new"]).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    many = [f"{number:02d}" for number in range(40)]
    assert shortcuts.one_hot(many, many).sum() == shortcuts.CATEGORIES_KEPT


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_accuracies_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.choice(classes, 300, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    # The validation images are of another scale: statistics of theirs must not enter.
    features = (rng.normal(size=(300, 4)) * [1, 50, 1, 1] + labels[:, None]).astype(np.float32)
    features[200:] *= 2
    # Constant columns are common in thumbnails; they change nothing.
    padded = np.hstack([features, np.full((300, 1), 7, np.float32)])
    found = shortcuts.measure(padded[:200], labels[:200], padded[200:], labels[200:])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    predicted = model.fit(features[:200].astype(float), labels[:200]).predict(features[200:].astype(float))
    assert found.accuracy == pytest.approx(accuracy_score(labels[200:], predicted))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels[200:], predicted))
    dummy = DummyClassifier(strategy="most_frequent").fit(features[200:], labels[200:])
    assert found.guess == pytest.approx(dummy.score(features[200:], labels[200:]))
    assert found.balanced_guess == pytest.approx(1 / classes)
    assert (found.train_images, found.validation_images, found.constant) == (200, 100, False)


def test_a_constant_feature_gives_the_largest_class_of_the_training_images() -> None:
    """And the guess is the best of all constant ones, so that splits of different mixtures give no warning."""
    nothing = np.zeros((10, 2), np.float32)
    found = shortcuts.measure(nothing, np.array([0] * 6 + [1] * 4), nothing, np.array([0] * 3 + [1] * 7))
    assert (found.accuracy, found.guess, found.constant, found.suspicious) == (0.3, 0.7, True, False)
    found = shortcuts.measure(nothing, np.array([0] * 4 + [1] * 6), nothing, np.array([0] * 3 + [1] * 7))
    assert (found.accuracy, found.guess) == (0.7, 0.7)


@pytest.mark.parametrize(("images", "margin"), [(12, 3 * math.sqrt(0.25 / 12)), (100, 0.15), (10_000, 0.1)])
def test_the_margin_allows_for_few_images(images: int, margin: float) -> None:
    labels = np.arange(images) % 2
    found = shortcuts.measure(labels[:, None].astype(np.float32), labels, labels[:, None].astype(np.float32), labels)
    assert found.margin == pytest.approx(margin)
    assert found.balanced_margin == pytest.approx(margin), "two classes of equal size: the same error"
    assert found.accuracy == 1
    assert found.suspicious


@pytest.mark.parametrize("images", [20, 60, 400])
def test_noise_is_not_suspicious(images: int) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(2 * images) % 3)
        noise = rng.normal(size=(2 * images, 6)).astype(np.float32)
        found = shortcuts.measure(noise[:images], labels[:images], noise[images:], labels[images:])
        assert not found.suspicious, (seed, found)


def test_a_small_class_is_heard() -> None:
    """One image in twenty: accuracy has no room of 0.1 above the guess, balanced accuracy has."""
    labels = np.arange(1000) % 20 == 0
    feature = np.where(labels, 3.0, -3.0)[:, None].astype(np.float32)
    found = shortcuts.measure(feature, labels.astype(np.int64), feature, labels.astype(np.int64))
    assert found.accuracy - found.guess < 0.1
    assert found.suspicious
