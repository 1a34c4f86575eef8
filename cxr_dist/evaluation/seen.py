"""Which of the evaluated images the run has seen: identical files, near-duplicates, and images of its patients."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cxr_dist.data.shards import ShardSource
from cxr_dist.evaluation.assessment import Origin
from cxr_dist.evaluation.evaluated_images import EvaluatedImages, EvaluationSpec, ImageSource
from cxr_dist.runs import run_folder
from cxr_dist.runs.seen_images import read_seen
from tfrecords_builder.collection.patient_codes import key_of, names_of, patient_key
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import parse_place
from tfrecords_builder.common.pool import default_workers
from tfrecords_builder.format.manifest import Manifest, check_shards, read_manifest
from tfrecords_builder.images.thumbnails import thumbnails_of
from tfrecords_builder.remote import local_copy
from tfrecords_builder.splitting.near_duplicates import Thumbnails
from tfrecords_builder.splitting.overlap import ComparedImages, Kind, find_matches

Progress = Callable[[int, int], None]
SEEN_SPLITS = ("train", "validation")
LEAST_SIDE = 32
"""Pixels of an image, below which near-duplicates are not told from others: thumbnails have 64."""
_IMAGES_AT_A_TIME = 64


def origin_of(
    spec: EvaluationSpec, images: EvaluatedImages, info: run_folder.RunInfo, progress: Progress | None = None
) -> Origin:
    """Which of the images the run has seen; of its own training and validation split all, by the user's wish.

    Args:
        spec: What is evaluated.
        images: Of `evaluated_images`.
        info: Of the run.
        progress: Called with (images compared, images in all) while images are compared with the run's.
    """
    source, seen = images.source, read_seen(spec.run)
    patients = len(set(source.patient_names) - {None})
    if images.as_trained and spec.split in SEEN_SPLITS:
        training = np.full(source.count, spec.split == "train")
        return Origin(training, ~training, own=True, asked_for=True, patients=patients)
    if seen is None:
        return Origin(own=images.as_trained, patients=patients)
    marks = _Marks(source.count)
    for rows, split in zip(seen.mark(source.digests), SEEN_SPLITS, strict=True):
        marks.add(rows, split, Kind.IDENTICAL)
    not_compared = None
    if images.as_trained and images.manifest is not None:
        _mark_within(images.manifest, source.paths, marks)
    else:
        try:
            with _dataset_of_run(spec, info, images) as dataset:
                _mark_between(dataset, info.fingerprint, source, marks, progress)
        except UserError as error:
            not_compared = str(error)
    return marks.origin(images.as_trained, patients, not_compared)


def compared(source: ImageSource, progress: Progress | None = None, done: int = 0, total: int = 0) -> ComparedImages:
    """What the images of a source are compared by; patients as the source names them.

    Args:
        source: Its images have LEAST_SIDE pixels a side or more.
        progress: Called with (images read, images in all).
        done: Images that were read before these.
        total: Images in all.
    """
    starts = range(0, source.count, _IMAGES_AT_A_TIME)
    thumbnails: list[Thumbnails] = []

    def read(start: int) -> Thumbnails:
        rows = np.arange(start, min(start + _IMAGES_AT_A_TIME, source.count))
        return thumbnails_of([image.reshape(image.shape[:2]) for image in source.pixels(rows)])

    with ThreadPoolExecutor(default_workers()) as threads:
        for some in threads.map(read, starts):
            thumbnails.append(some)
            done += len(some)
            if progress is not None:
                progress(done, total)
    names = [frozenset() if name is None else frozenset({name}) for name in source.patient_names]
    return ComparedImages(source.digests.tolist(), names, np.concatenate([thumbnails_of([]), *thumbnails]))


def comparable(first: ComparedImages, second: ComparedImages) -> tuple[ComparedImages, ComparedImages]:
    """Both with patients under comparable names: those in clear have their code too where the other has codes."""

    def coded(images: ComparedImages) -> bool:
        return any(key_of(name) for names in images.patients for name in names)

    if coded(first) == coded(second):
        return first, second
    key = patient_key()

    def named(images: ComparedImages) -> ComparedImages:
        patients = [frozenset[str]().union(*(names_of(name, key) for name in names)) for names in images.patients]
        return ComparedImages(images.digests, patients, images.thumbnails)

    return named(first), named(second)


class _Marks:
    """By which split of the run, and in what, each of N images was seen."""

    def __init__(self, count: int) -> None:
        self._seen = {split: np.zeros(count, np.bool_) for split in SEEN_SPLITS}
        self._kind = {kind: np.zeros(count, np.bool_) for kind in Kind}

    def add(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_] | int, split: str, kind: Kind) -> None:
        self._seen[split][rows] = True
        self._kind[kind][rows] = True

    def origin(self, own: bool, patients: int, not_compared: str | None) -> Origin:
        """An image counts once: as training before validation, and in what it agrees most."""
        counted = np.zeros_like(self._seen["train"])
        kinds: dict[str, int] = {}
        for kind, rows in self._kind.items():
            kinds[kind] = int((rows & ~counted).sum())
            counted |= rows
        training, validation = (self._seen[split] for split in SEEN_SPLITS)
        return Origin(
            training, validation & ~training, own=own, patients=patients, kinds=kinds, not_compared=not_compared
        )


def _mark_within(manifest: Manifest, paths: list[str], marks: _Marks) -> None:
    """By what the build has found in the dataset itself; a leak-free split has nothing."""
    table = manifest.table
    splits, patients = table["split"].to_pylist(), table["patient"].to_pylist()
    row_of = {path: row for row, path in enumerate(table["path"].to_pylist())}
    image_of = {row_of[path]: image for image, path in enumerate(paths)}
    for first, second, _ in manifest.duplicates:
        for row, other in ((first, second), (second, first)):
            if row in image_of and splits[other] in SEEN_SPLITS:
                marks.add(image_of[row], splits[other], Kind.NEAR_DUPLICATE)
    for split in SEEN_SPLITS:
        known = {patient for patient, of in zip(patients, splits, strict=True) if of == split} - {None}
        rows = [image for row, image in image_of.items() if patients[row] in known]
        marks.add(np.array(rows, np.int64), split, Kind.PATIENT)


def _dataset_of_run(
    spec: EvaluationSpec, info: run_folder.RunInfo, images: EvaluatedImages
) -> AbstractContextManager[Path]:
    """The dataset that the run was trained on.

    Raises:
        UserError: it is not at hand. An address is opened only if the user names it: the run may come from others.
    """
    if info.image_size < LEAST_SIDE:
        raise UserError(f"the images have fewer than {LEAST_SIDE} pixels a side")
    given = spec.dataset if images.manifest is None else None
    place = given or parse_place(info.dataset)
    if given is None and not isinstance(place, Path):
        raise UserError(f"the run's dataset, {place}, is not on this machine; give it with --dataset")
    if isinstance(place, Path) and not place.exists():
        raise UserError(f"the run's dataset, {place}, does not exist; give its new location with --dataset")
    return local_copy(place)


def _mark_between(
    dataset: Path, fingerprint: str, source: ImageSource, marks: _Marks, progress: Progress | None
) -> None:
    """By comparing every image with those of the run's dataset, which is known by its fingerprint."""
    manifest = read_manifest(dataset)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{dataset} is not the dataset that the run was trained on")
    check_shards(dataset, manifest)
    sources = {split: ShardSource(dataset, manifest, split) for split in SEEN_SPLITS}
    total = source.count + sum(of.count for of in sources.values())
    evaluated, done = compared(source, progress, 0, total), source.count
    for split, of in sources.items():
        known = compared(of, progress, done, total)
        done += of.count
        for match in find_matches(*comparable(known, evaluated)):
            marks.add(match.second, split, match.kind)
