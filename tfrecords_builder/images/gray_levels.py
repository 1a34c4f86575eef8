"""Samples of more than 8 bits to gray levels: one rule for PNG, TIFF and DICOM, in `build` and `predict` alike.

Black and white are the ends of the range that the file declares, and not the darkest and the brightest pixel, which
would make the result depend on the content. One exception: detectors of 12 bits are often stored as if they had 16. A
picture that uses at most a sixteenth of its range, so that the upper four bits say nothing, is shown with the range of
four bits less, and again, as long as 8 bits are left. It depends on the picture alone: not on its class, nor on others.
"""

import numpy as np
import numpy.typing as npt

_SPARE_BITS = 4
_FEWEST_BITS = 8
_BLOCK = 1 << 16
"""Samples that are scaled at a time: their intermediate results stay in the processor's cache."""

Range = tuple[int, int]
Samples = npt.NDArray[np.integer]


def declared_range(bits: int, signed: bool = False) -> Range:
    """The least and the most that samples of so many bits can be."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def shown_range(samples: Samples, bits: int, signed: bool = False) -> Range:
    """The samples that are shown black and white; the declared range, but for a picture that uses little of it."""
    least, most = int(samples.min()), int(samples.max())
    ends = declared_range(bits, signed)
    while bits - _SPARE_BITS >= _FEWEST_BITS:
        bits -= _SPARE_BITS
        fewer = [declared_range(bits), *([declared_range(bits, signed)] if signed else [])]
        fitting = [(low, high) for low, high in fewer if low <= least and most <= high]
        if not fitting:
            break
        ends = fitting[0]
    return ends


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Rows of a picture, few enough at a time for the cache."""
    step = max(1, _BLOCK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def scaled(samples: Samples, ends: Range) -> npt.NDArray[np.uint8]:
    """Gray levels, uint8 [H, W], of samples [H, W] within `ends`: the nearest."""
    low, high = ends
    factor, offset = np.float32(255 / (high - low)), np.float32(0.5 - 255 * low / (high - low))
    gray = np.empty(samples.shape, np.uint8)
    for block in row_blocks(*samples.shape):
        levels = samples[block].astype(np.float32)
        levels *= factor
        levels += offset
        gray[block] = levels
    return gray
