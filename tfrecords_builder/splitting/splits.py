"""Which image goes to which split: stratified, stable, with groups kept together. Pure.

The published project divides each class 70/15/15, rounded down, and gives the rest to the test split. The order inside
a class is by a keyed hash of the image's path, so that a seed always gives the same split, whatever the order in which
files are found, and adding a class moves no image of another (unless a group has images of both).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

SPLITS = ("train", "validation", "test")
TRAIN_PERCENT = 70
VALIDATION_PERCENT = 15
MIN_IMAGES_PER_CLASS = 7
"""The smallest class of which every split gets an image: 15 % of 7 is 1, of 6 is 0."""
RULES = ("leak-free", "published")
"""Both divide each class 70/15/15; leak-free keeps the images of a group in one split."""
FROM_FILE, GIVEN = "file:", "given:"
"""Begin the name of a split that a file or the collection itself gives; a digest of it follows."""
MOST_RATIO = 10.0
"""Of the largest class to the smallest, above which there is a warning."""
LEAST_VALIDATION = 20
"""Validation images of a class, below which there is a warning: with 20, one more error is 5 points of its recall."""
FEW_IMAGES = 30
"""Images of a class in a given validation or test split below which there is a warning: with 30, the accuracy of the
class has a standard error of 5 points at best (at 0.9)."""


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


def count_warnings(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What is to be said of a dataset's class sizes.

    Args:
        counts: Images by split, then by class.
    """
    validation, found = counts["validation"], []
    sizes = {name: sum(of[name] for of in counts.values()) for name in validation}
    largest, smallest = max(sizes, key=lambda name: sizes[name]), min(sizes, key=lambda name: sizes[name])
    if sizes[largest] > MOST_RATIO * sizes[smallest]:
        found.append(
            f"{largest} has {sizes[largest]:,} images and {smallest} {sizes[smallest]:,}; accuracy hardly sees the "
            "small class (selection.metric: f1_macro chooses the best epoch by all classes alike)"
        )
    few = {name: count for name, count in validation.items() if count < LEAST_VALIDATION}
    if few:
        words = ", ".join(f"{count} of {name}" for name, count in few.items())
        found.append(
            f"the validation split has few images ({words}); with fewer than {LEAST_VALIDATION} of a class, the best "
            "epoch is largely chosen by chance"
        )
    return found


def assign_splits(classes: Mapping[str, str], seed: int, group_of: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map each path to a split, given `classes`, which maps each path to its class name.

    With `group_of` (path to the name of its group; a path that is absent is a group of its own), no group is in two
    splits: in the stable order, a split takes each group that still fits, and the smallest if none does. A class
    without groups is divided exactly as `split_sizes` says; with them the sizes differ from that by less than the
    class's largest group, and are equal to it as long as there are single images to fill up with.
    """
    by_class: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path, class_name in classes.items():
        by_class[class_name][(group_of or {}).get(path, path)].append(path)
    split_of_group: dict[str, str] = {}
    assigned: dict[str, str] = {}
    for _, groups in sorted(by_class.items()):
        waiting = stable_order(groups, seed)
        left = 0
        for split, size in split_sizes(sum(map(len, groups.values()))).items():
            left += size
            # A group with images of two classes is where the first of them put it.
            taken = [group for group in waiting if split_of_group.get(group) == split]
            left -= sum(len(groups[group]) for group in taken)
            free = [group for group in waiting if group not in split_of_group]
            for group in free:
                if split == SPLITS[-1] or len(groups[group]) <= left:
                    taken.append(group)
                    left -= len(groups[group])
            if size and free and not taken:  # rather a group too many than a split without the class
                taken.append(min(free, key=lambda group: len(groups[group])))
                left -= len(groups[taken[0]])
            for group in taken:
                split_of_group[group] = split
                assigned.update(dict.fromkeys(groups[group], split))
            gone = set(taken)
            waiting = [group for group in waiting if group not in gone]
    return assigned


def stable_order(paths: Iterable[str], seed: int) -> list[str]:
    """`paths` in an order that looks random and depends on `seed` and the paths alone."""
    return sorted(paths, key=lambda path: (_rank(path, seed), path))


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}".encode()).digest()
