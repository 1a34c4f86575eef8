"""Which images show the same thing, and how images are grouped by that. Pure; NumPy alone.

Two measures, both of thumbnails of 64 x 64 pixels and both correlations, which no change of brightness or contrast
moves:

1. of the 16 x 16 means of blocks, for every pair of images. X-rays of one projection look alike at this scale: of
   unrelated pairs one in a hundred is above 0.89. What is below COARSE_THRESHOLD is no duplicate, and that leaves few.
2. of the band of spatial frequencies from ribs to soft tissue edges, for those few. It is 0.87 and less for
   different images of one kind, and stays above 0.98 for one image that was re-encoded, resized or re-exposed.

No pair is correlated in full that a bound rules out. In any orthonormal basis, a correlation is at most the product of
the leading coordinates plus the product of the lengths of the rest (Cauchy and Schwarz). The bound of the first
measure, from 31 coordinates, is a matrix product of all with all, in blocks; that of the second, from 127, is computed
where the first leaves many pairs. What remains is nearly the near-duplicates alone, so the search finds exactly the
pairs above both thresholds. Its time grows with the square of the number of images, its memory with the number (640
bytes an image). For a hundred thousand images, half of the time is spent on what is done once for each image.
Rotated, mirrored and cropped copies are not found.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

THUMBNAIL_SIZE = 64
COARSE_SIZE = 16
COARSE_THRESHOLD = 0.97
FINE_THRESHOLD = 0.9
"""Of 9 million pairs of 4,255 real X-rays 62 are above, the next is at 0.86; of 2,000 pairs that were made of 400 of
them by JPEG (quality 40 to 95), resizing (half to 1.5 times), gain, offset (10 %) and gamma (0.9 to 1.1), all are, the
lowest at 0.98."""

_BLOCK = 1024
"""Images at a time: their products, 4 MiB, stay in a processor's cache."""
_PIECE = 256
"""Images at a time, whose thumbnails are measured."""
_SAMPLE = 256
"""Images, at most, of which the leading directions are those of the largest variance."""
_COARSE_LEADING, _FINE_LEADING = 31, 127
"""Directions: the fewer, the faster are the products, and the more pairs are left for the next step."""
_UNBOUNDED_PAIRS = 2.0
"""Pairs for each image that the first bound leaves, up to which measuring them costs less than the second bound."""
_ROUNDING = 1e-3
"""More than float32 loses in a sum of 4,096 products of unit vectors."""
_REST_ROUNDING = 1e-5
"""Likewise in the square of a length."""
_FINE_RADIUS = 4

Thumbnails = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Measure = Callable[[Thumbnails], Vectors]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images that show the same, as positions with `first` < `second`."""

    first: int
    second: int
    score: float
    """Correlation of the band-passed thumbnails; 1.0 for files of equal bytes."""


def find_duplicates(digests: Sequence[str], thumbnails: Thumbnails) -> list[Pair]:
    """All pairs of near-duplicates, and of each set of files with equal bytes the pairs with its first.

    Args:
        digests: SHA-256 of each of the N files.
        thumbnails: uint8 [N, 64, 64].

    Returns:
        Pairs, ordered.
    """
    pairs = [Pair(first, position, 1.0) for first, position in equal_pairs(digests)]
    # Of equal files one stands for all: a set of k would give k * k pairs.
    distinct = np.array(sorted({*range(len(digests))} - {pair.second for pair in pairs}), np.int64)
    pairs += (Pair(*found) for found in near_duplicates(thumbnails, distinct))
    return sorted(pairs, key=lambda pair: (pair.first, pair.second))


def near_duplicates(thumbnails: Thumbnails, among: Positions | None = None) -> list[tuple[int, int, float]]:
    """Pairs (i, j, score) of near-duplicates with i < j, in no order, for thumbnails uint8 [N, 64, 64].

    Args:
        among: Ascending positions of the images to compare; all by default.
    """
    positions = np.arange(len(thumbnails)) if among is None else among
    if not len(positions):
        return []
    coarse = _upper_bounds(thumbnails, positions, _coarse, _COARSE_LEADING)
    fine: Vectors | None = None
    if _pairs_left(coarse) > _UNBOUNDED_PAIRS:
        fine = _upper_bounds(thumbnails, positions, _fine_by_products, _FINE_LEADING)
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(positions), _BLOCK):
        rows = coarse[start : start + _BLOCK]
        for other in range(start, len(positions), _BLOCK):
            columns = coarse[other : other + _BLOCK]
            # Of a matrix, `nonzero` takes ten times as long.
            above = np.flatnonzero(rows @ columns.T > COARSE_THRESHOLD - _ROUNDING)
            left, right = above // len(columns) + start, above % len(columns) + other
            for piece in range(0, len(above), _BLOCK):
                i, j = left[piece : piece + _BLOCK], right[piece : piece + _BLOCK]
                possible = i < j
                if fine is not None:
                    possible &= _products(fine, i, j) > FINE_THRESHOLD - _ROUNDING
                pairs += _measured(thumbnails, positions[i[possible]], positions[j[possible]])
    return pairs


def _pairs_left(coarse: Vectors) -> float:
    """About how many pairs for each image the first bound leaves, by that of some images."""
    some = coarse[:: -(-len(coarse) // _BLOCK)]
    others = max(len(some) - 1, 1)
    above = np.count_nonzero(some @ some.T > COARSE_THRESHOLD - _ROUNDING) - len(some)
    return above / len(some) / others * (len(coarse) - 1) / 2


def _measured(thumbnails: Thumbnails, left: Positions, right: Positions) -> Iterator[tuple[int, int, float]]:
    """Those of the pairs that are near-duplicates, with their scores."""
    for start in range(0, len(left), _PIECE):
        i, j = left[start : start + _PIECE], right[start : start + _PIECE]
        alike = _correlations(thumbnails, i, j, _coarse) > COARSE_THRESHOLD
        i, j = i[alike], j[alike]
        scores = _correlations(thumbnails, i, j, _fine)
        keep = scores > FINE_THRESHOLD
        yield from zip(i[keep].tolist(), j[keep].tolist(), scores[keep].tolist(), strict=True)


def _correlations(thumbnails: Thumbnails, left: Positions, right: Positions, measure: Measure) -> Vectors:
    """Of each pair of images, in one of the two measures."""
    if not len(left):
        return np.empty(0, np.float32)
    images, places = np.unique([left, right], return_inverse=True)  # a copy may be in many pairs
    return _products(measure(thumbnails[images]), *places.reshape(2, -1))


def equal_pairs(keys: Iterable[str | None]) -> Iterator[tuple[int, int]]:
    """Each position with the first one that has the same key; None is no key."""
    first_of: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key is not None and first_of.setdefault(key, position) != position:
            yield first_of[key], position


def group_of(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` images the smallest position in its group: what pairs connect, directly or not."""
    parent = list(range(count))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return [root(position) for position in range(count)]


def conflicts(groups: Sequence[int], class_names: Sequence[str]) -> dict[int, list[str]]:
    """The groups whose images are in more than one class, with those classes."""
    classes: dict[int, set[str]] = defaultdict(set)
    for group, name in zip(groups, class_names, strict=True):
        classes[group].add(name)
    return {group: sorted(names) for group, names in classes.items() if len(names) > 1}


def _coarse(thumbnails: Thumbnails) -> Vectors:
    side = THUMBNAIL_SIZE // COARSE_SIZE
    # Sums of strided views: `mean` over two axes of a reshaped array takes five times as long.
    sums = thumbnails.astype(np.uint16)
    sums = sum((sums[:, start::side] for start in range(1, side)), sums[:, ::side])
    sums = sum((sums[:, :, start::side] for start in range(1, side)), sums[:, :, ::side])
    return _unit(sums.astype(np.float32) / np.float32(side**2))


def _upper_bounds(thumbnails: Thumbnails, positions: Positions, measure: Measure, leading: int) -> Vectors:
    """Vectors [N, D] whose products are at least those of what `measure` makes of the images at N `positions`.

    In any orthonormal basis a product is that of the leading coordinates and that of the rest, and the latter is at
    most the product of the rests' lengths. The basis of the largest variance leaves little in the rest.
    """
    some = measure(thumbnails[positions[:: -(-len(positions) // _SAMPLE)]])
    basis = _leading_basis(some, leading)
    bounds = np.empty((len(positions), basis.shape[1] + 1), np.float32)
    for start in range(0, len(positions), _PIECE):
        rows, block = measure(thumbnails[positions[start : start + _PIECE]]), bounds[start : start + _PIECE]
        block[:, :-1] = rows @ basis
        rest = np.einsum("nd,nd->n", rows, rows) - np.einsum("nd,nd->n", block[:, :-1], block[:, :-1])
        block[:, -1] = np.sqrt(np.maximum(rest, 0.0) + _REST_ROUNDING)
    return bounds


def _leading_basis(rows: Vectors, count: int) -> Vectors:
    """Orthonormal columns [D, K] in which `rows` [N, D] have most of their length."""
    rows = rows.astype(np.float64)
    _, directions = np.linalg.eigh(rows @ rows.T)
    # Where rows are few or alike, directions have no length: the decomposition makes them orthonormal all the same.
    basis, _ = np.linalg.qr(rows.T @ directions[:, -count:])
    return basis.astype(np.float32)


def _products(rows: Vectors, first: Positions, second: Positions) -> Vectors:
    return np.einsum("nd,nd->n", rows[first], rows[second])


def _fine(thumbnails: Thumbnails) -> Vectors:
    """What is left between two box filters, of 9 pixels and of 3."""
    pixels = thumbnails.astype(np.float32)
    return _unit(_box(pixels - _box(pixels, _FINE_RADIUS), 1))


def _fine_by_products(thumbnails: Thumbnails) -> Vectors:
    """As `_fine`, to rounding, in a third of its time."""
    pixels = thumbnails.astype(np.float32)
    pixels -= pixels.mean((1, 2), keepdims=True)  # rounding is then of the contrast
    narrow = _box_matrix(1)
    wide = narrow @ _box_matrix(_FINE_RADIUS)
    return _unit((narrow @ pixels @ narrow.T - wide @ pixels @ wide.T).astype(np.float32, copy=False))


def _box_matrix(radius: int) -> Vectors:
    """What `_box` multiplies an image's columns, and its rows, by: float32 [64, 64]."""
    around = np.arange(THUMBNAIL_SIZE)[:, None] + np.arange(-radius, radius + 1)
    return np.eye(THUMBNAIL_SIZE)[around.clip(0, THUMBNAIL_SIZE - 1)].mean(1).astype(np.float32)


def _unit(values: Vectors) -> Vectors:
    """Rows of zero mean and unit norm, so that a dot product is a correlation; zero where an image is flat."""
    rows = values.reshape(len(values), -1)
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-3 * rows.shape[1] ** 0.5)


def _box(images: Vectors, radius: int) -> Vectors:
    """Mean over squares of 2 * radius + 1 pixels; the border repeats."""
    width = 2 * radius + 1
    padded = np.pad(images, ((0, 0), (radius + 1, radius), (radius + 1, radius)), mode="edge").astype(np.float64)
    sums = padded.cumsum(1).cumsum(2)
    inner = sums[:, width:, width:] - sums[:, :-width, width:] - sums[:, width:, :-width] + sums[:, :-width, :-width]
    return (inner / width**2).astype(np.float32)
