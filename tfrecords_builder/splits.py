"""Which image goes to which split: stratified, stable, pure.

The published project divides each class 70/15/15, rounded down, and gives the rest to the test split.
The order inside a class is by a keyed hash of the image's path, so that a seed always gives the same
split, whatever the order in which files are found, and adding a class moves no image of another.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

SPLITS = ("train", "validation", "test")
TRAIN_PERCENT = 70
VALIDATION_PERCENT = 15
MIN_IMAGES_PER_CLASS = 7
"""The smallest class of which every split gets an image: 15 % of 7 is 1, of 6 is 0."""
RULE = f"stratified {TRAIN_PERCENT}/{VALIDATION_PERCENT}/{100 - TRAIN_PERCENT - VALIDATION_PERCENT} per class"
"""What a dataset's manifest says of how it was divided."""


def split_sizes(count: int) -> dict[str, int]:
    """Sizes of the three splits of a class of `count` images.

    Training and validation are rounded down, the test split takes the rest: classes of
    3,616 / 6,012 / 10,192 / 1,345 images give 14,814 / 3,172 / 3,179 in all.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    train = count * TRAIN_PERCENT // 100
    validation = count * VALIDATION_PERCENT // 100
    return {"train": train, "validation": validation, "test": count - train - validation}


def assign_splits(classes: Mapping[str, str], seed: int) -> dict[str, str]:
    """Map each path to a split, given `classes`, which maps each path to its class name."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for path, class_name in classes.items():
        by_class[class_name].append(path)
    assigned: dict[str, str] = {}
    for paths in by_class.values():
        ordered = stable_order(paths, seed)
        start = 0
        for split, size in split_sizes(len(ordered)).items():
            assigned.update(dict.fromkeys(ordered[start : start + size], split))
            start += size
    return assigned


def stable_order(paths: Iterable[str], seed: int) -> list[str]:
    """`paths` in an order that looks random and depends on `seed` and the paths alone."""
    return sorted(paths, key=lambda path: (_rank(path, seed), path))


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}".encode()).digest()
