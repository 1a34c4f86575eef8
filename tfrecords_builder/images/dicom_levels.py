"""Stored values of a DICOM picture to the gray levels that a viewer would show at first.

They go through the modality LUT or rescale slope and intercept, then through the first VOI LUT or window, and are
inverted once where MONOCHROME1 or the presentation LUT shape INVERSE says that the least is white (DICOM PS3.3,
C.7.6.3, C.11.1, C.11.2 and C.11.6). Without a window, black and white are as `gray_levels` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.images.decoded import SmallRange
from tfrecords_builder.images.gray_levels import Range, declared_range, scaled, shown_range

Values = npt.NDArray[Any]


_Step = Callable[[Values], Values]
"""Values to float32."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """The step that multiplies and adds."""

    factor: float
    offset: float

    def __call__(self, values: Values) -> Values:
        return values.astype(np.float32) * np.float32(self.factor) + np.float32(self.offset)

    def then(self, following: "_Linear") -> "_Linear":
        """Both as one."""
        return _Linear(self.factor * following.factor, self.offset * following.factor + following.offset)


def shown(stored: Values, dataset: Any) -> tuple[npt.NDArray[np.uint8], SmallRange | None]:
    """uint8 [H, W] of the stored values of a gray picture, and whether it was stretched.

    Raises:
        ValueError: An element makes no sense.
    """
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation"))
    ends = declared = declared_range(bits, signed)
    voi = _voi(dataset)
    within = voi is None and not dataset.get("ModalityLUTSequence")
    if within:
        ends = shown_range(stored, bits, signed)
    modality, low, high = _modality(dataset, ends)
    show = voi or _Linear(1 / (high - low), -low / (high - low))
    # MONOCHROME1 comes with INVERSE (C.8.11.3): both say the same once.
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE"
    to_levels = _Linear(-255, 255) if inverted else _Linear(255, 0)
    if isinstance(modality, _Linear) and isinstance(show, _Linear):
        step = modality.then(show).then(to_levels)
        gray = scaled(stored, step.factor, step.offset, clip=not within)
    else:
        gray = scaled(show(modality(stored)), to_levels.factor, to_levels.offset, clip=True)
    return gray, None if ends == declared else SmallRange.STRETCHED


def _modality(dataset: Any, ends: Range) -> tuple[_Step, float, float]:
    """Stored values to those of the modality, and the least and most of these at the `ends` of the stored values."""
    if dataset.get("ModalityLUTSequence"):
        look_up, depth = _table(dataset.ModalityLUTSequence[0])
        return look_up, 0.0, float(2**depth - 1)
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    if slope == 0:
        raise ValueError("all values are one")
    low, high = sorted(end * slope + intercept for end in ends)
    return _Linear(slope, intercept), low, high


def _voi(dataset: Any) -> _Step | None:
    """Values of the modality to 0 to 1 and beyond, by the first VOI LUT or window; None when the file has neither."""
    if dataset.get("VOILUTSequence"):
        look_up, depth = _table(dataset.VOILUTSequence[0])
        return lambda values: look_up(np.rint(values)) / np.float32(2**depth - 1)
    if dataset.get("WindowCenter") in (None, "") or dataset.get("WindowWidth") in (None, ""):
        return None
    center, width = _number(dataset, "WindowCenter", 0.0), _number(dataset, "WindowWidth", 0.0)
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise ValueError("a window must be wide")
    if function == "SIGMOID":
        return lambda values: _sigmoid(-4 * (values - np.float32(center)) / np.float32(width))
    if function == "LINEAR_EXACT":
        return _Linear(1 / width, 0.5 - center / width)
    if width == 1:
        return lambda values: (values > center - 0.5).astype(np.float32)
    return _Linear(1 / (width - 1), 0.5 - (center - 0.5) / (width - 1))


def _sigmoid(values: Values) -> Values:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(values))


def _table(lut: Any) -> tuple[_Step, int]:
    """Values to the entries of a LUT, and their bits (PS3.3, C.11.1.1)."""
    entries, first, depth = (int(value) for value in lut.LUTDescriptor)
    data = lut.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.atleast_1d(np.asarray(data, np.int64))
    table = table[: entries or 1 << 16].astype(np.float32)
    if not len(table) or not 8 <= depth <= 16:
        raise ValueError("the table is empty")
    return lambda values: table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)], depth


def _number(dataset: Any, name: str, default: float) -> float:
    """The first value of an element; it may have several."""
    value = dataset.get(name)
    if value is None or value == "":
        return default
    number = float(np.atleast_1d(np.asarray(value, np.float64))[0])
    if not np.isfinite(number):
        raise ValueError("a number is not finite")
    return number
