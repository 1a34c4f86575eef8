"""What a build would take: every file of the source and the split, without reading a picture or writing anything."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tfrecords_builder.build import BuildOptions, Inputs
from tfrecords_builder.collection.file_kinds import Note, NotTaken
from tfrecords_builder.splitting import splits


@dataclass(frozen=True, slots=True)
class Preview:
    """A build that was not done. Damaged images and near-duplicates are not known: both need the pixels."""

    counts: Mapping[str, Mapping[str, int]]
    """Images by split, then by class, in canonical order, zeros included."""
    images: int
    masks: int
    not_taken: tuple[NotTaken, ...]
    notes: tuple[Note, ...]
    split_rule: str
    """As `Settings.split_rule`."""


def preview_build(source: Path, options: BuildOptions) -> Preview:
    """What `build.build_dataset` would take.

    Raises:
        UserError: as `build_dataset`, of all that can be known from names and tables.
    """
    inputs = Inputs.read(source, options, for_preview=True)
    images, metadata, rule = inputs.listing.images, inputs.listing.metadata, inputs.settings.split_rule
    patient_of = {path: about.patient for path, about in metadata.items() if about.patient is not None}
    split_of = inputs.split_of
    if split_of is None:
        classes = {image.path: image.class_name for image in images}
        groups = {path: patient_of.get(path, path) for path in classes}
        split_of = splits.assign_splits(classes, options.seed, groups if rule == "leak-free" else None)
    counts = {split: dict.fromkeys(inputs.class_counts, 0) for split in splits.SPLITS}
    splits_of: dict[str, set[str]] = defaultdict(set)
    for image in images:
        split = split_of.get(image.path)
        if split is not None:
            counts[split][image.class_name] += 1
            if image.path in patient_of:
                splits_of[patient_of[image.path]].add(split)
    notes = list(inputs.notes)
    straddling = sum(len(of) > 1 for of in splits_of.values())
    if straddling:
        notes.append(Note(f"{straddling:,} of {len(splits_of):,} patients would be in more than one split", True))
    for split, of in counts.items():
        if without := [name for name, count in of.items() if not count]:
            notes.append(Note(f"the {split} split would have no image of {', '.join(without)}: an error", True))
    masks = len({image.mask for image in images if image.mask})
    return Preview(counts, len(images), masks, inputs.listing.not_taken, tuple(notes), rule)
