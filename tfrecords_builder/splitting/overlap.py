"""Which images of one collection are in another: identical files, near-duplicates, images of one patient. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from tfrecords_builder.splitting.near_duplicates import Thumbnails, near_duplicates


class Kind(StrEnum):
    """In what two images agree, the strongest first."""

    IDENTICAL = "identical"
    NEAR_DUPLICATE = "near-duplicate"
    PATIENT = "patient"


@dataclass(frozen=True, eq=False)
class ComparedImages:
    """What N images are compared by."""

    digests: Sequence[int]
    """[N]: equal for files of equal bytes."""
    patients: Sequence[frozenset[str]]
    """[N]: every name of the image's patient; empty where it is unknown."""
    thumbnails: Thumbnails
    """uint8 [N, 64, 64]."""


class Match(NamedTuple):
    """An image of the second collection and one of the first, as positions."""

    second: int
    first: int
    kind: Kind
    score: float | None = None
    """Of a near-duplicate: the correlation of the band-passed thumbnails."""


def find_matches(first: ComparedImages, second: ComparedImages) -> list[Match]:
    """For each image of `second` its match in `first`, one of each kind at most, ordered by image and kind.

    Of several near-duplicates the most alike is given, else the earliest. An image with an identical file is not
    compared further, but by its patient.
    """
    matches = [Match(image, other, Kind.IDENTICAL) for image, other in _equal(first.digests, second.digests)]
    identical = {match.second for match in matches}
    others = [image for image in range(len(second.digests)) if image not in identical]
    for image, (score, other) in _closest(first.thumbnails, second.thumbnails[others]).items():
        matches.append(Match(others[image], other, Kind.NEAR_DUPLICATE, score))
    matches += [Match(image, other, Kind.PATIENT) for image, other in _same_patient(first.patients, second.patients)]
    kinds = list(Kind)
    return sorted(matches, key=lambda match: (match.second, kinds.index(match.kind)))


def _equal(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int]]:
    place = {digest: position for position, digest in reversed(list(enumerate(first)))}
    return ((position, place[digest]) for position, digest in enumerate(second) if digest in place)


def _closest(first: Thumbnails, second: Thumbnails) -> dict[int, tuple[float, int]]:
    """Of each image of `second` that has near-duplicates in `first`: the highest score, and whose it is."""
    if not len(first) or not len(second):
        return {}
    closest: dict[int, tuple[float, int]] = {}
    for left, right, score in near_duplicates(np.concatenate([first, second])):
        if left < len(first) <= right:
            known, other = closest.get(right - len(first), (-1.0, 0))
            if (score, -left) > (known, -other):
                closest[right - len(first)] = score, left
    return closest


def _same_patient(first: Iterable[frozenset[str]], second: Iterable[frozenset[str]]) -> Iterator[tuple[int, int]]:
    place: dict[str, int] = {}
    for position, names in enumerate(first):
        for name in names:
            place.setdefault(name, position)
    for position, names in enumerate(second):
        if known := [place[name] for name in names if name in place]:
            yield position, min(known)
