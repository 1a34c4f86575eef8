"""Odd images: damage that is mixed in is near the head of its class's list, and nothing depends on the order."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.phantoms.drawing import draw_phantom
from tests.tfrecords_builder.eda.damage import KINDS, Gray, half_gray, stripes
from tfrecords_builder.eda import odd_images
from tfrecords_builder.eda.odd_images import OddImages, Suspect, gathered, rank
from tfrecords_builder.eda.typical import NUMBERS, center_and_spread, pixel_numbers
from tfrecords_builder.format.manifest_rows import ACCEPTED, Row
from tfrecords_builder.images.decode import load_gray

SIDE = 96
NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
Damage = Callable[[Gray, np.random.Generator], Gray]


def row(path: str, label: int, width: int = SIDE, height: int = SIDE) -> Row:
    nothing = dict.fromkeys((
        "split", "source", "patient", "mask", "sha256", "mask_sha256", "reason", "shard", "index", "offset", "length"
    ))  # fmt: skip
    about = {"path": path, "label": label, "class_name": NAMES[label], "group": path, "status": ACCEPTED}
    return Row(**about, **nothing, width=width, height=height)  # type: ignore[arg-type]


def noted(images: Sequence[Gray], labels: Sequence[int]) -> OddImages:
    odd = OddImages(len(images), len(images[0]))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        odd.add(row(f"{number:05}", label), image)
    return odd


def suspects(images: Sequence[Gray], labels: Sequence[int], names: Sequence[str] = NAMES) -> dict[int, Suspect]:
    """By the image's number, of the first twentieth of each class."""
    found = rank(noted(images, labels).scores(), [f"{number:05}" for number in range(len(images))], labels, names)
    sizes = Counter(labels)
    return {int(item.path): item for item in found if item.rank <= 0.05 * sizes[names.index(item.class_name)]}


def mixed_in(
    images: Sequence[Gray], labels: Sequence[int], damage: Damage, share: float, rng: np.random.Generator
) -> tuple[list[Gray], list[int]]:
    """The images with `share` of each class damaged, and the numbers of those that are."""
    images, damaged = list(images), []
    for label in sorted(set(labels)):
        own = np.flatnonzero(np.array(labels) == label)
        damaged += rng.choice(own, max(1, round(share * len(own))), replace=False).tolist()
    for number in damaged:
        images[number] = damage(images[number], rng)
    return images, damaged


@pytest.fixture(scope="module")
def phantoms() -> tuple[list[Gray], list[int]]:
    """Two hundred, of four classes."""
    drawn = [
        (draw_phantom(name, SIDE, np.random.default_rng([label, number]))[0], label)
        for label, name in enumerate(NAMES)
        for number in range(50)
    ]
    return [image for image, _ in drawn], [label for _, label in drawn]


@pytest.mark.parametrize("kind", ["stripes", "half_gray", "rotated"])
def test_damaged_phantoms_are_first(phantoms: tuple[list[Gray], list[int]], kind: str) -> None:
    images, damaged = mixed_in(*phantoms, KINDS[kind], 0.02, np.random.default_rng(0))
    assert set(damaged) <= suspects(images, phantoms[1]).keys()


def test_the_reason_is_what_was_done(phantoms: tuple[list[Gray], list[int]]) -> None:
    images, labels = phantoms
    rng = np.random.default_rng(0)
    changed = {3: half_gray(images[3], rng), 60: np.full_like(images[60], 7), 120: images[120][::-1].copy()}
    found = suspects([changed.get(number, image) for number, image in enumerate(images)], labels)
    assert [found[number].rank for number in changed] == [1, 1, 1]
    assert found[3].reason == "band of one gray level"
    assert found[60].reason == "few gray levels or large empty areas"
    assert "rotated" in found[120].reason or "unlike" in found[120].reason


def test_the_size_of_the_source_counts() -> None:
    rng = np.random.default_rng(0)
    odd = OddImages(40, 32)
    for number in range(40):
        odd.add(row(str(number), 0, 300 if number == 7 else 100, 100), rng.integers(0, 256, (32, 32), dtype=np.uint8))
    first = rank(odd.scores(), [row.path for row in odd.rows], [0] * 40, ["A"])[0]
    assert (first.path, first.reason) == ("7", "wide source image")


def test_the_ranking_does_not_depend_on_the_order(phantoms: tuple[list[Gray], list[int]]) -> None:
    images, labels = phantoms
    order = np.random.default_rng(1).permutation(len(images))
    before, after = (
        noted(images, labels).scores(),
        noted([images[n] for n in order], [labels[n] for n in order]).scores(),
    )
    np.testing.assert_allclose(after, before[order], atol=2e-3)


@pytest.mark.parametrize("side", [1, 2, 15, 16, 17, 224])
def test_images_of_any_size_and_without_content(side: int) -> None:
    images = [np.full((side, side), level, np.uint8) for level in (0, 128, 255)] * 5
    assert np.isfinite(pixel_numbers(images[1])).all()
    assert np.isfinite(noted(images, [0] * 15).scores()).all()
    assert OddImages(0, side).scores().shape == (0, 2 * len(NUMBERS))


def test_many_odd_images_do_not_hide_each_other() -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    values[:150] = 30
    center, spread = center_and_spread(values, 0.1)
    assert (30 - center) / spread > odd_images.CLEARLY_ODD


def test_a_class_that_gathers_odd_images_is_warned_of(phantoms: tuple[list[Gray], list[int]]) -> None:
    images, labels = phantoms
    assert gathered(noted(images, labels).scores(), labels, NAMES) == []
    rng = np.random.default_rng(0)
    striped = [stripes(image, rng) if number < 8 else image for number, image in enumerate(images)]
    found = gathered(noted(striped, labels).scores(), labels, NAMES)
    assert {item.class_name for item in found} == {"COVID"}
    assert "periodic stripes or blocks" in {item.reason for item in found}
    everywhere = [stripes(image, rng) if number % 50 < 8 else image for number, image in enumerate(images)]
    assert gathered(noted(everywhere, labels).scores(), labels, NAMES) == []


@pytest.mark.nightly
def test_damaged_x_rays_are_first(xrays: Path, odd_xrays: Path) -> None:
    """The twelve that lay unnoticed in a collection; and, of each kind, a hundredth of each class."""
    paths = sorted(xrays.glob("*/images/*"))
    names = sorted({path.parent.parent.name for path in paths})
    labels = [names.index(path.parent.parent.name) for path in paths]
    images = [load_gray(path, 224) for path in paths]
    for kind, damage in KINDS.items():
        changed, damaged = mixed_in(images, labels, damage, 0.01, np.random.default_rng(0))
        found = suspects(changed, labels, names)
        share = np.mean([number in found for number in damaged])
        print(f"{kind}: {100 * share:.1f}% of {len(damaged)}")
        assert share >= 0.9, kind
    odd = [load_gray(path, 224) for path in sorted(odd_xrays.glob("*.png"))]
    given = range(len(images), len(images) + len(odd))
    found = suspects([*images, *odd], [*labels, *[names.index("Viral Pneumonia")] * len(odd)], names)
    print("ranks of the twelve:", [found[number].rank for number in given if number in found])
    assert set(given) <= found.keys()
    normal = [image for image, label in zip(images, labels, strict=True) if names[label] == "Normal"]
    scores = noted(normal, [0] * len(normal)).scores().max(1)
    alarms = int((scores >= odd_images.CLEARLY_ODD).sum())
    print(f"Normal alone: {alarms} of {len(normal)} are clearly odd")
    assert alarms <= 0.02 * len(normal)
