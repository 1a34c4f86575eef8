"""Which images show the same thing, and how images are grouped by that. Pure; NumPy alone.

Two measures, both of thumbnails of 64 x 64 pixels and both correlations, which no change of brightness or contrast
moves:

1. of the 16 x 16 means of blocks, for every pair of images. X-rays of one projection look alike at this scale: most
   unrelated pairs are above 0.8. What is below COARSE_THRESHOLD is no duplicate, and that leaves few.
2. of the band of spatial frequencies from ribs to soft tissue edges, for those few. It is 0.87 and less for
   different images of one kind, and stays above 0.98 for one image that was re-encoded, resized or re-exposed.

The first is a matrix product, in blocks: time grows with the square of the number of images (a second for twenty
thousand), memory with the number. The product is not of all 256 numbers, but of the 31 in which X-rays differ most and
the length of the rest, which bounds the correlation from above (Cauchy and Schwarz); the few pairs that the bound
leaves are correlated in full. Rotated, mirrored and cropped copies are not found.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
_LEADING = 31
_ROUNDING = 1e-4
"""More than float32 loses in a sum of 256 products of unit vectors."""
_FINE_RADIUS = 4

Thumbnails = npt.NDArray[np.uint8]


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
    different = thumbnails if len(distinct) == len(thumbnails) else thumbnails[distinct]  # indexing copies
    for left, right, score in near_duplicates(different):
        pairs.append(Pair(int(distinct[left]), int(distinct[right]), score))
    return sorted(pairs, key=lambda pair: (pair.first, pair.second))


def near_duplicates(thumbnails: Thumbnails) -> list[tuple[int, int, float]]:
    """Pairs (i, j, score) of near-duplicates with i < j, in no order, for thumbnails uint8 [N, 64, 64]."""
    blocks = (thumbnails[start : start + _BLOCK] for start in range(0, len(thumbnails), _BLOCK))
    coarse = np.concatenate([_coarse(block) for block in blocks] or [np.empty((0, 1), np.float32)])
    bounds = _upper_bounds(coarse)
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(coarse), _BLOCK):
        rows = bounds[start : start + _BLOCK]
        for other in range(start, len(coarse), _BLOCK):
            columns = bounds[other : other + _BLOCK]
            # Of a matrix, `nonzero` takes ten times as long.
            above = np.flatnonzero(rows @ columns.T > COARSE_THRESHOLD - _ROUNDING)
            left, right = above // len(columns) + start, above % len(columns) + other
            left, right = left[left < right], right[left < right]
            for piece in range(0, len(left), _BLOCK):
                i, j = left[piece : piece + _BLOCK], right[piece : piece + _BLOCK]
                alike = np.einsum("nd,nd->n", coarse[i], coarse[j]) > COARSE_THRESHOLD
                i, j = i[alike], j[alike]
                if not len(i):
                    continue
                scores = np.einsum("nd,nd->n", _fine(thumbnails[i]), _fine(thumbnails[j]))
                keep = scores > FINE_THRESHOLD
                pairs += zip(i[keep].tolist(), j[keep].tolist(), scores[keep].tolist(), strict=True)
    return pairs


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


def _coarse(thumbnails: Thumbnails) -> npt.NDArray[np.float32]:
    side = THUMBNAIL_SIZE // COARSE_SIZE
    # Sums of strided views: `mean` over two axes of a reshaped array takes five times as long.
    sums = thumbnails.astype(np.uint16)
    sums = sum((sums[:, start::side] for start in range(1, side)), sums[:, ::side])
    sums = sum((sums[:, :, start::side] for start in range(1, side)), sums[:, :, ::side])
    return _unit(sums.astype(np.float32) / np.float32(side**2))


def _upper_bounds(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors [N, 32] whose products are at least those of the unit vectors `rows` [N, D].

    In any orthonormal basis a product is that of the leading coordinates and that of the rest, and the latter is at
    most the product of the rests' lengths. The basis of the largest variance leaves little in the rest.
    """
    if rows.shape[1] <= _LEADING + 1:
        return rows
    some = rows[:: max(1, len(rows) // _BLOCK)].astype(np.float64)
    _, basis = np.linalg.eigh(some.T @ some)
    leading = rows @ basis[:, -_LEADING:].astype(np.float32)
    rest = np.sqrt(np.maximum(np.einsum("nd,nd->n", rows, rows) - np.einsum("nd,nd->n", leading, leading), 0.0))
    return np.concatenate([leading, rest[:, None]], axis=1)


def _fine(thumbnails: Thumbnails) -> npt.NDArray[np.float32]:
    """What is left between two box filters, of 9 pixels and of 3."""
    pixels = thumbnails.astype(np.float32)
    return _unit(_box(pixels - _box(pixels, _FINE_RADIUS), 1))


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of zero mean and unit norm, so that a dot product is a correlation; zero where an image is flat."""
    rows = values.reshape(len(values), -1)
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-3 * rows.shape[1] ** 0.5)


def _box(images: npt.NDArray[np.float32], radius: int) -> npt.NDArray[np.float32]:
    """Mean over squares of 2 * radius + 1 pixels; the border repeats."""
    width = 2 * radius + 1
    padded = np.pad(images, ((0, 0), (radius + 1, radius), (radius + 1, radius)), mode="edge").astype(np.float64)
    sums = padded.cumsum(1).cumsum(2)
    inner = sums[:, width:, width:] - sums[:, :-width, width:] - sums[:, width:, :-width] + sums[:, :-width, :-width]
    return (inner / width**2).astype(np.float32)
