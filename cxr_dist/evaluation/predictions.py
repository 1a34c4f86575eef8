"""Predictions for labelled images, and the Parquet file that holds them."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import write_bytes

PROBABILITY_PREFIX = "prob_"
"""Column of a class's probability in the predictions file: this, then the class name."""

ROW_SUM_TOLERANCE = 1e-4
"""A float32 softmax sums to one within about 1e-6; a row further off than this is no probability vector."""

_MARK = {b"cxr_dist.file": b"predictions"}


# Rows that already sum to one this closely are left alone, so that reading what was written changes nothing.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the classifier said about N images of C classes. Every image occurs once.

    Attributes:
        paths: N distinct paths, as the manifest or the image folder names them.
        labels: int32 [N], the true class as an index into `class_names`.
        probabilities: float64 [N, C], rows sum to one. Any float dtype is accepted; it is kept in float64,
            each row divided by its sum, since float32 rows sum to one only within 1e-6.
        class_names: C >= 2 distinct names; the position is the label.
        groups: N names, equal for images that are not independent (copies, one patient); None where unknown.

    Raises:
        ValueError: shapes that do not fit, no image at all, an image twice, a label outside the classes,
            a probability that is not finite or negative, a row that does not sum to one within 1e-4.
    """

    paths: list[str]
    labels: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    class_names: tuple[str, ...]
    groups: list[str] | None = None

    def __post_init__(self) -> None:
        names = tuple(self.class_names)
        paths = [str(path) for path in self.paths]
        labels = np.asarray(self.labels)
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"class_names must be two or more distinct names, not {names}")
        if not paths:
            raise ValueError("no predictions: metrics of no image are undefined")
        if len(set(paths)) != len(paths):
            raise ValueError(f"every image counts once, but {_first_repeated(paths)!r} occurs more than once")
        if labels.shape != (len(paths),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be integers [{len(paths)}], not {labels.dtype} {list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= len(names):
            raise ValueError(f"labels must lie in 0..{len(names) - 1}, not {labels.min()}..{labels.max()}")
        if self.groups is not None and len(self.groups) != len(paths):
            raise ValueError(f"groups must be {len(paths)} names, not {len(self.groups)}")
        probabilities = _normalised(self.probabilities, (len(paths), len(names)))
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "labels", labels.astype(np.int32))
        object.__setattr__(self, "probabilities", probabilities)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def predicted(self) -> npt.NDArray[np.int32]:
        """int32 [N]: the most probable class; of several, the one with the lowest index."""
        return np.argmax(self.probabilities, axis=1).astype(np.int32)

    def subset(self, chosen: npt.NDArray[np.bool_]) -> "Predictions":
        """Those of the images that bool [N] says; at least one."""
        rows = np.flatnonzero(chosen)
        return replace(
            self,
            paths=[self.paths[row] for row in rows],
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            groups=None if self.groups is None else [self.groups[row] for row in rows],
        )


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write `predictions` as Parquet: path, label, predicted (int32), group where known, prob_<Class>... (float64)."""
    columns: dict[str, pa.Array] = {
        "path": pa.array(predictions.paths, pa.string()),
        "label": pa.array(predictions.labels, pa.int32()),
        "predicted": pa.array(predictions.predicted, pa.int32()),
    }
    if predictions.groups is not None:
        columns["group"] = pa.array(predictions.groups, pa.string())
    for index, name in enumerate(predictions.class_names):
        columns[PROBABILITY_PREFIX + name] = pa.array(predictions.probabilities[:, index], pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(_MARK), buffer)
    write_bytes(path, buffer.getvalue())


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, bit for bit.

    Raises:
        UserError: the file is missing, or is not a predictions file.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        names = [name for name in table.column_names if name.startswith(PROBABILITY_PREFIX)]
        return Predictions(
            paths=table["path"].to_pylist(),
            labels=table["label"].to_numpy(),
            probabilities=np.stack([table[name].to_numpy() for name in names], axis=1),
            class_names=tuple(name.removeprefix(PROBABILITY_PREFIX) for name in names),
            groups=table["group"].to_pylist() if "group" in table.column_names else None,
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the predictions.parquet of an evaluation") from error
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a predictions file of an evaluation ({one_line(error)}); run cxr-dist evaluate again"
        ) from error


def is_predictions_file(path: Path) -> bool:
    """Whether `path` is a file that `write_predictions` wrote (its mark is read, not its rows)."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return _MARK.items() <= metadata.items()


def _normalised(values: npt.ArrayLike, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    probabilities = np.array(values, np.float64)
    if probabilities.shape != shape:
        raise ValueError(f"probabilities must be {list(shape)}, not {list(probabilities.shape)}")
    if not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise ValueError("probabilities must be finite and not negative")
    sums = probabilities.sum(axis=1, keepdims=True)
    worst = np.abs(sums - 1).max()
    if worst > ROW_SUM_TOLERANCE:
        raise ValueError(f"each row of probabilities must sum to 1; the worst is off by {worst:.3g}")
    return np.where(np.abs(sums - 1) > _ROUNDING, probabilities / sums, probabilities)


def _first_repeated(paths: list[str]) -> str:
    seen: set[str] = set()
    return next(path for path in paths if path in seen or seen.add(path))  # type: ignore[func-returns-value]
