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
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tfrecords_builder import plan
from tfrecords_builder.collection.find import SourceImage, class_counts, list_source, read_split_file
from tfrecords_builder.collection.metadata import Metadata, examine_metadata, metadata_digest
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
from tfrecords_builder.images.decode import DECODERS, ImageError
from tfrecords_builder.splitting import splits
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE
from tfrecords_builder.writing import output_folder, parts
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
class BuildSummary:
    """What a build made, or found made already."""

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
    *,
    image_size: int = 224,
    encoding: str = "raw",
    workers: int | None = None,
    seed: int = 0,
    split: str = "leak-free",
    split_file: Path | None = None,
    conflicts: str | None = None,
    masks: str = "read",
    on_error: str = "stop",
    progress: Progress | None = None,
    pool: Workers | None = None,
) -> BuildSummary:
    """Build the dataset of the images in `source` into the folder `dataset`.

    A folder that holds this very dataset already is left as it is. One that holds a dataset of other settings or other
    images is built anew; what it held stays whole until the new shards are. A build that was stopped goes on. Anything
    else in the folder is an error and is not touched.

    Args:
        source: Holds one folder per class; see `find.list_source`.
        dataset: The output folder: absent, empty, or of an earlier build.
        image_size: Side of the stored images in pixels.
        encoding: raw, png or jpeg; see `schema`.
        workers: Processes; None is one per processor.
        seed: Of the split and the order of records.
        split: leak-free (near-duplicates and images of a patient stay in one split) or published (image by image).
        split_file: CSV with the columns path and split, in place of a rule.
        conflicts: What becomes of near-duplicates in several classes: exclude or keep. None excludes them
            unless `split` is published.
        masks: What becomes of lung masks: read or ignore.
        on_error: What a file that is no whole image does: "stop" ends the build, "skip" lists the file. With "skip",
            a class may also lose more than 1 % of its pictures to other formats and the like; see `list_source`.
        progress: Called with (images decoded, images in all), from the calling thread.
        pool: Where the work is done, in place of processes of this machine.

    Raises:
        ImageError: With on_error "stop", the first file (by path) that is no whole image.
        UserError: Anything else that the user can mend; see the message.
    """
    started = time.perf_counter()
    conflicts = conflicts or ("keep" if split == "published" else "exclude")
    _check_options(image_size, encoding, workers, split, conflicts, masks, on_error)
    listing = list_source(source, on_error, masks)
    found = listing.images
    classes = class_counts(found)
    _check_classes(source, classes)
    given, rule = None, split
    if split_file is not None:
        given, digest = read_split_file(split_file, {image.path for image in found})
        rule = f"file:{digest}"
    metadata, notes = examine_metadata(source, found)
    has_masks = any(image.mask for image in found)
    settings = Settings(image_size, encoding, seed, rule, conflicts, has_masks, metadata_digest(metadata))
    with output_folder.locked_folder(dataset):
        present, changes = _existing(source, dataset, settings, found)
        if present is not None and not changes:
            if on_error == "stop" and present.rejected:
                path, reason = present.rejected[0]
                raise ImageError(source / path, reason)
            output_folder.remove_work(dataset)
            manifest = replace(present, not_taken=listing.not_taken, notes=(*listing.notes, *notes))
            if (manifest.not_taken, manifest.notes) != (present.not_taken, present.notes):
                write_manifest(dataset, manifest)  # the same dataset, of a folder that holds other files beside it
        else:
            with output_folder.work_folder(dataset) as work:
                tasks = _ingest_tasks(source, work, settings, found, on_error)
                with _workers(pool, min(workers or default_workers(), len(tasks))) as used:
                    known, thumbnails = _ingest(source, tasks, found, metadata, used, progress)
                    manifest = _write(source, work, settings, known, thumbnails, given, used)
                manifest = replace(manifest, not_taken=listing.not_taken, notes=(*listing.notes, *notes))
                output_folder.publish(dataset, work, manifest)
    reused = present is not None and not changes
    seconds = time.perf_counter() - started
    rate = 0.0 if reused else len(manifest.rows) / seconds
    return BuildSummary(manifest, seconds, rate, reused, tuple(changes))


@contextmanager
def _workers(pool: Workers | None, workers: int) -> Iterator[Workers]:
    if pool is not None:
        yield pool
        return
    with Pool(workers) as own:
        yield own


def _check_options(
    image_size: int, encoding: str, workers: int | None, split: str, conflicts: str, masks: str, on_error: str
) -> None:
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image-size: must be from 1 to {MAX_IMAGE_SIZE} pixels, not {image_size}")
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    for name, value, known in (
        ("encoding", encoding, ENCODINGS),
        ("split", split, splits.RULES),
        ("conflicts", conflicts, CONFLICTS),
        ("masks", masks, MASKS),
        ("on-error", on_error, ON_ERROR),
    ):
        if value not in known:
            raise UserError(f"{name}: must be one of {', '.join(known)}, not '{value}'")


def _check_classes(source: Path, classes: dict[str, int], rejected: Counter[str] | None = None) -> None:
    """`classes`: images by class, of which `rejected` (by class) do not count."""
    if len(classes) < 2:
        raise UserError(f"{source}: holds one class only, '{next(iter(classes))}'; at least two are needed")
    for name, count in classes.items():
        lost = rejected[name] if rejected else 0
        if count - lost < splits.MIN_IMAGES_PER_CLASS:
            without = f" (without {lost} rejected)" if lost else ""
            raise UserError(
                f"{source}: class '{name}' has {count - lost} images{without}; at least "
                f"{splits.MIN_IMAGES_PER_CLASS} are needed, one for every split: add images or remove the class"
            )


def _ingest_tasks(
    source: Path, work: Path, settings: Settings, found: Sequence[SourceImage], on_error: str
) -> list[IngestTask]:
    key = json.dumps([FORMAT_VERSION, settings.image_size, settings.encoding, THUMBNAIL_SIZE, DECODERS])
    files = [
        _source_file(source, image.path, _source_file(source, image.mask) if image.mask else None) for image in found
    ]
    size = parts.images_per_part(len(files))
    return [
        IngestTask(
            source=source,
            files=files[start : start + size],
            folder=work,
            number=number,
            key=key,
            image_size=settings.image_size,
            encoding=settings.encoding,
            stop_at_reject=on_error == "stop",
        )
        for number, start in enumerate(range(0, len(files), size))
    ]


def _source_file(source: Path, path: str, mask: parts.SourceFile | None = None) -> parts.SourceFile:
    try:
        status = os.stat(f"{source}/{path}")  # noqa: PTH116 - by a Path, ten thousand take a tenth of a second more
    except OSError:
        return parts.SourceFile(path, -1, -1, mask)  # reading it says what is wrong
    return parts.SourceFile(path, status.st_size, status.st_mtime_ns, mask)


def _ingest(
    source: Path,
    tasks: Sequence[IngestTask],
    found: Sequence[SourceImage],
    metadata: Mapping[str, Metadata],
    pool: Workers,
    progress: Progress | None,
) -> tuple[list[plan.Known], npt.NDArray[np.uint8]]:
    """The first pass: every source file as it was found, and the thumbnails of the whole ones."""
    image_of = {image.path: image for image in found}
    label_of = {name: label for label, name in enumerate(class_counts(list(found)))}
    parts.remove_other_parts(tasks[0].folder, len(tasks))
    known: list[plan.Known] = []
    thumbnails = []
    for done in pool.map(ingest, tasks):
        if done.part is None:
            last = done.images[-1]
            raise ImageError(source / last.path, last.reason or "")
        thumbnails.append(done.part.thumbnails())
        for image in done.images:
            of = image_of[image.path]
            about = metadata.get(image.path, Metadata())
            known.append(plan.Known(image, done.part.data.name, of.class_name, label_of[of.class_name], about, of.mask))
        if progress is not None:
            progress(len(known), len(found))
    return known, np.concatenate(thumbnails)


def _write(
    source: Path,
    work: Path,
    settings: Settings,
    known: Sequence[plan.Known],
    thumbnails: npt.NDArray[np.uint8],
    given: Mapping[str, str] | None,
    pool: Workers,
) -> Manifest:
    """The second pass: every shard, in `work`; the manifest that goes with them."""
    lost = Counter(item.class_name for item in known if item.image.reason is not None)
    classes = dict(sorted(Counter(item.class_name for item in known).items()))
    _check_classes(source, classes, lost)
    decision = plan.decide(known, thumbnails, settings, given)
    _check_splits(source, known, decision)
    planned = plan.plan_shards(work, known, decision.split_of, settings)
    written = list(pool.map(write_shard, [task for _, task in planned]))
    rows = plan.manifest_rows(known, decision, list(zip((task for _, task in planned), written, strict=True)))
    return Manifest(
        class_names=tuple(classes),
        settings=settings,
        fingerprint=compute_fingerprint(
            settings, tuple(classes), [(row.path, row.class_name, row.sha256, row.mask_sha256) for row in rows]
        ),
        shards=tuple(
            ShardInfo(shard.name, split, len(task.items), shard.bytes, shard.sha256)
            for (split, task), shard in zip(planned, written, strict=True)
        ),
        rows=rows,
        duplicates=decision.duplicates,
        created_with=DECODERS,
    )


def _check_splits(source: Path, known: Sequence[plan.Known], decision: plan.Decision) -> None:
    """Every class has an image in every split."""
    present = {(item.class_name, decision.split_of.get(item.image.path)) for item in known}
    for name in sorted({item.class_name for item in known}):
        for split in splits.SPLITS:
            if (name, split) not in present:
                raise UserError(
                    f"{source}: class '{name}' has no image for the {split} split (near-duplicates and a patient's "
                    "images stay together, and excluded images do not count); add images or give another split"
                )


def _existing(
    source: Path, dataset: Path, settings: Settings, found: Sequence[SourceImage]
) -> tuple[Manifest | None, list[str]]:
    """The manifest of the dataset that is there, and how it differs from the one that was asked for."""
    if not (dataset / MANIFEST_NAME).exists():
        return None, []
    manifest = read_manifest(dataset)
    wanted, present = asdict(settings), asdict(manifest.settings)
    differences = [f"{name} {present[name]} -> {wanted[name]}" for name in wanted if wanted[name] != present[name]]
    if not differences:
        # Only now are the source files read: equal settings are no proof of equal images.
        digests = _digests(source, [path for image in found for path in (image.path, image.mask) if path])
        sources = [
            (image.path, image.class_name, digests[image.path], digests[image.mask] if image.mask else None)
            for image in found
        ]
        if compute_fingerprint(settings, tuple(class_counts(list(found))), sources) != manifest.fingerprint:
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
