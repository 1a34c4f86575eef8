"""Build a dataset: source images in, shards and a manifest out.

Two parallel passes. The first decodes, resizes and encodes every image once, into spool files inside the
output folder; the second copies the encoded images from the spool into shards. Splits are exact over the
accepted images, and which are accepted is known only when all are decoded: without the spool, each image
would be decoded twice, or again whenever one was rejected. Copying costs a fraction of decoding, and for a
while the disk holds the images twice. (Whatever else must see all images before they are divided, such
as a search for duplicates, belongs between the passes.)

The bytes of the dataset depend on the source and the settings alone, not on the number of workers.

While it is built, a dataset is a folder with `.cxr-build` in it and no manifest. Shards are written there,
renamed into place, and the manifest comes last; so a build that was killed is never taken for a dataset, and
the next build into the same folder knows what it may remove.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL

from tfrecords_builder import splits
from tfrecords_builder.errors import UserError
from tfrecords_builder.images import ImageError
from tfrecords_builder.manifest import (
    ACCEPTED,
    MANIFEST_NAME,
    REJECTED,
    Manifest,
    Row,
    Settings,
    ShardInfo,
    check_shards,
    compute_fingerprint,
    fsync_folder,
    read_manifest,
    write_manifest,
)
from tfrecords_builder.pool import Pool, default_workers
from tfrecords_builder.schema import ENCODINGS
from tfrecords_builder.sharding import is_shard_name, shard_bounds, shard_count, shard_name
from tfrecords_builder.sources import SourceImage, class_counts, find_images
from tfrecords_builder.writer import (
    IngestTask,
    ShardItem,
    ShardTask,
    SpooledImage,
    ingest,
    write_shard,
)

WORK_FOLDER = ".cxr-build"
"""Holds a build in progress, inside the output folder."""

MAX_IMAGE_SIZE = 4096
ON_ERROR = ("stop", "skip")

_IMAGES_PER_TASK = 32
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """What a build made, or found made already."""

    counts: dict[str, dict[str, int]]
    """Images by split, then by class."""
    rejected: list[tuple[str, str]]
    """Path and reason of each source file that is not in the dataset."""
    shards: tuple[ShardInfo, ...]
    seconds: float
    images_per_second: float
    """Source images decoded per second of the whole build; 0 when there was nothing to do."""
    fingerprint: str
    reused: bool
    """True when the folder already held this dataset, so that nothing was written."""


def build_dataset(
    source: Path,
    dataset: Path,
    *,
    image_size: int = 224,
    encoding: str = "raw",
    workers: int | None = None,
    seed: int = 0,
    on_error: str = "stop",
    progress: Progress | None = None,
) -> BuildSummary:
    """Build the dataset of the images in `source` into the folder `dataset`.

    A folder that holds this very dataset already is left as it is; what a killed build left is replaced;
    anything else in the folder is an error and is not touched.

    Args:
        source: Holds one folder per class; see `sources.find_images`.
        dataset: The output folder: absent, empty, or of an earlier build.
        image_size: Side of the stored images in pixels.
        encoding: raw, png or jpeg; see `schema`.
        workers: Processes; None is one per processor.
        seed: Of the split and the order of records.
        on_error: What a file that is no whole image does: "stop" ends the build, "skip" lists the file.
        progress: Called with (images decoded, images in all), from the calling thread.

    Raises:
        ImageError: With on_error "stop", the first file (by path) that is no whole image.
        UserError: Anything else that the user can mend; see the message.
    """
    started = time.perf_counter()
    _check_options(image_size, encoding, workers, on_error)
    settings = Settings(image_size=image_size, encoding=encoding, seed=seed, split_rule=splits.RULE)
    found = find_images(source)
    classes = class_counts(found)
    _check_classes(source, classes)
    with _locked_folder(dataset):
        reused = (dataset / MANIFEST_NAME).exists()
        if reused:
            manifest = _existing(source, dataset, settings, found, on_error)
        else:
            with _work_folder(dataset) as work:
                manifest = _build(source, work, settings, found, on_error, workers, progress)
                _publish(dataset, work, manifest)
    seconds = time.perf_counter() - started
    return BuildSummary(
        counts=manifest.counts,
        rejected=manifest.rejected,
        shards=manifest.shards,
        seconds=seconds,
        images_per_second=0.0 if reused else len(manifest.rows) / seconds,
        fingerprint=manifest.fingerprint,
        reused=reused,
    )


def _check_options(image_size: int, encoding: str, workers: int | None, on_error: str) -> None:
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image-size: must be from 1 to {MAX_IMAGE_SIZE} pixels, not {image_size}")
    if encoding not in ENCODINGS:
        raise UserError(f"encoding: must be one of {', '.join(ENCODINGS)}, not '{encoding}'")
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    if on_error not in ON_ERROR:
        raise UserError(f"on-error: must be one of {', '.join(ON_ERROR)}, not '{on_error}'")


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


def _build(
    source: Path,
    work: Path,
    settings: Settings,
    found: Sequence[SourceImage],
    on_error: str,
    workers: int | None,
    progress: Progress | None,
) -> Manifest:
    """Write every shard into `work`; the manifest that goes with them."""
    class_of = {image.path: image.class_name for image in found}
    classes = class_counts(list(found))
    tasks = [
        IngestTask(
            source=source,
            paths=[image.path for image in found[start : start + _IMAGES_PER_TASK]],
            spool_folder=work,
            image_size=settings.image_size,
            encoding=settings.encoding,
            stop_at_reject=on_error == "stop",
        )
        for start in range(0, len(found), _IMAGES_PER_TASK)
    ]
    with Pool(min(workers or default_workers(), len(tasks))) as pool:
        spooled: list[SpooledImage] = []
        for part in pool.map(ingest, tasks):
            spooled += part
            if on_error == "stop" and (last := part[-1]).reason is not None:
                raise ImageError(source / last.path, last.reason)
            if progress is not None:
                progress(len(spooled), len(found))
        rejected = Counter(class_of[image.path] for image in spooled if image.reason is not None)
        _check_classes(source, classes, rejected)
        split_of = splits.assign_splits(
            {image.path: class_of[image.path] for image in spooled if image.reason is None}, settings.seed
        )
        label_of = {name: label for label, name in enumerate(classes)}
        shard_tasks = plan_shards(
            work, spooled, split_of, {path: label_of[name] for path, name in class_of.items()}, settings.seed
        )
        written = list(pool.map(write_shard, [task for _, task in shard_tasks]))
    places: dict[str, tuple[str, int, int, int]] = {}
    for (_, task), shard in zip(shard_tasks, written, strict=True):
        for number, item in enumerate(task.items):
            places[item.path] = (shard.name, number, shard.offsets[number], shard.lengths[number])
    rows = tuple(
        _row(image, class_of[image.path], label_of[class_of[image.path]], split_of, places) for image in spooled
    )
    return Manifest(
        class_names=tuple(classes),
        settings=settings,
        fingerprint=compute_fingerprint(
            settings, tuple(classes), [(row.path, row.class_name, row.sha256) for row in rows]
        ),
        shards=tuple(
            ShardInfo(shard.name, split, len(task.items), shard.bytes, shard.sha256)
            for (split, task), shard in zip(shard_tasks, written, strict=True)
        ),
        rows=rows,
        created_with={"pillow": PIL.__version__},
    )


def plan_shards(
    work: Path, spooled: Sequence[SpooledImage], split_of: dict[str, str], label_of: dict[str, int], seed: int
) -> list[tuple[str, ShardTask]]:
    """Which record goes where: (split, shard) for every shard, in order. Touches no file.

    Inside a split, records follow `splits.stable_order`, so that every shard holds a mixture of the classes.

    Args:
        work: Holds the spool, and gets the shards.
        spooled: Every source image, in the order of the manifest.
        split_of: Split of every accepted image, by path.
        label_of: Label of every image, by path.
        seed: Of the order of the records.
    """
    row_of = {image.path: (index, image) for index, image in enumerate(spooled)}
    plan: list[tuple[str, ShardTask]] = []
    for split in splits.SPLITS:
        paths = splits.stable_order([path for path, of in split_of.items() if of == split], seed)
        count = shard_count(len(paths), sum(row_of[path][1].length for path in paths))
        for number, (start, stop) in enumerate(shard_bounds(len(paths), count)):
            items = []
            for path in paths[start:stop]:
                index, image = row_of[path]
                items.append(ShardItem(image.spool, image.offset, image.length, label_of[path], path, index))
            plan.append((split, ShardTask(work, shard_name(split, number, count), work, items)))
    return plan


def _row(
    image: SpooledImage,
    class_name: str,
    label: int,
    split_of: dict[str, str],
    places: dict[str, tuple[str, int, int, int]],
) -> Row:
    shard, index, offset, length = places.get(image.path, (None, None, None, None))
    return Row(
        path=image.path,
        class_name=class_name,
        label=label,
        split=split_of.get(image.path),
        group=image.path,
        sha256=image.sha256,
        width=image.width,
        height=image.height,
        status=ACCEPTED if image.reason is None else REJECTED,
        reason=image.reason,
        shard=shard,
        index=index,
        offset=offset,
        length=length,
    )


def _publish(dataset: Path, work: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        (work / shard.name).rename(dataset / shard.name)
    # The names must be on the disk before the manifest that vouches for them.
    fsync_folder(dataset)
    write_manifest(dataset, manifest)


def _existing(source: Path, dataset: Path, settings: Settings, found: Sequence[SourceImage], on_error: str) -> Manifest:
    """The manifest of the dataset that is there already, when it is the one that was asked for."""
    manifest = read_manifest(dataset)
    wanted, present = asdict(settings), asdict(manifest.settings)
    differences = [f"{name} {present[name]} -> {wanted[name]}" for name in wanted if wanted[name] != present[name]]
    if not differences:
        # Only now are the source files read: equal settings are no proof of equal images.
        digests = _digests(source, [image.path for image in found])
        sources = [(image.path, image.class_name, digests[image.path]) for image in found]
        if compute_fingerprint(settings, tuple(class_counts(list(found))), sources) != manifest.fingerprint:
            differences = _source_differences(manifest, digests)
    if differences:
        raise UserError(
            f"{dataset}: already holds another dataset ({'; '.join(differences)}); give another output folder"
        )
    check_shards(dataset, manifest)
    if on_error == "stop" and manifest.rejected:
        path, reason = manifest.rejected[0]
        raise ImageError(source / path, reason)
    if (dataset / WORK_FOLDER).exists():  # killed between the manifest and the end
        shutil.rmtree(dataset / WORK_FOLDER)
    return manifest


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
    counts = {
        "added": len(digests.keys() - before.keys()),
        "removed": len(before.keys() - digests.keys()),
        "changed": sum(before[path] != digests[path] for path in before.keys() & digests.keys()),
    }
    return [f"source images {name}: {count}" for name, count in counts.items() if count] or ["the fingerprint"]


@contextmanager
def _locked_folder(dataset: Path) -> Iterator[None]:
    """The output folder, made if need be, held against other builds; gone again if a failed build made it."""
    created = not dataset.exists()
    with _explained(dataset):
        try:
            dataset.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{dataset}: is not a folder; give another output folder") from error
        descriptor = os.open(dataset, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{dataset}: another build is writing here; wait for it or give another output folder"
                ) from error
            yield
        finally:
            os.close(descriptor)
            if created and not any(dataset.iterdir()):
                dataset.rmdir()


@contextmanager
def _work_folder(dataset: Path) -> Iterator[Path]:
    """An empty work folder; on any error the output folder is left as empty as it was found.

    Raises:
        UserError: The output folder holds what no unfinished build left.
    """
    work = dataset / WORK_FOLDER
    names = {path.name for path in dataset.iterdir()}
    # Without the work folder, even a file with a shard's name was not left by a build that was killed.
    foreign = sorted(name for name in names - {WORK_FOLDER} if WORK_FOLDER not in names or not _is_ours(name))
    if foreign:
        raise UserError(f"{dataset}: is not empty and no dataset (it holds '{foreign[0]}'); give another output folder")
    _remove_build(dataset)
    work.mkdir()
    try:
        yield work
    except BaseException:
        if not (dataset / MANIFEST_NAME).exists():
            _remove_build(dataset)
        raise
    shutil.rmtree(work)


def _is_ours(name: str) -> bool:
    return is_shard_name(name) or name == f".{MANIFEST_NAME}.part"


def _remove_build(dataset: Path) -> None:
    """Remove an unfinished build; the work folder last, as it is what marks the rest as ours."""
    for path in list(dataset.iterdir()):
        if _is_ours(path.name):
            path.unlink()
    if (dataset / WORK_FOLDER).exists():
        shutil.rmtree(dataset / WORK_FOLDER)


@contextmanager
def _explained(dataset: Path) -> Iterator[None]:
    """Turn what the user can mend about the output folder into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{dataset}: cannot be written ({error.strerror}); mend that or give another output folder"
            ) from error
        raise
