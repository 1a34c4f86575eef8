"""How many bytes a run or a search will need on the disk at most, and a refusal before it starts."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from cxr_dist.config.schema import Config, StageConfig
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import bytes_below

_FLOAT = 4
BASE_PARAMETERS = 23_587_712
"""Of ResNet50 without top."""
UPPER_PARAMETERS = {0: 0, 10: 4_471_808, 20: 8_943_616, 32: 14_998_528}
"""Of its upper layers, by their number; what trains more than 32 layers is counted as all of it."""
HEAD_PARAMETERS = 540_000
"""With room for 16 classes."""
MODEL_BYTES = _FLOAT * (BASE_PARAMETERS + HEAD_PARAMETERS) + 1_000_000
_FEATURE_BYTES = 2048 * _FLOAT
_SLOTS = {"adam": 2, "adamw": 2, "sgd": 1}
"""Numbers that an optimizer keeps of each weight."""


@dataclass(frozen=True)
class Needed:
    """Bytes at the moment that takes most."""

    run: int
    cache: int
    """Of the feature cache: pooled features alone, as the cache itself decides about larger tensors."""


def trained_bytes(unfreeze_layers: int) -> int:
    """Of the head and so many upper layers of the base, at most."""
    upper = next((count for layers, count in UPPER_PARAMETERS.items() if unfreeze_layers <= layers), BASE_PARAMETERS)
    return _FLOAT * (HEAD_PARAMETERS + upper)


def needed_by_run(config: Config, images: int) -> Needed:
    """What a run writes, and `images` of training and validation in the feature cache."""
    changed = largest = 0
    for stage in _stages(config):
        trained = trained_bytes(stage.unfreeze_layers)
        changed = max(changed, trained)
        copies = _SLOTS[stage.optimizer] + (stage.ema_decay is not None)
        largest = max(largest, changed + copies * trained)
    # Of each checkpoint, the one being written too, the best weights of its time; the model twice while it is saved.
    checkpoints = _FLOAT * BASE_PARAMETERS + (config.checkpoint.keep + 1) * (largest + changed)
    return Needed(checkpoints + 2 * MODEL_BYTES, cache_bytes(config, images))


def cache_bytes(config: Config, images: int) -> int:
    """Of the pooled features that stages of the head read, within `cache.limit_gb`."""
    if config.features.cache == "off":
        return 0
    heads = [stage for stage in _stages(config) if not stage.unfreeze_layers]
    views = {config.features.augmented_copies if stage.augment else 1 for stage in heads}
    return min(int(config.features.limit_gb * 1e9), images * _FEATURE_BYTES * sum(views))


def needed_by_search(config: Config, images: int, *, trials: int, concurrent: int, keep: int) -> Needed:
    """What a search writes.

    Args:
        config: Of its largest trial.
        images: Of training and validation.
        trials: In all.
        concurrent: At a time.
        keep: Of how many the model is kept.
    """
    one = needed_by_run(config, images)
    changed = max(trained_bytes(stage.unfreeze_layers) for stage in _stages(config))
    return Needed(concurrent * one.run + keep * MODEL_BYTES + trials * changed, one.cache)


def _stages(config: Config) -> list[StageConfig]:
    return [stage for stage in config.stages.values() if stage.epochs]


def check_space(out: Path, cache: Path, needed: Needed) -> None:
    """Refuse what the disk cannot hold; what the folders hold already is counted in.

    Raises:
        UserError: names the bytes that are needed and free, and what to change.
    """
    of_run, of_cache = (
        max(0, size - (bytes_below(folder) if folder.is_dir() else 0))
        for size, folder in ((needed.run, out), (needed.cache, cache))
    )
    checks = [(out, of_run, "give --out on another disk, or lower checkpoint.keep")]
    if of_cache and _disk(cache) == _disk(out):
        fix = "give --out on another disk, or lower checkpoint.keep or features.limit_gb"
        checks = [(out, of_run + of_cache, fix)]
    elif of_cache:
        checks.append((cache, of_cache, "name a features.folder on another disk, or lower features.limit_gb"))
    for folder, most, fix in checks:
        free = shutil.disk_usage(_existing(folder)).free
        if most > free:
            raise UserError(
                f"{folder}: needs up to {most / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; {fix}"
            )


def _disk(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
