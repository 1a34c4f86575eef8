"""A run's folder: who may write there, and what says what the run is."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.loading import load_config
from cxr_dist.config.schema import Config
from cxr_dist.runs.checkpoints import CheckpointFolder
from cxr_dist.runs.heartbeat import HEARTBEATS
from cxr_dist.runs.seen_images import SEEN, write_seen
from cxr_dist.runs.stop_request import REGROUP, STOP, StopRequest
from cxr_dist.runs.versions import FORMAT, check_format, differences
from tfrecords_builder.common import locks
from tfrecords_builder.common.errors import UserError, reading
from tfrecords_builder.common.files import is_temporary, write_json, write_text
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.common.places import Place, absolute
from tfrecords_builder.format.manifest import Manifest

CONFIG = "config.yaml"
RUN = "run.json"
HISTORY = "history.jsonl"
RESULT = "result.json"
MODEL = "model.keras"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged.json"
EVENTS = "events.jsonl"
TENSORBOARD = "tensorboard"
TRAIN_AGAIN = "train the run again"
FEATURE_CACHE = "feature-cache"
"""Beside the runs, which share it."""


@dataclass(frozen=True)
class OpenDataset:
    """A dataset that a process reads."""

    place: Place
    """As it was given: a folder or an address."""
    folder: Path
    """On this machine."""
    manifest: Manifest


@dataclass(frozen=True)
class RunInfo:
    """What a run was trained on: all that an evaluation needs beside the model."""

    dataset: str
    """Its folder, absolute, or its address."""
    fingerprint: str
    class_names: tuple[str, ...]
    image_size: int


def resolve_config(config: Config, manifest: Manifest) -> Config:
    """Fill in what depends on the dataset.

    Raises:
        UserError: the image size is not the dataset's.
    """
    size = config.model.image_size
    if size not in (None, manifest.image_size):
        raise UserError(
            f"model.image_size {size}: the dataset holds images of {manifest.image_size} pixels; "
            f"leave the key out, or build the dataset with --image-size {size}"
        )
    if manifest.image_size < 32:
        raise UserError(
            f"the dataset's images of {manifest.image_size} pixels are too small; ResNet50 needs at least 32"
        )
    weights = config.model.weights
    if weights not in ("imagenet", "none"):
        weights = str(Path(weights).expanduser().resolve())  # a worker's working folder is another one
    model = config.model.model_copy(update={"image_size": manifest.image_size, "weights": weights})
    features = config.features
    if features.folder is not None:
        features = features.model_copy(update={"folder": str(Path(features.folder).expanduser().resolve())})
    return config.model_copy(update={"model": model, "features": features})


def feature_cache(config: Config, run: Path) -> Path:
    """The folder of the run's feature cache: as configured, or beside the run."""
    return Path(config.features.folder) if config.features.folder else run.parent / FEATURE_CACHE


@contextmanager
def locked(run: Path, wait_s: float = 0.0) -> Iterator[None]:
    """The run's folder, made if need be, held against other processes that would train into it.

    Args:
        run: The folder.
        wait_s: How long to wait for such a process, at most.

    Raises:
        UserError: the folder cannot be made, or another process holds it.
    """
    busy = "another process is training into it; wait for it, or give another --out"
    with ExitStack() as held:
        with _writable(run):
            held.enter_context(locks.held_folder(run, busy, wait_s))
        yield


def prepare(run: Path, config: Config, dataset: Place, manifest: Manifest) -> None:
    """Begin a new run in its folder, or accept that of an interrupted one with the same settings.

    While no epoch is done, other settings are no obstacle: what was wrong with the first ones may have been mended.

    Raises:
        UserError: the folder holds something else, or a run with other settings or other data.
    """
    info = RunInfo(absolute(dataset), manifest.fingerprint, manifest.class_names, manifest.image_size)
    if (run / CONFIG).is_file() and (run / RUN).is_file():
        if (run / RESULT).exists() or any((run / CHECKPOINTS).glob("epoch-*.safetensors")):
            _check_same(run, config, info)
            _tidy(run)
            return
    elif run.is_dir() and not _is_begun(run):
        raise UserError(f"{run}: contains other files than a run; give a new folder as --out")
    with _writable(run):
        _tidy(run)
        (run / DAMAGED).unlink(missing_ok=True)  # it was decided for the settings and the data of before
        write_text(run / CONFIG, config.to_yaml())
        write_seen(run, manifest)
        write_json(run / RUN, {"format": FORMAT, **asdict(info), "made_with": []})


@contextmanager
def _writable(run: Path) -> Iterator[None]:
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; give a folder for the run")
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run}: cannot be written ({error.strerror}); give a folder that you can write to as --out"
        ) from None


def _tidy(run: Path) -> None:
    """Remove what an earlier start left: files that it was killed while it wrote, and a request to stop.

    From here on such a request is of this start, however early it comes.
    """
    StopRequest(run).clear()
    for path in run.glob(".*"):
        if is_temporary(path.name, (CONFIG, RUN, SEEN, HISTORY, RESULT, MODEL, DAMAGED)):
            path.unlink(missing_ok=True)
        elif path.name.startswith(f".{MODEL}.") and path.is_dir():  # the folder in which Keras writes it
            shutil.rmtree(path, ignore_errors=True)


def _is_begun(run: Path) -> bool:
    """Whether the folder holds nothing but what a run may have left that was stopped at its start."""
    path = run / CONFIG
    try:
        if path.is_file() and load_config(path).to_yaml().encode() != path.read_bytes():
            return False  # a configuration that somebody wrote: `prepare` writes every key, and nothing else
    except UserError:
        return False
    return all(
        entry.name in (CONFIG, SEEN, EVENTS, STOP, REGROUP, HEARTBEATS, TENSORBOARD, LOCK)
        or is_temporary(entry.name, (CONFIG, RUN, SEEN))
        for entry in run.iterdir()
    )


def _check_same(run: Path, config: Config, info: RunInfo) -> None:
    trained = read_info(run)
    earlier = read_config(run)
    if earlier != config:
        key, before, now = _first_difference(earlier.tree(), config.tree())
        raise UserError(
            f"{run}: holds a run with {key} {before}, not {now}; give another --out, or the same settings to resume"
        )
    if trained.fingerprint != info.fingerprint:
        raise UserError(f"{run}: holds a run on {other_dataset(trained.dataset, info.dataset)}; give another --out")


def other_dataset(before: str, now: str) -> str:
    """In words, a dataset at `before` that differs from the one at `now`: both are absolute paths, or addresses."""
    return f"the dataset {now} as it was before it was rebuilt" if before == now else f"another dataset ({before})"


def _first_difference(before: Any, now: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """The first key whose values differ: (dotted key, value before, value now)."""
    key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
    left, right, name = before.get(key), now.get(key), f"{prefix}{key}"
    if isinstance(left, dict) and isinstance(right, dict):
        return _first_difference(left, right, f"{name}.")
    return name, left, right


def read_config(run: Path) -> Config:
    """The resolved configuration of a run."""
    _require(run, CONFIG)
    return load_config(run / CONFIG)


def read_info(run: Path) -> RunInfo:
    """What run.json says of the dataset.

    Raises:
        FormatError: the run is of another format.
        UserError: there is no run, or its file is damaged.
    """
    with reading(run / RUN, TRAIN_AGAIN):
        raw = _read_run(run)
        return RunInfo(raw["dataset"], raw["fingerprint"], tuple(raw["class_names"]), int(raw["image_size"]))


def _read_run(run: Path) -> dict[str, Any]:
    _require(run, RUN)
    raw: dict[str, Any] = json.loads((run / RUN).read_text(encoding="utf-8"))
    check_format(run / RUN, raw)
    return raw


def record_versions(run: Path, versions: Mapping[str, str]) -> list[str]:
    """Add the versions that a run is trained with to `made_with` in run.json, where they differ from the last ones.

    Args:
        run: Its folder, as `prepare` made it.
        versions: Of `versions.made_with`.

    Returns:
        What differs from the last ones, for people.

    Raises:
        UserError: as `read_info`.
    """
    with reading(run / RUN, TRAIN_AGAIN):
        raw = _read_run(run)
        last = raw["made_with"][-1] if raw["made_with"] else {}
        changed = differences(last, versions)
    if last != versions:
        write_json(run / RUN, raw | {"made_with": [*raw["made_with"], versions]})
    return changed


def read_history(run: Path) -> list[dict[str, Any]]:
    """The rows of history.jsonl; none when no epoch has ended."""
    path = run / HISTORY
    if not path.is_file():
        return []
    with reading(path, TRAIN_AGAIN):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_result(run: Path) -> dict[str, Any] | None:
    """result.json of a finished run, None before."""
    path = run / RESULT
    if not path.is_file():
        return None
    with reading(path, TRAIN_AGAIN):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result


def finished_result(run: Path) -> dict[str, Any]:
    """result.json of a run whose process has ended well.

    Raises:
        RuntimeError: there is none.
    """
    result = read_result(run)
    if result is None:
        raise RuntimeError(f"{run}: ended without a result")
    return result


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says of a model that is whole."""

    folder: Path
    config: Config
    info: RunInfo
    result: dict[str, Any]


def read_finished(run: Path) -> FinishedRun:
    """The run in a folder; reads no weights.

    Raises:
        UserError: the folder is that of no run, or of one that has not ended.
    """
    info, config, result = read_info(run), read_config(run), read_result(run)
    if result is None or weights_file(run) is None:
        raise UserError(f"{run}: the run is not finished; resume it with cxr-dist train")
    return FinishedRun(run, config, info, result)


def weights_file(run: Path) -> Path | None:
    """`resnet.keras`, or the best weights of a trial whose model was removed (`search.keep`); None where neither is."""
    model = run / MODEL
    return model if model.is_file() else CheckpointFolder(run / CHECKPOINTS).newest_best()


def write_history(run: Path, history: list[dict[str, Any]]) -> None:
    write_text(run / HISTORY, "".join(json.dumps(row, allow_nan=False) + "\n" for row in history))


def _require(run: Path, name: str) -> None:
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the folder of a run")
    if not (run / name).is_file():
        raise UserError(f"{run}: is not the folder of a run (no {name}); give the --out of cxr-dist train")
