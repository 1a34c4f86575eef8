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
_SOME_ROWS = 16
_BLOCK = 1 << 15
"""Samples that are scaled at a time: their intermediate results stay in the processor's cache."""

Range = tuple[int, int]
Samples = npt.NDArray[np.integer]


def declared_range(bits: int, signed: bool = False) -> Range:
    """The least and the most that samples of so many bits can be."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def shown_range(samples: Samples, bits: int, signed: bool = False) -> Range:
    """The samples that are shown black and white; the declared range, but for a picture that uses little of it."""
    ends = declared_range(bits, signed)
    if bits - _SPARE_BITS < _FEWEST_BITS or samples[::_SOME_ROWS].max() >> (bits - _SPARE_BITS) > 0:
        return ends  # most pictures: without looking at all of their samples
    least, most = int(samples.min()), int(samples.max())
    while bits - _SPARE_BITS >= _FEWEST_BITS:
        bits -= _SPARE_BITS
        fewer = [declared_range(bits), *([declared_range(bits, signed)] if signed else [])]
        fitting = [(low, high) for low, high in fewer if low <= least and most <= high]
        if not fitting:
            break
        ends = fitting[0]
    return ends


def scaled(samples: Samples, factor: float, offset: float, clip: bool = False) -> npt.NDArray[np.uint8]:
    """`factor` times `samples` [H, W] plus `offset`, as the nearest gray level.

    Args:
        clip: Whether results may lie outside of 0 to 255.
    """
    rows, columns = samples.shape
    step = max(1, _BLOCK // columns)
    gray = np.empty(samples.shape, np.uint8)
    levels = np.empty((min(step, rows), columns), np.float32)
    for start in range(0, rows, step):
        block = levels[: min(step, rows - start)]
        block[...] = samples[start : start + step]
        block *= np.float32(factor)
        block += np.float32(offset + 0.5)
        if clip:
            np.clip(block, 0, 255, out=block)
        gray[start : start + step] = block
    return gray


def scaled_to(samples: Samples, ends: Range) -> npt.NDArray[np.uint8]:
    """Likewise of samples within `ends`, which become black and white."""
    low, high = ends
    return scaled(samples, 255 / (high - low), -255 * low / (high - low))
