"""What the images themselves say, once all are read: their patients, and how they use the range of their samples."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tfrecords_builder.collection.file_kinds import Note
from tfrecords_builder.collection.metadata import Metadata
from tfrecords_builder.images.decoded import SmallRange
from tfrecords_builder.splitting.splits import MIN_IMAGES_PER_CLASS
from tfrecords_builder.writing.parts import EncodedImage

MAX_SHARES_APART = 0.1
"""By which the shares of stretched images of two classes may differ without a warning."""
_WORDS = {
    SmallRange.STRETCHED: "images use at most a sixteenth of the range of their samples, and are stretched",
    SmallRange.KEPT: "colour images of 16 bits use at most a sixteenth of their range, and stay almost black",
}
_FIXES = {
    SmallRange.STRETCHED: "say the bits in use in all files (sBIT of PNG, BitsStored of DICOM)",
    SmallRange.KEPT: "save them as gray",
}


def with_patients(
    images: Sequence[EncodedImage], metadata: Mapping[str, Metadata]
) -> tuple[dict[str, Metadata], list[Note]]:
    """`metadata` by path, with the patients of DICOM files where it names none, and what is to be said of them.

    A Patient ID that all DICOM images of a class share names nobody: anonymisers write one for all. With it, a class
    would be one patient, which no split can divide.
    """
    known = dict(metadata)
    codes: dict[str, list[str]] = defaultdict(list)
    for image in images:
        if image.patient is not None:
            codes[image.source.class_name].append(image.patient)
    one_for_all = {name: of[0] for name, of in codes.items() if len(set(of)) == 1 and len(of) >= MIN_IMAGES_PER_CLASS}
    for image in images:
        path, patient = image.source.path, image.patient
        about = known.get(path, Metadata())
        if patient is not None and patient not in one_for_all.values() and about.patient is None:
            known[path] = replace(about, patient=patient)
    return known, [
        Note(
            f"all {len(codes[name]):,} DICOM images of {name} have one Patient ID, which is taken for nobody's; "
            "name patients in metadata.csv",
            warning=True,
        )
        for name in sorted(one_for_all)
    ]


def range_notes(images: Sequence[EncodedImage]) -> list[Note]:
    """That images are stretched, or would have to be; a warning where that tells classes apart."""
    whole = [image for image in images if image.reason is None]
    totals = Counter(image.source.class_name for image in whole)
    notes = []
    for kind, words in _WORDS.items():
        found = [image for image in whole if image.small_range == kind]
        if not found:
            continue
        counts = Counter(image.source.class_name for image in found)
        notes.append(
            Note(f"{len(found):,} of {len(whole):,} {words} ({found[0].source.path})", kind is SmallRange.KEPT)
        )
        ordered = sorted(totals, key=lambda name: (counts[name] / totals[name], name))
        least, most = ordered[0], ordered[-1]
        if counts[most] / totals[most] - counts[least] / totals[least] > MAX_SHARES_APART:
            shares = " and ".join(f"{counts[name]:,} of {totals[name]:,} of {name}" for name in (most, least))
            what = f"the share of such images differs by class ({shares}), so a network can learn how files are stored"
            notes.append(Note(f"{what}; {_FIXES[kind]}", warning=True))
    return notes
