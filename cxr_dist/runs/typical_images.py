"""`typical.json` in a run's folder: what its training images have in common, to notice a picture that is unlike them.

A network assigns a class to any picture. The numbers here tell a rotated or inverted X-ray, a blank image, a photograph
or a screenshot from the training images. They do not tell whether a chest X-ray shows something else than the classes.
The file holds medians and weights over all sampled images, and no image of a patient.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfrecords_builder.common.errors import reading
from tfrecords_builder.common.files import write_bytes
from tfrecords_builder.common.seal import read_sealed_json, sealed_json
from tfrecords_builder.eda.typical import Measurements, Typical, reasons

TYPICAL = "typical.json"
SAMPLE = 1000
"""Training images that are measured at most: a second."""
UNLIKE_SHARE = 0.01
LEAST_SCORE = 4.0
"""An image is unlike the training images if its score is above that of all but this share of them, and above this."""

Images = npt.NDArray[np.uint8]
_ARRAYS = ("thumbnail", "weights", "centers", "spreads")


@dataclass(frozen=True, eq=False)
class TypicalImages:
    """What images are compared with."""

    typical: Typical
    threshold: float
    """The largest z-score of an image that is like them."""

    @classmethod
    def fit(cls, images: Images) -> "TypicalImages":
        """Of training images uint8 [N, S, S], N > 0."""
        measured = Measurements.of(list(images))
        typical = Typical.fit(measured)
        largest = typical.scores(measured).max(1)
        return cls(typical, max(LEAST_SCORE, float(np.quantile(largest, 1 - UNLIKE_SHARE))))

    def unlike(self, images: Images) -> list[str | None]:
        """For each of uint8 [B, S, S] in what it is unlike the training images; None where it is like them."""
        if not len(images):
            return []
        scores, named = self.typical.scores(Measurements.of(list(images))), reasons()
        return [named[row.argmax()] if row.max() > self.threshold else None for row in scores]


def write_typical(run: Path, images: Images) -> None:
    """Write the file of a run whose training images, or a sample of them, are uint8 [N, S, S]."""
    found = TypicalImages.fit(images)
    arrays: dict[str, Any] = {name: getattr(found.typical, name).astype(float).tolist() for name in _ARRAYS}
    arrays["spreads"] = [None if math.isinf(value) else value for value in arrays["spreads"]]
    write_bytes(run / TYPICAL, sealed_json({"images": len(images), "threshold": found.threshold, **arrays}))


def read_typical(run: Path) -> TypicalImages | None:
    """What `write_typical` wrote; None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = run / TYPICAL
    if not path.exists():
        return None
    with reading(path, "restore the file, or train the run again"):
        raw = read_sealed_json(path)
        spreads = [math.inf if value is None else value for value in raw["spreads"]]
        arrays = {name: np.array(raw[name], np.float32) for name in _ARRAYS if name != "spreads"}
        return TypicalImages(Typical(**arrays, spreads=np.array(spreads, np.float32)), float(raw["threshold"]))
