"""Between the two passes of a build: which image goes where, from what is known of every image. Touches no file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfrecords_builder.collection.metadata import Metadata
from tfrecords_builder.format.manifest import ACCEPTED, EXCLUDED, REJECTED, Row, Settings
from tfrecords_builder.format.record import encode_mask
from tfrecords_builder.format.sharding import shard_bounds, shard_count, shard_name
from tfrecords_builder.splitting import near_duplicates, splits
from tfrecords_builder.writing.parts import PartImage
from tfrecords_builder.writing.writer import ShardItem, ShardTask, WrittenShard


@dataclass(frozen=True, slots=True)
class Known:
    """What the first pass found of one source file, and where it put the image."""

    image: PartImage
    part: str
    class_name: str
    label: int
    metadata: Metadata
    mask: str | None
    """Path of the lung mask, if it is read."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of every source file; positions are those of the manifest's rows."""

    groups: tuple[str, ...]
    """Of each row: the path of the first image of its group: near-duplicates, and images of a patient."""
    split_of: dict[str, str]
    """By path, of every image that is in the dataset."""
    excluded: dict[str, str]
    """By path, of every whole image that is not: the reason."""
    duplicates: tuple[tuple[int, int, float], ...]


def decide(
    known: Sequence[Known],
    thumbnails: npt.NDArray[np.uint8],
    settings: Settings,
    given: Mapping[str, str] | None = None,
) -> Decision:
    """Find duplicates, leave out what contradicts itself, and divide the rest.

    Args:
        known: Every source file, in the order of the manifest.
        thumbnails: uint8 [n, 64, 64], of the n files that are whole images, in the same order.
        settings: Split rule, seed, and what becomes of conflicts.
        given: With a split rule from a file, the split by path. An image that it leaves out is excluded.
    """
    whole = [row for row, item in enumerate(known) if item.image.reason is None]
    found = near_duplicates.find_duplicates([known[row].image.sha256 or "" for row in whole], thumbnails)
    duplicates = tuple((whole[pair.first], whole[pair.second], pair.score) for pair in found)
    same = [(first, second) for first, second, _ in duplicates]
    root = near_duplicates.group_of(len(known), [*same, *_patients(known, whole)])
    paths = [item.image.path for item in known]
    excluded: dict[str, str] = {}
    if settings.conflicts == "exclude":
        # Not of patients: one may well have images in two classes.
        looks = near_duplicates.group_of(len(known), same)
        classes = near_duplicates.conflicts(looks, [item.class_name for item in known])
        for row in whole:
            if looks[row] in classes:
                names = " and ".join(classes[looks[row]])
                excluded[paths[row]] = f"is a near-duplicate of an image of another class ({names})"
    if given is not None:
        excluded |= {paths[row]: "is not in the split file" for row in whole if paths[row] not in given}
    classes_of = {paths[row]: known[row].class_name for row in whole if paths[row] not in excluded}
    groups = tuple(paths[row] for row in root)
    if given is not None:
        split_of = {path: given[path] for path in classes_of}
    else:
        grouped = dict(zip(paths, groups, strict=True)) if settings.split_rule == "leak-free" else None
        split_of = splits.assign_splits(classes_of, settings.seed, grouped)
    return Decision(groups, split_of, excluded, duplicates)


def _patients(known: Sequence[Known], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each image of a patient with the patient's first."""
    first_of: dict[str, int] = {}
    for row in rows:
        patient = known[row].metadata.patient
        if patient is not None and first_of.setdefault(patient, row) != row:
            yield first_of[patient], row


def plan_shards(
    work: Path, known: Sequence[Known], split_of: Mapping[str, str], settings: Settings
) -> list[tuple[str, ShardTask]]:
    """Which record goes where: (split, shard) for every shard, in order.

    Inside a split, records follow `splits.stable_order`, so that every shard holds a mixture of the classes.
    """
    size = settings.image_size
    no_mask = encode_mask(np.zeros((size, size), np.bool_)) if settings.masks else None
    row_of = {item.image.path: row for row, item in enumerate(known)}
    plan: list[tuple[str, ShardTask]] = []
    for split in splits.SPLITS:
        paths = splits.stable_order([path for path, of in split_of.items() if of == split], settings.seed)
        count = shard_count(len(paths), sum(known[row_of[path]].image.length for path in paths))
        for number, (start, stop) in enumerate(shard_bounds(len(paths), count)):
            items = []
            for path in paths[start:stop]:
                item = known[row_of[path]]
                image = item.image
                items.append(
                    ShardItem(item.part, image.offset, image.length, image.mask_length, item.label, path, row_of[path])
                )
            plan.append((split, ShardTask(work, shard_name(split, number, count), items, no_mask)))
    return plan


def manifest_rows(
    known: Sequence[Known], decision: Decision, shards: Sequence[tuple[ShardTask, WrittenShard]]
) -> tuple[Row, ...]:
    """One row per source file, with the place of its record."""
    # Shard, number in it, offset and length of each record, by path.
    places: dict[str, tuple[str | None, int | None, int | None, int | None]] = {}
    for task, shard in shards:
        for number, record in enumerate(task.items):
            places[record.path] = (shard.name, number, shard.offsets[number], shard.lengths[number])
    rows = []
    for item, group in zip(known, decision.groups, strict=True):
        image = item.image
        name, index, offset, length = places.get(image.path, (None, None, None, None))
        reason = image.reason or decision.excluded.get(image.path)
        rows.append(
            Row(
                path=image.path,
                class_name=item.class_name,
                label=item.label,
                split=decision.split_of.get(image.path),
                group=group,
                source=item.metadata.source,
                patient=item.metadata.patient,
                mask=item.mask,
                sha256=image.sha256,
                mask_sha256=image.mask_sha256,
                width=image.width,
                height=image.height,
                status=REJECTED if image.reason else EXCLUDED if reason else ACCEPTED,
                reason=reason,
                shard=name,
                index=index,
                offset=offset,
                length=length,
            )
        )
    return tuple(rows)
