"""Random numbers that a run depends on: pure functions of a purpose and some numbers, the same with every NumPy.

NumPy promises the raw bits of a bit generator across versions, and not what `numpy.random.Generator` makes of them
(NEP 19). So what decides a run takes raw bits and its own arithmetic: `permutation` and `uniform`. `generator` is for
what decides only a figure. Every use names its purpose, so no two uses share a stream.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def permutation(count: int, purpose: str, *numbers: int) -> npt.NDArray[np.int64]:
    """The positions 0 to `count` - 1 in random order: int64 [count].

    The positions are sorted by random keys. Key and position share 64 bits, so all are distinct and the result does
    not depend on the sorting algorithm. A key has b = 64 - ceil(log2(count)) bits. Two positions have the same key,
    and are then in ascending order, with probability 2^-b: one pair in a million permutations of 20,000 positions, 45
    pairs in each permutation of ten million. All else is uniform.
    """
    position_bits = np.uint64(max(count - 1, 0).bit_length())
    keys = _bits(purpose, *numbers).random_raw(count)
    keys >>= position_bits
    keys <<= position_bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << position_bits) - np.uint64(1)
    return keys.view(np.int64)


def uniform(shape: tuple[int, ...], purpose: str, *numbers: int) -> npt.NDArray[np.float32]:
    """Numbers in [-1, 1), multiples of 2^-23: float32 [*shape]."""
    raw: npt.NDArray[np.uint64] = _bits(purpose, *numbers).random_raw(shape)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """NumPy's own generator, whose numbers may change with NumPy: for figures, and for nothing that decides a run."""
    return np.random.Generator(_bits(purpose, *numbers))


def _bits(purpose: str, *numbers: int) -> np.random.Philox:
    """A counter-based generator (Salmon et al. 2011) with a key of its own for each purpose and numbers."""
    digest = hashlib.sha256("\0".join([purpose, *map(str, numbers)]).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))
