"""A shortcut that is planted is found, and one that is not there is not."""

import json
from typing import Any

import numpy as np
import pytest

from cxr_dist.evaluation.exact import mcnemar, share_interval
from cxr_dist.evaluation.examination import occlusion, perturbations, shortcuts, source_probe, statistics
from cxr_dist.evaluation.examination.examine import ExaminationInputs, examine
from cxr_dist.evaluation.examination.findings import Examination

CLASSES, SIDE = 4, 32
NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")


def planted(seed: int, count: int = 64) -> tuple[Any, Any, Any]:
    """Noise; the class as a gray level in a corner, and as one in the lungs; masks."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % CLASSES).astype(np.int32)
    images = random.integers(90, 110, (count, SIDE, SIDE)).astype(np.uint8)
    masks = np.zeros(images.shape, np.bool_)
    masks[:, 9:23, 7:14] = masks[:, 9:23, 18:25] = True
    for image, label in zip(images, labels, strict=True):
        image[:3, :3] = 30 + 60 * label
        image[10:22, 8:13] = 30 + 60 * label
    return images, labels, masks


def reader(rows: slice, columns: slice, collapses: bool = False) -> Any:
    """A network that reads the gray level of one place; one that `collapses` names class 0 where the middle is flat."""

    def forward(images: Any) -> Any:
        level = images[:, rows, columns].mean(axis=(1, 2))
        named = np.clip(np.rint((level - 30) / 60), 0, CLASSES - 1).astype(int)
        if collapses:
            named[np.ptp(images[:, 8:24, 8:24].reshape(len(images), -1), axis=1) == 0] = 0
        return np.eye(CLASSES)[named]

    return forward


CORNER, LUNGS = (slice(0, 3), slice(0, 3)), (slice(10, 22), slice(8, 13))


def run(forward: Any, seed: int, masked: bool) -> Examination:
    images, labels, masks = planted(seed)
    paths = [str(row) for row in range(len(labels))]
    return examine(ExaminationInputs(forward, images, labels, paths, NAMES, seed, masks if masked else None))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [True, False])
def test_what_reads_the_corner_alarms_and_what_reads_the_lungs_does_not(seed: int, masked: bool) -> None:
    shortcut, honest = run(reader(*CORNER), seed, masked), run(reader(*LUNGS), seed, masked)
    assert {each.name for each in shortcut.alarms} == {"cue_conflict", "border_only", "without_border", "without_lungs"}
    assert honest.alarms == []
    assert honest.numbers["cue_conflict"]["follows_image"] == 1
    assert shortcut.numbers["cue_conflict"]["follows_border"] == 1


def test_a_network_that_collapses_on_the_border_alone_is_found_by_the_other_two() -> None:
    found = run(reader(*CORNER, collapses=True), 0, True)
    assert {each.name for each in found.alarms} == {"cue_conflict", "without_border"}


def test_a_network_that_any_change_of_the_border_upsets_is_noted_and_not_accused() -> None:
    """Reads the lungs, and names class 0 where the rim is smooth, as it is when its border is filled."""
    lungs = reader(*LUNGS)

    def forward(images: Any) -> Any:
        rim = images[:, :2, 8:24].astype(int)
        smooth = (np.abs(np.diff(rim, axis=1)).max(axis=(1, 2)) == 0)[:, None]
        return np.where(smooth, np.eye(CLASSES)[0], lungs(images))

    found = run(forward, 0, True)
    assert found.alarms == []
    assert "without_border" in {each.name for each in found.notes}
    assert found.numbers["occlusions"]["variants"]["without_border"]["accuracy"] == 1 / CLASSES


@pytest.mark.parametrize("seed", range(4))
def test_answers_at_random_do_not_alarm(seed: int) -> None:
    random = np.random.default_rng(seed)
    assert run(lambda images: random.dirichlet(np.ones(CLASSES), len(images)), seed, True).alarms == []


def test_json_is_strict_and_holds_the_findings() -> None:
    tree = json.loads(run(reader(*CORNER), 0, False).to_json(), parse_constant=pytest.fail)
    assert tree["findings"][0]["name"] == "cue_conflict"
    assert tree["occlusions"]["variants"]["without_lungs"]["images_without_mask"] == 64


def test_one_image_and_one_class_give_numbers_too() -> None:
    images, labels, _ = planted(0)
    for rows in (slice(0, 1), np.flatnonzero(labels == 2)):
        paths = [str(row) for row in range(len(labels[rows]))]
        found = examine(ExaminationInputs(reader(*CORNER), images[rows], labels[rows], paths, NAMES, 0))
        assert {each.name for each in found.alarms} <= {"without_border"}, "where there is no chance, none is beaten"
        assert json.loads(found.to_json())["cue_conflict"]["excess"] is None


def test_a_fill_tells_nothing_of_what_it_hides() -> None:
    """Whatever lies in the hole, and whatever shape the mask has inside its rectangle, the result is the same."""
    images, _, masks = planted(0, 8)
    boxes, _ = occlusion.lung_boxes(masks, 8, SIDE)
    other, thinner = images.copy(), masks.copy()
    other[boxes] = 255
    thinner[:, 12:20, 9:12] = False
    np.testing.assert_array_equal(occlusion.without_lungs(images, masks), occlusion.without_lungs(other, thinner))
    assert boxes[masks].all()
    edge = occlusion.border_mask(SIDE)
    np.testing.assert_array_equal(occlusion.border_only(images)[:, edge], images[:, edge])
    np.testing.assert_array_equal(occlusion.without_border(images)[:, ~edge], images[:, ~edge])


def test_strength_none_and_neutral_strengths_change_nothing() -> None:
    images, _, _ = planted(0, 8)
    for kind in perturbations.PERTURBATIONS:
        assert kind.strengths[0] is None
        np.testing.assert_array_equal(kind.apply(images, None, 0), images)
        assert not np.array_equal(kind.apply(images, kind.strengths[1], 0), images)
    neutral = {
        perturbations.rotated: 0,
        perturbations.shifted: 0,
        perturbations.contrasted: 1,
        perturbations.noisy: 0,
        perturbations.coarsened: 1,
    }
    for change, strength in neutral.items():
        np.testing.assert_array_equal(change(images, strength), images)


def test_rotation_beside_numpy_and_scipy() -> None:
    from scipy import ndimage

    images = np.random.default_rng(0).integers(0, 256, (3, 33, 33)).astype(np.uint8)
    for turns in (1, 2, 3):
        np.testing.assert_array_equal(perturbations.rotated(images, 90 * turns), np.rot90(images, turns, (1, 2)))
    expected = ndimage.rotate(images[0].astype(float), 10, reshape=False, order=1, mode="nearest")
    inner = (slice(6, -6), slice(6, -6))
    assert np.abs(perturbations.rotated(images, 10)[0][inner] - expected[inner]).max() <= 2


def test_bounds_beside_scipy() -> None:
    from scipy.stats import beta, binomtest

    for right, total in ((0, 5), (3, 9), (9, 9)):
        exact = binomtest(right, total, alternative="greater").proportion_ci(0.99, "exact").low
        assert share_interval(right, total, 0.99, "greater")[0] == pytest.approx(exact)
        assert share_interval(right, total, 0.99, "greater")[0] == pytest.approx(
            beta.ppf(0.01, right, total - right + 1) if right else 0.0
        )
        assert mcnemar(right, total - right, "greater") == pytest.approx(
            binomtest(right, total, alternative="greater").pvalue
        )
    assert mcnemar(0, 0) == 1.0
    labels = np.repeat([0, 1, 2], [50, 20, 3]).astype(np.int32)
    chosen = statistics.balanced_sample(labels, 30, 0)
    assert np.bincount(labels[chosen]).tolist() == [14, 13, 3]
    assert len(statistics.balanced_sample(labels, 500, 0)) == 73


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 4))])
def test_a_planted_source_is_told_and_a_random_one_is_not(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(2), 40).astype(np.int32)
    sources = random.permutation(np.tile(["a", "b"], 40)).tolist()
    features = random.normal(size=(80, 200)).astype(np.float32)
    quiet = source_probe.source_in_features(features, labels, sources, None, ("x", "y"), seed)
    assert source_probe.feature_findings(quiet) == []
    features[:, :20] += 2 * (np.array(sources) == "b")[:, None]
    loud = source_probe.source_in_features(features, labels, sources, None, ("x", "y"), seed)
    assert len(source_probe.feature_findings(loud)) == 2
    coincide = source_probe.source_in_features(features, labels, ["a"] * 40 + ["b"] * 40, None, ("x", "y"), seed)
    assert coincide["skipped"]
    assert coincide["classes_of_one_source"] == ["x", "y"]


def test_copies_are_not_evidence_of_a_source() -> None:
    """Five copies of each image: told apart by memory alone, unless copies are kept in one fold."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(16, 100)), 5, axis=0).astype(np.float32)
    sources = np.repeat(random.permutation(np.tile(["a", "b"], 8)), 5).tolist()
    groups = np.repeat(np.arange(16), 5).astype(str).tolist()
    labels = np.zeros(80, np.int32)
    told = source_probe.source_in_features(features, labels, sources, groups, ("x",), 0)
    assert not told["classes"]["x"]["told"]
    assert source_probe.source_in_features(features, labels, sources, None, ("x",), 0)["classes"]["x"]["told"]


def test_conflicts_are_all_pairs_of_classes() -> None:
    images, labels, _ = planted(0, 16)
    found = shortcuts.cue_conflict(lambda changed: labels, images, labels, CLASSES, 0)
    assert (found["conflicts"], found["follows_image"], found["excess"]) == (48, 1.0, 0.0)
