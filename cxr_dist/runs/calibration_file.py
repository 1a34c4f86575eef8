"""`calibration.json` in a run's folder: what makes honest probabilities of its logits, and when not to answer.

`cxr-dist calibrate` writes it; here it is read and checked. Probabilities are softmax(logits / temperature) (Guo et al.
2017), and an answer whose highest probability is below `abstain_threshold` is not given. The threshold was chosen on
images that also chose the model: it does not guarantee the risk (see `calibration`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cxr_dist.config.schema import first_problem
from tfrecords_builder.common.errors import reading

CALIBRATION = "calibration.json"
TEMPERATURES = (1e-3, 1e3)
"""Beyond these, float32 has no finite logits left, or no difference between them."""


@dataclass(frozen=True)
class Calibration:
    """How logits become answers."""

    temperature: float = 1.0
    abstain_threshold: float = 0.0
    """0 gives every answer, and infinity none: no answer was sure enough for the risk that was asked for."""


class _Fitted(BaseModel):
    model_config = ConfigDict(strict=True)
    temperature: float = Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])
    abstain_threshold: float | None = Field(ge=0, le=1)
    target_risk: float = Field(gt=0, lt=1)


def read_calibration(run: Path) -> Calibration | None:
    """What the run was calibrated to; None when it was not. Raises as `read_fitted` does."""
    raw = read_fitted(run)
    if raw is None:
        return None
    threshold = raw["abstain_threshold"]
    return Calibration(float(raw["temperature"]), math.inf if threshold is None else float(threshold))


def read_fitted(run: Path) -> dict[str, Any] | None:
    """The file as it was written (see `calibration.fit`); None when there is none.

    Raises:
        UserError: the file is there, and is damaged or of another form.
    """
    path = run / CALIBRATION
    if not path.exists():
        return None
    with reading(path, "run `cxr-dist calibrate` again, or remove the file"):
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        try:
            _Fitted.model_validate(raw)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None
        return raw
