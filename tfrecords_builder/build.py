"""Build a dataset: source images in, shards and a manifest out.

Two parallel passes. The first decodes, resizes and encodes every image once, into parts in the work folder
(`parts`); the second copies the encoded images from the parts into shards. Between them every image is known: which
are whole, which are near-duplicates, and so which goes where. Copying costs a fraction of decoding, and for a while the
disk holds the images twice.

The bytes of the dataset depend on the source and the settings alone: not on the number of workers, and not on how
often the build was stopped and started again.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tfrecords_builder import plan
from tfrecords_builder.collection.collect import Collection, read_collection
from tfrecords_builder.collection.exclusions import without_excluded
from tfrecords_builder.collection.file_kinds import Note, may_be_dicom
from tfrecords_builder.collection.find import class_counts
from tfrecords_builder.collection.metadata import metadata_digest
from tfrecords_builder.collection.patient_codes import PatientKey, patient_key, with_key
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.pool import Pool, default_workers
from tfrecords_builder.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_IMAGE_SIZE,
    Manifest,
    Settings,
    ShardInfo,
    check_shards,
    compute_fingerprint,
    read_manifest,
    write_manifest,
)
from tfrecords_builder.format.record import ENCODINGS
from tfrecords_builder.images import dicom
from tfrecords_builder.images.decode import DECODERS
from tfrecords_builder.images.decoded import ImageError
from tfrecords_builder.splitting import splits
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE
from tfrecords_builder.writing import observations, output_folder, parts
from tfrecords_builder.writing.parts import EncodedImage
from tfrecords_builder.writing.writer import IngestTask, ingest, write_shard

ON_ERROR = ("stop", "skip")
CONFLICTS = ("exclude", "keep")
MASKS = ("read", "ignore")

Progress = Callable[[int, int], None]
Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Protocol):
    """Runs functions over tasks, somewhere, with results in order; see `pool.Pool`."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]: ...


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build a dataset. A value that no build takes raises `UserError`."""

    image_size: int = 224
    """Side of the stored images in pixels."""
    encoding: str = "raw"
    """raw, png or jpeg; see `format.record`."""
    seed: int = 0
    """Of the split and the order of records."""
    split: str | None = None
    """leak-free (near-duplicates and images of a patient stay in one split) or published (image by image). None keeps
    the split that the collection gives, and is leak-free where it gives none."""
    split_file: Path | None = None
    """CSV with the columns path and split, in place of a rule."""
    labels: Path | None = None
    """Table with the columns path and label, in place of class folders; see `collect.read_collection`."""
    exclude: Path | None = None
    """CSV with the column path: images that are left out, as if they were not in the source."""
    conflicts: str | None = None
    """Near-duplicates in several classes: exclude or keep. None excludes them unless `split` is published."""
    masks: str = "read"
    """Lung masks: read or ignore."""
    on_error: str = "stop"
    """A file that is no whole image: "stop" ends the build, "skip" lists the file. With "skip", a class may also lose
    more than 1 % of its pictures to other formats and the like, or all of them; see `find.list_source`."""
    workers: int | None = None
    """Processes; None is one per processor."""

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise UserError(f"image-size: must be from 1 to {MAX_IMAGE_SIZE} pixels, not {self.image_size}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers: must be at least 1, not {self.workers}")
        for name, value, known in (
            ("encoding", self.encoding, ENCODINGS),
            ("split", self.split or splits.RULES[0], splits.RULES),
            ("conflicts", self.conflicts or "keep", CONFLICTS),
            ("masks", self.masks, MASKS),
            ("on-error", self.on_error, ON_ERROR),
        ):
            if value not in known:
                raise UserError(f"{name}: must be one of {', '.join(known)}, not '{value}'")


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """The dataset that a build wrote, or that was there already."""

    manifest: Manifest
    seconds: float
    images_per_second: float
    """Source images decoded per second of the whole build; 0 when there was nothing to do."""
    reused: bool
    """True when the folder already held this dataset, so that no shard was written."""
    changes: tuple[str, ...]
    """Why the dataset that the folder held was built anew; empty when it held none."""


def build_dataset(
    source: Path,
    dataset: Path,
    options: BuildOptions = BuildOptions(),
    *,
    progress: Progress | None = None,
    pool: Workers | None = None,
) -> BuildSummary:
    """Build the dataset of the images in `source` into the folder `dataset`.

    A folder that holds this very dataset already is left as it is. One that holds a dataset of other settings or other
    images is built anew; the old dataset stays whole until the new shards are. A build that was stopped resumes.
    Anything else in the folder is an error and is not touched.

    Args:
        source: Holds one folder per class, or images that a table labels; see `collect.read_collection`.
        dataset: The output folder: absent, empty, or of an earlier build.
        options: How to build it.
        progress: Called with (images decoded, images in all), from the calling thread.
        pool: Where the work is done, in place of processes of this machine.

    Raises:
        ImageError: With on_error "stop", the first file (by path) that is no whole image.
        UserError: Anything else that the user can fix; see the message.
    """
    started = time.perf_counter()
    collection = Inputs.read(source, options)
    with output_folder.locked_folder(dataset):
        present, changes = _existing(dataset, collection)
        reused = present is not None and not changes
        if present is not None and reused:
            if options.on_error == "stop" and present.rejected:
                path, reason = present.rejected[0]
                raise ImageError(source / path, reason)
            output_folder.remove_work(dataset)
            manifest = replace(present, not_taken=collection.listing.not_taken, notes=collection.notes)
            if (manifest.not_taken, manifest.notes) != (present.not_taken, present.notes):
                write_manifest(dataset, manifest)  # the same dataset, of a folder that holds other files beside it
        else:
            with output_folder.work_folder(dataset) as work:
                tasks = _ingest_tasks(collection, work, options)
                count = min(options.workers or default_workers(), len(tasks))
                with Pool(count) if pool is None else nullcontext(pool) as workers:
                    images, thumbnails = _ingest(collection, tasks, workers, progress)
                    manifest = _write(collection, work, images, thumbnails, workers)
                output_folder.publish(dataset, work, manifest)
    seconds = time.perf_counter() - started
    return BuildSummary(manifest, seconds, 0.0 if reused else len(manifest.rows) / seconds, reused, tuple(changes))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a build starts from, before any image is read."""

    source: Path
    listing: Collection
    class_counts: dict[str, int]
    """Images by class; the order is that of the labels."""
    notes: tuple[Note, ...]
    split_of: Mapping[str, str] | None
    """By path, from the split file or as the collection gives it; None where a rule divides the images."""
    settings: Settings
    patient_key: PatientKey | None
    """None where no file is DICOM."""

    @property
    def decoders(self) -> dict[str, str]:
        """Versions of the libraries that make the pixels."""
        return DECODERS if self.patient_key is None else {**DECODERS, "pydicom": dicom.version()}

    @classmethod
    def read(cls, source: Path, options: BuildOptions, for_preview: bool = False) -> "Inputs":
        """The images of a source folder, and how they are to be divided.

        With `for_preview`, no key for the patients of DICOM files is made or read.

        Raises:
            UserError: the folder or a table must be mended, or there are too few classes or images.
        """
        listing = read_collection(source, options.on_error, options.masks, options.labels)
        images = listing.images
        counts = class_counts(images)
        if len(counts) < 2:
            raise UserError(f"{source}: contains only one class, '{next(iter(counts))}'; give at least two")
        _check_class_sizes(source, counts)
        split_of, rule, notes = plan.choose_split(listing, options.split, options.split_file)
        # After the tables, which may well name what is left out.
        if options.exclude is not None:
            listing = without_excluded(listing, options.exclude)
            counts = class_counts(listing.images)
            _check_class_sizes(source, counts)
        key = None
        if any(may_be_dicom(image.path.rpartition("/")[2]) for image in listing.images):
            dicom.version()  # without pydicom, this is said before anything is read
            key = None if for_preview else patient_key()
        settings = Settings(
            image_size=options.image_size,
            encoding=options.encoding,
            seed=options.seed,
            split_rule=rule,
            conflicts=options.conflicts or ("keep" if options.split == "published" else "exclude"),
            masks=any(image.mask for image in listing.images),
            metadata=with_key(metadata_digest(listing.metadata, listing.extra), key),
        )
        return cls(source, listing, counts, (*listing.notes, *notes), split_of, settings, key)


def _check_class_sizes(source: Path, counts: Mapping[str, int], rejected: Mapping[str, int] | None = None) -> None:
    """`counts`: images by class, of which `rejected` (by class) do not count."""
    for name, count in counts.items():
        lost = (rejected or {}).get(name, 0)
        if count - lost < splits.MIN_IMAGES_PER_CLASS:
            without = f" (without {lost} rejected)" if lost else ""
            raise UserError(
                f"{source}: class '{name}' has {count - lost} images{without}; at least "
                f"{splits.MIN_IMAGES_PER_CLASS} are needed, one for each split; add images, or remove the class"
            )


def _ingest_tasks(collection: Inputs, work: Path, options: BuildOptions) -> list[IngestTask]:
    made_by = [options.image_size, options.encoding, THUMBNAIL_SIZE, collection.decoders]
    key = json.dumps([FORMAT_VERSION, *made_by, collection.patient_key and collection.patient_key.name])
    images = collection.listing.images
    size = parts.images_per_part(len(images))
    return [
        IngestTask(
            source=collection.source,
            images=images[start : start + size],
            folder=work,
            number=number,
            key=key,
            image_size=options.image_size,
            encoding=options.encoding,
            stop_at_reject=options.on_error == "stop",
            patient_key=collection.patient_key,
        )
        for number, start in enumerate(range(0, len(images), size))
    ]


def _ingest(
    collection: Inputs, tasks: Sequence[IngestTask], pool: Workers, progress: Progress | None
) -> tuple[list[EncodedImage], npt.NDArray[np.uint8]]:
    """The first pass: every source image, in the order of the listing, and the thumbnails of the whole ones."""
    parts.remove_other_parts(tasks[0].folder, len(tasks))
    images: list[EncodedImage] = []
    # The largest that a build holds, at 4 KiB an image: once, and not as parts beside their sum.
    thumbnails = np.empty((len(collection.listing.images), THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    whole = 0
    for result in pool.map(ingest, tasks):
        if isinstance(result, EncodedImage):
            raise ImageError(collection.source / result.source.path, result.reason or "")
        several = result.thumbnails()
        thumbnails[whole : whole + len(several)] = several
        whole += len(several)
        images += result.images
        if progress is not None:
            progress(len(images), len(collection.listing.images))
    return images, thumbnails[:whole]


def _write(
    collection: Inputs,
    work: Path,
    images: Sequence[EncodedImage],
    thumbnails: npt.NDArray[np.uint8],
    pool: Workers,
) -> Manifest:
    """The second pass: every shard, in `work`; the manifest that goes with them."""
    settings, class_names = collection.settings, tuple(collection.class_counts)
    rejected = Counter(image.source.class_name for image in images if image.reason is not None)
    _check_class_sizes(collection.source, collection.class_counts, rejected)
    metadata, notes = observations.with_patients(images, collection.listing.metadata)
    decision = plan.decide(images, thumbnails, metadata, settings, collection.split_of)
    _check_splits(collection, decision)
    tasks = plan.plan_shards(work, images, decision.split_of, class_names, settings)
    shards = list(zip(tasks, pool.map(write_shard, tasks), strict=True))
    rows = plan.manifest_rows(images, decision, metadata, class_names, shards)
    return Manifest(
        class_names=class_names,
        settings=settings,
        fingerprint=compute_fingerprint(
            settings, class_names, [(row.path, row.class_name, row.sha256, row.mask_sha256) for row in rows]
        ),
        shards=tuple(
            ShardInfo(task.name, task.split, len(task.rows), shard.bytes, shard.sha256) for task, shard in shards
        ),
        rows=rows,
        duplicates=decision.duplicates,
        created_with=collection.decoders,
        not_taken=collection.listing.not_taken,
        notes=collection.notes,
        extra={name: tuple(map(of.get, (row.path for row in rows))) for name, of in collection.listing.extra.items()},
        image_notes=(*notes, *observations.range_notes(images)),
    )


def _check_splits(collection: Inputs, decision: plan.Decision) -> None:
    """Every class has an image in every split."""
    present = {(image.class_name, decision.split_of.get(image.path)) for image in collection.listing.images}
    for name in collection.class_counts:
        for split in splits.SPLITS:
            if (name, split) not in present:
                given = collection.settings.split_rule.startswith(splits.GIVEN)
                raise UserError(
                    f"{collection.source}: class '{name}' has no image for the {split} split (near-duplicates and a "
                    "patient's images stay together, and excluded images do not count); add images or give another "
                    f"split{' (--split leak-free)' if given else ''}"
                )


def _existing(dataset: Path, collection: Inputs) -> tuple[Manifest | None, list[str]]:
    """The manifest of the dataset that is there, and how it differs from the one that was asked for."""
    if not (dataset / MANIFEST_NAME).exists():
        return None, []
    manifest = read_manifest(dataset)
    wanted, present = asdict(collection.settings), asdict(manifest.settings)
    differences = [f"{name} {present[name]} -> {wanted[name]}" for name in wanted if wanted[name] != present[name]]
    if not differences:
        # Only now are the source files read: equal settings are no proof of equal images.
        images = collection.listing.images
        digests = _digests(collection.source, [path for image in images for path in (image.path, image.mask) if path])
        sources = [
            (image.path, image.class_name, digests[image.path], digests[image.mask] if image.mask else None)
            for image in images
        ]
        if compute_fingerprint(collection.settings, tuple(collection.class_counts), sources) != manifest.fingerprint:
            differences = _source_differences(manifest, digests)
    if not differences:
        check_shards(dataset, manifest)
    return manifest, differences


def _digests(source: Path, paths: Sequence[str]) -> dict[str, str | None]:
    def digest(path: str) -> str | None:
        try:
            return hashlib.sha256((source / path).read_bytes()).hexdigest()
        except OSError:
            return None  # as in the manifest: a file that cannot be read has no digest

    # Threads: reading and hashing both release the interpreter's lock.
    with ThreadPoolExecutor(default_workers()) as threads:
        return dict(zip(paths, threads.map(digest, paths), strict=True))


def _source_differences(manifest: Manifest, digests: dict[str, str | None]) -> list[str]:
    before = {row.path: row.sha256 for row in manifest.rows}
    before |= {row.mask: row.mask_sha256 for row in manifest.rows if row.mask}
    counts = {
        "added": len(digests.keys() - before.keys()),
        "removed": len(before.keys() - digests.keys()),
        "changed": sum(before[path] != digests[path] for path in before.keys() & digests.keys()),
    }
    return [f"source files {name}: {count}" for name, count in counts.items() if count] or ["the fingerprint"]
