"""Images of one collection that are in another: between datasets, runs and folders of images."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cxr_dist.data.shards import ShardSource
from cxr_dist.evaluation.seen import LEAST_SIDE, SEEN_SPLITS, comparable, compared
from cxr_dist.runs import run_folder
from cxr_dist.runs.seen_images import digests_of
from tfrecords_builder.collection.patient_codes import key_of
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place, parse_place
from tfrecords_builder.folder_images import read_folder
from tfrecords_builder.format.manifest import MANIFEST_NAME, check_shards, read_manifest
from tfrecords_builder.remote import local_copy
from tfrecords_builder.splitting.overlap import ComparedImages, Kind, Match, find_matches
from tfrecords_builder.splitting.splits import SPLITS

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class ComparedCollection:
    """A dataset, a run or a folder, as it is compared."""

    name: str
    kind: str
    paths: Sequence[str]
    """Of its images, which are whole."""
    images: ComparedImages
    damaged: Sequence[tuple[str, str]] = field(default_factory=list)
    """Path and reason of each file that was left out."""

    @property
    def patients(self) -> int:
        """How many patients are named."""
        return len(set().union(*self.images.patients))


@dataclass(frozen=True, eq=False)
class Leaks:
    """What of the second collection is in the first."""

    first: ComparedCollection
    second: ComparedCollection
    matches: Sequence[Match]
    patients_comparable: bool
    """False where patients are coded by keys that the two have not in common."""

    def count(self, kind: Kind) -> int:
        """Images of the second that agree so with one of the first."""
        return sum(match.kind == kind for match in self.matches)

    @property
    def leaked(self) -> int:
        """Images of the second that agree with one of the first in anything."""
        return len({match.second for match in self.matches})

    @property
    def patients(self) -> int:
        """Patients of the second that are in the first."""
        rows = [match.second for match in self.matches if match.kind == Kind.PATIENT]
        return len({min(self.second.images.patients[row]) for row in rows})

    def numbers(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            **{
                name: {
                    "name": of.name,
                    "kind": of.kind,
                    "images": len(of.paths),
                    "patients": of.patients,
                    "damaged": [{"path": path, "reason": reason} for path, reason in of.damaged],
                }
                for name, of in (("first", self.first), ("second", self.second))
            },
            "leaked": self.leaked,
            "identical": self.count(Kind.IDENTICAL),
            "near_duplicates": self.count(Kind.NEAR_DUPLICATE),
            "same_patient": self.count(Kind.PATIENT),
            "patients": self.patients,
            "patients_comparable": self.patients_comparable,
            "matches": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each match: path (in the second), kind, match (in the first), score."""
        return [
            {
                "path": self.second.paths[match.second],
                "kind": str(match.kind),
                "match": self.first.paths[match.first],
                "score": None if match.score is None else round(match.score, 4),
            }
            for match in self.matches
        ]

    def table(self) -> bytes:
        """The rows as CSV, which `build --exclude` takes for the second collection."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["path", "kind", "match", "score"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue().encode()


def find_leaks(first: Place, second: Place, progress: Callable[[str], Any]) -> Leaks:
    """Compare all images of two collections.

    Args:
        first, second: A dataset, the folder of a run (its training and validation images), or a folder of images.
        progress: Gives a context manager of a `Progress` for the name of a collection.

    Raises:
        UserError: a place is none of these, or something in it is damaged or not at hand.
    """
    read = []
    for place in (first, second):
        with progress(str(place)) as update:
            read.append(_read(place, update))
    one, other = comparable(read[0].images, read[1].images)
    keys, others = _keys(one), _keys(other)
    return Leaks(read[0], read[1], find_matches(one, other), not keys or not others or bool(keys & others))


def _keys(images: ComparedImages) -> set[str | None]:
    """Names of the keys that patients are coded by; None of those in clear."""
    return {key_of(name) for names in images.patients for name in names}


def _read(place: Place, progress: Progress) -> ComparedCollection:
    if isinstance(place, str) or (place / MANIFEST_NAME).is_file():
        with local_copy(place) as dataset:
            return _read_dataset(str(place), "dataset", dataset, SPLITS, progress)
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give a dataset, a run, or a folder of images")
    if (place / run_folder.RUN).is_file():
        with _dataset_of(place) as dataset:
            return _read_dataset(str(place), "run", dataset, SEEN_SPLITS, progress)
    found = read_folder(place, progress)
    names = [frozenset() if patient is None else frozenset({patient}) for patient in found.patients]
    images = ComparedImages(digests_of(found.sha256).tolist(), names, found.thumbnails)
    return ComparedCollection(str(place), "folder", found.paths, images, found.damaged)


@contextmanager
def _dataset_of(run: Path) -> Iterator[Path]:
    info = run_folder.read_info(run)
    place = parse_place(info.dataset)
    if not isinstance(place, Path) or not place.exists():
        where = "is not on this machine" if isinstance(place, str) else "does not exist"
        raise UserError(f"{run}: was trained on {place}, which {where}; give the dataset itself in place of the run")
    if read_manifest(place).fingerprint != info.fingerprint:
        raise UserError(
            f"{run}: {place} is not the dataset that the run was trained on; give the dataset itself in place of the "
            "run"
        )
    yield place


def _read_dataset(name: str, kind: str, dataset: Path, splits: Sequence[str], progress: Progress) -> ComparedCollection:
    manifest = read_manifest(dataset)
    check_shards(dataset, manifest)
    if manifest.image_size < LEAST_SIDE:
        raise UserError(
            f"{name}: near-duplicates are not found in images of {manifest.image_size} pixels; rebuild the dataset "
            f"with --image-size {LEAST_SIDE} or more, or give the folder of its images"
        )
    sources = [ShardSource(dataset, manifest, split) for split in splits]
    total = sum(source.count for source in sources)
    parts: list[ComparedImages] = []
    for source in sources:
        parts.append(compared(source, progress, sum(len(part.digests) for part in parts), total))
    return ComparedCollection(
        name,
        kind,
        [path for source in sources for path in source.paths],
        ComparedImages(
            [digest for part in parts for digest in part.digests],
            [names for part in parts for names in part.patients],
            np.concatenate([part.thumbnails for part in parts]),
        ),
    )
