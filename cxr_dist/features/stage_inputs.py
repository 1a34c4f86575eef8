"""What each stage of a run reads: images, or the activations of its frozen layers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.data import resident
from cxr_dist.data.arrays import Source
from cxr_dist.distributed.precision import resolve_fused_batch_norm
from cxr_dist.features import cache
from cxr_dist.model import split_point
from cxr_dist.model.resnet import FrozenBase
from cxr_dist.model.split_point import SplitPoint

_GPU_MEMORY_GB = 2.0
"""`input.device_memory_gb` of a GPU, unless it is given: a quarter of the smallest that trains ResNet50."""


@dataclass(frozen=True)
class Inputs:
    """What a stage trains, and on what."""

    network: Any
    """From the sources' inputs to logits; shares the model's variables."""
    train: Source
    validation: Source
    from_cache: bool
    """Whether the inputs are activations inside the network, and augmented already."""


class StageInputs:
    """Decides once for each stage where its inputs come from, and fetches or computes them."""

    def __init__(
        self,
        config: Config,
        model: Any,
        frozen: cache.FrozenFeatures,
        train: cache.SplitImages,
        validation: cache.SplitImages,
        *,
        announce: Callable[[int, StageConfig, str], None],
        timed: Callable[[str], AbstractContextManager[None]],
        decided: dict[str, bool],
    ) -> None:
        """Args:
        frozen: Computes and finds what is cached; the stages train under its strategy.
        announce: Receives the stage and, in words, what it reads.
        timed: Counts the seconds of a phase.
        decided: By stage, split point and setting, whether it reads the cache, as the run remembers it; added to.
        """
        self._config, self._model, self._frozen = config, model, frozen
        self._train, self._validation = train, validation
        self._announce, self._timed, self._decided = announce, timed, decided
        self._fuse = resolve_fused_batch_norm(config, frozen.topology.kind)
        self._in_memory: tuple[Source, Source] | None = None

    def of(self, number: int) -> Inputs:
        """The inputs of stage `number`, whose freezing the model has; computed now where they are missing."""
        stage, split = self._config.stages[number], self.cached_split(number)
        if split is None:
            self._announce(number, stage, "images")
            limit = int(self._config.input.memory_gb * 1e9)
            folder = self._config.input.shared_folder
            shared = None if folder is None else Path(folder)
            with self._timed("read"):
                self._in_memory = self._in_memory or (
                    self._place(self._train.source.in_memory(limit, shared)),
                    self._place(self._validation.source.in_memory(limit, shared)),
                )
            return Inputs(split_point.whole_network(self._model, self._fuse), *self._in_memory, from_cache=False)
        self._announce(number, stage, f"cached activations of the layers up to {split.name}")
        later = self._later_splits(number)
        augmentation = self._config.augmentation if stage.augment else None
        with self._timed("features"):
            train, validation = (
                self._place(self._frozen.sources(self._model, [split.name, *also], images, changed))
                for images, changed, also in (
                    (self._train, augmentation, () if augmentation else later),
                    (self._validation, None, later),
                )
            )
        network = split_point.network_above(self._model, split.name, self._fuse)
        return Inputs(network, train, validation, from_cache=True)

    def _place(self, source: Source) -> Source:
        """Where the steps read it: on the devices, or as it is."""
        limit = self._config.input.device_memory_gb
        if limit is None:
            limit = _GPU_MEMORY_GB if self._frozen.topology.kind == "GPU" else 0.0
        return resident.on_devices(source, self._frozen.strategy, int(limit * 1e9))

    def cached_split(self, number: int) -> SplitPoint | None:
        """The split point at which stage `number` reads cached activations; None where it reads images."""
        stage = self._config.stages[number]
        split = SplitPoint.of(self._model, FrozenBase.of(stage, self._config))
        return split if split is not None and self._reads_cache(number, stage, split) else None

    def _reads_cache(self, number: int, stage: StageConfig, split: SplitPoint) -> bool:
        decided, use = self._decided, cache.use_of_cache(self._config.features, stage, split.name)
        # By all that it was decided about: a trial may begin with the first stage of another, and end with its own.
        key = f"{number} {split.name} {use}"
        if key not in decided:
            images = self._train.source.count + self._validation.source.count
            # What a clock decides is not the same in every run.
            measured = use == "auto" and not self._config.deterministic
            decided[key] = use == "on" or (
                measured and self._frozen.pays(self._model, split, self._train, images, stage.epochs)
            )
        return decided[key]

    def _later_splits(self, number: int) -> list[str]:
        """Those of later stages that read the images as they are: one pass computes them all."""
        later = [
            self.cached_split(other)
            for other, stage in sorted(self._config.stages.items())
            if other > number and stage.epochs and not stage.augment
        ]
        return [split.name for split in later if split is not None]
