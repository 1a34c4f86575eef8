"""Which image goes where: the rule of the split, and between the two passes of a build the place of every image.

Touches no file but the table of a split.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfrecords_builder.collection.collect import Collection
from tfrecords_builder.collection.file_kinds import Note
from tfrecords_builder.collection.metadata import Metadata
from tfrecords_builder.collection.tables import read_split_file
from tfrecords_builder.format.manifest import Settings
from tfrecords_builder.format.manifest_rows import ACCEPTED, EXCLUDED, REJECTED, Row
from tfrecords_builder.format.record import encode_mask
from tfrecords_builder.format.sharding import shard_bounds, shard_count, shard_name
from tfrecords_builder.splitting import near_duplicates, splits
from tfrecords_builder.writing.parts import EncodedImage
from tfrecords_builder.writing.writer import ShardTask, WrittenShard


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


def choose_split(
    listing: Collection, rule: str | None, split_file: Path | None
) -> tuple[Mapping[str, str] | None, str, list[Note]]:
    """The split by path (None: the rule divides the images), the rule's name, and what is to be said of it.

    Args:
        listing: The images, and the split that the collection gives.
        rule: Of `splits.RULES`; None keeps a given split.
        split_file: A table that says the split.
    """
    if split_file is not None:
        split_of, digest = read_split_file(split_file, {image.path for image in listing.images})
        return split_of, f"{splits.FROM_FILE}{digest}", []
    given = listing.split_of
    if given is None or rule is not None:
        replaced = [] if given is None else [Note(f"the given split is replaced (--split {rule})")]
        return None, rule or splits.RULES[0], replaced
    digest = hashlib.sha256(json.dumps(sorted(given.items())).encode()).hexdigest()
    notes = [Note("the given split is kept; --split leak-free divides all images anew")]
    left_out = len(listing.images) - len(given)
    if left_out:
        notes.append(Note(f"{left_out:,} of {len(listing.images):,} images are left out, as they have no split", True))
    return given, f"{splits.GIVEN}{digest}", notes + _small_splits(listing, given)


def _small_splits(listing: Collection, given: Mapping[str, str]) -> list[Note]:
    """A warning for each split, but training, that is too small to choose or judge a model by."""
    notes = []
    for split, purpose in (("validation", "choose"), ("test", "judge")):
        counts = Counter(image.class_name for image in listing.images if given.get(image.path) == split)
        small = {name: count for name, count in sorted(counts.items()) if count < splits.FEW_IMAGES}
        if small:
            words = ", ".join(f"{count} of {name}" for name, count in small.items())
            what = f"the given split has {counts.total():,} {split} images ({words}), too few to {purpose} a model by"
            notes.append(Note(f"{what}; --split leak-free divides all images anew", warning=True))
    return notes


def decide(
    images: Sequence[EncodedImage],
    thumbnails: npt.NDArray[np.uint8],
    metadata: Mapping[str, Metadata],
    settings: Settings,
    given: Mapping[str, str] | None = None,
) -> Decision:
    """Find duplicates, leave out what contradicts itself, and divide the rest.

    Args:
        images: Every source image, in the order of the manifest.
        thumbnails: uint8 [n, 64, 64], of the n that are whole images, in the same order.
        metadata: By path, of the images of which the collection says something.
        settings: Split rule, seed, and what becomes of conflicts.
        given: The split by path, from a file or the collection. An image that it leaves out is excluded.
    """
    paths = [image.source.path for image in images]
    class_names = [image.source.class_name for image in images]
    whole = [row for row, image in enumerate(images) if image.reason is None]
    pairs = near_duplicates.find_duplicates([images[row].sha256 or "" for row in whole], thumbnails)
    duplicates = tuple((whole[pair.first], whole[pair.second], pair.score) for pair in pairs)
    same = [(first, second) for first, second, _ in duplicates]
    # Of whole images alone: what is rejected joins no group.
    patients = [
        metadata[path].patient if path in metadata and image.reason is None else None
        for path, image in zip(paths, images, strict=True)
    ]
    root = near_duplicates.group_of(len(images), [*same, *near_duplicates.equal_pairs(patients)])
    excluded: dict[str, str] = {}
    if settings.conflicts == "exclude":
        # Not of patients: one may well have images in two classes.
        looks = near_duplicates.group_of(len(images), same)
        classes = near_duplicates.conflicts(looks, class_names)
        for row in whole:
            if looks[row] in classes:
                names = " and ".join(classes[looks[row]])
                excluded[paths[row]] = f"is a near-duplicate of an image of another class ({names})"
    if given is not None:
        where = "the split file" if settings.split_rule.startswith(splits.FROM_FILE) else "the given split"
        excluded |= {paths[row]: f"is not in {where}" for row in whole if paths[row] not in given}
    classes_of = {paths[row]: class_names[row] for row in whole if paths[row] not in excluded}
    groups = tuple(paths[row] for row in root)
    if given is not None:
        split_of = {path: given[path] for path in classes_of}
    else:
        grouped = dict(zip(paths, groups, strict=True)) if settings.split_rule == "leak-free" else None
        split_of = splits.assign_splits(classes_of, settings.seed, grouped)
    return Decision(groups, split_of, excluded, duplicates)


def plan_shards(
    work: Path,
    images: Sequence[EncodedImage],
    split_of: Mapping[str, str],
    class_names: Sequence[str],
    settings: Settings,
) -> list[ShardTask]:
    """Which record goes where: every shard, in order.

    Inside a split, records follow `splits.stable_order`, so that every shard holds a mixture of the classes.
    """
    size = settings.image_size
    no_mask = encode_mask(np.zeros((size, size), np.bool_)) if settings.masks else None
    row_of = {image.source.path: row for row, image in enumerate(images)}
    tasks: list[ShardTask] = []
    for split in splits.SPLITS:
        ordered = splits.stable_order([path for path, of in split_of.items() if of == split], settings.seed)
        rows = [row_of[path] for path in ordered]
        count = shard_count(len(rows), sum(images[row].length for row in rows))
        for number, (start, stop) in enumerate(shard_bounds(len(rows), count)):
            records = rows[start:stop]
            name = shard_name(split, number, count)
            tasks.append(ShardTask(work, name, split, records, [images[row] for row in records], class_names, no_mask))
    return tasks


def manifest_rows(
    images: Sequence[EncodedImage],
    decision: Decision,
    metadata: Mapping[str, Metadata],
    class_names: Sequence[str],
    shards: Sequence[tuple[ShardTask, WrittenShard]],
) -> tuple[Row, ...]:
    """One row per source image, with the place of its record."""
    # Shard, number in it, offset and length of each record, by row.
    places: dict[int, tuple[str, int, int, int]] = {}
    for task, shard in shards:
        for number, row in enumerate(task.rows):
            places[row] = (task.name, number, shard.offsets[number], shard.lengths[number])
    label_of = {name: label for label, name in enumerate(class_names)}
    rows = []
    for number, (image, group) in enumerate(zip(images, decision.groups, strict=True)):
        path, class_name, mask = image.source
        shard_of, index, offset, length = places.get(number, (None, None, None, None))
        reason = image.reason or decision.excluded.get(path)
        about = metadata.get(path, Metadata())
        rows.append(
            Row(
                path=path,
                class_name=class_name,
                label=label_of[class_name],
                split=decision.split_of.get(path),
                group=group,
                source=about.source,
                patient=about.patient,
                mask=mask,
                sha256=image.sha256,
                mask_sha256=image.mask_sha256,
                width=image.width,
                height=image.height,
                status=REJECTED if image.reason else EXCLUDED if reason else ACCEPTED,
                reason=reason,
                shard=shard_of,
                index=index,
                offset=offset,
                length=length,
            )
        )
    return tuple(rows)
