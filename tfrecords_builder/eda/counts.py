"""What a dataset's manifest alone says, as numbers for its analysis: counts, sizes, duplicates, other files. Pure."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tfrecords_builder.format.manifest import Manifest
from tfrecords_builder.format.manifest_rows import ACCEPTED, Row
from tfrecords_builder.splitting.splits import TRAIN_PERCENT, VALIDATION_PERCENT

GROUPS_SHOWN = 6
SIZES_LISTED = 10

TARGET_SHARES = {
    "train": TRAIN_PERCENT / 100,
    "validation": VALIDATION_PERCENT / 100,
    "test": (100 - TRAIN_PERCENT - VALIDATION_PERCENT) / 100,
}
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def count_numbers(manifest: Manifest) -> dict[str, Any]:
    """Images by class, by split and class with the distance from 70/15/15, and how uneven the classes are."""
    by_split = manifest.counts
    classes = {name: sum(counts[name] for counts in by_split.values()) for name in manifest.class_names}
    largest, smallest = max(classes, key=classes.__getitem__), min(classes, key=classes.__getitem__)
    return {
        "images": sum(classes.values()),
        "source_files": len(manifest.rows),
        "classes": classes,
        "largest": largest,
        "smallest": smallest,
        "imbalance": classes[largest] / classes[smallest],
        "splits": {
            split: {
                name: {
                    "images": counts[name],
                    "share": counts[name] / classes[name],
                    "deviation": counts[name] / classes[name] - TARGET_SHARES[split],
                }
                for name in manifest.class_names
            }
            for split, counts in by_split.items()
        },
    }


def size_numbers(manifest: Manifest) -> dict[str, Any]:
    """Width and height of the source images by class, and which pairs are commonest."""
    of_class: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.class_names}
    for row in accepted(manifest):
        if row.width is not None and row.height is not None:
            of_class[row.class_name].append((row.width, row.height))
    pairs = {name: Counter(sizes) for name, sizes in of_class.items()}
    together = sum(pairs.values(), Counter[tuple[int, int]]())
    common = sorted(together.items(), key=lambda item: (-item[1], item[0]))
    return {
        "distinct": len(common),
        "commonest": [
            {
                "width": width,
                "height": height,
                "images": {name: pairs[name][width, height] for name in manifest.class_names},
            }
            for (width, height), _ in common[:SIZES_LISTED]
        ],
        "classes": {
            name: {
                side: quantiles([size[position] for size in sizes]) for position, side in enumerate(("width", "height"))
            }
            for name, sizes in of_class.items()
        },
    }


def category_numbers(manifest: Manifest, of: Callable[[Row], str]) -> dict[str, dict[str, int]]:
    """Images by category, then by class; the commonest category first."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(manifest.class_names, 0))
    for row in accepted(manifest):
        counts[of(row)][row.class_name] += 1
    return dict(sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0])))


def left_out_numbers(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Images that are in no split, by status: how many, each reason with its count, and each file with its reason."""
    return {
        status: {
            "images": len(items),
            "reasons": dict(sorted(Counter(reason for _, reason in items).items(), key=lambda i: (-i[1], i[0]))),
            "files": [{"path": path, "reason": reason} for path, reason in items],
        }
        for status, items in (("rejected", manifest.rejected), ("excluded", manifest.excluded))
    }


def source_folder_numbers(manifest: Manifest) -> dict[str, Any]:
    """What became of each file of the source folder, and what else the build said of the folder."""
    masks = len({row.mask for row in manifest.rows if row.mask})
    other = sum(item.files for item in manifest.not_taken)
    return {
        "files": len(manifest.rows) + masks + other,
        "images": len(manifest.rows),
        "masks": masks,
        "not_taken": [asdict(item) for item in manifest.not_taken],
        "notes": [asdict(note) for note in (*manifest.notes, *manifest.image_notes)],
    }


def patient_numbers(manifest: Manifest) -> dict[str, int]:
    """Patients of whom there are several images, and how many of them are in more than one split."""
    patients = manifest.patients
    return {
        "several_images": len(patients),
        "images": sum(map(len, patients.values())),
        "straddling_splits": _straddling(patients.values()),
    }


def duplicate_numbers(manifest: Manifest) -> dict[str, Any]:
    """Pairs and groups of near-duplicates, as the build found them."""
    groups = manifest.near_duplicates
    largest = largest_groups(manifest)
    return {
        "pairs": len(manifest.duplicates),
        "groups": len(groups),
        "images": sum(map(len, groups.values())),
        "sizes": {str(size): n for size, n in sorted(Counter(map(len, groups.values())).items())},
        "straddling_splits": _straddling(groups.values()),
        "straddling_classes": sum(len({row.class_name for row in rows}) > 1 for rows in groups.values()),
        "largest": [
            [{"path": row.path, "class_name": row.class_name, "split": row.split} for row in rows] for rows in largest
        ],
    }


def largest_groups(manifest: Manifest) -> list[list[Row]]:
    """The largest groups first; of equal ones those with more images in the dataset, then by path."""
    order = sorted(
        manifest.near_duplicates.items(),
        key=lambda item: (-len(item[1]), -sum(row.shard is not None for row in item[1]), item[0]),
    )
    return [rows for _, rows in order[:GROUPS_SHOWN]]


def _straddling(groups: Iterable[Sequence[Row]]) -> int:
    """How many of the groups have images in more than one split."""
    return sum(len({row.split for row in rows} - {None}) > 1 for rows in groups)


def accepted(manifest: Manifest) -> Iterator[Row]:
    return (row for row in manifest.rows if row.status == ACCEPTED)


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Least, greatest and quantiles of whole numbers: each is one of them."""
    ordered = np.sort(np.array(values, np.int64))
    if not len(ordered):
        return {}
    return {
        "least": int(ordered[0]),
        **{name: int(np.quantile(ordered, q, method="inverted_cdf")) for name, q in QUANTILES.items()},
        "greatest": int(ordered[-1]),
    }
