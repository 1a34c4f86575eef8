"""What each stage of a run reads: images, or what the frozen part makes of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cxr_dist.config.schema import Config, StageConfig
from cxr_dist.data.arrays import Source
from cxr_dist.features import cache
from cxr_dist.model import split_point
from cxr_dist.model.resnet import set_trainable, trains_base_batch_norm


@dataclass(frozen=True)
class Inputs:
    """What a stage trains, and on what."""

    network: Any
    """From the sources' inputs to logits; shares the model's variables."""
    train: Source
    validation: Source
    from_cut: bool
    """Whether the inputs are tensors inside the network, and augmented already."""


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
        decided: Callable[[], dict[str, bool]],
    ) -> None:
        """Args:
        frozen: Computes and finds what is cached.
        announce: Told the stage and, in words, what it reads.
        timed: Counts the seconds of a phase.
        decided: By stage, cut and setting, whether it reads kept tensors, as the run remembers it; added to.
        """
        self._config, self._model, self._frozen = config, model, frozen
        self._train, self._validation = train, validation
        self._announce, self._timed, self._decided = announce, timed, decided
        self._in_memory: tuple[Source, Source] | None = None

    def of(self, number: int) -> Inputs:
        """The inputs of stage `number`, whose layers `set_trainable` has set; computed now where they are missing."""
        stage, where = self._config.stages[number], self.cut_of(number)
        if where is None:
            self._announce(number, stage, "images")
            limit = int(self._config.input.memory_gb * 1e9)
            with self._timed("read"):
                self._in_memory = self._in_memory or (
                    self._train.source.in_memory(limit),
                    self._validation.source.in_memory(limit),
                )
            return Inputs(split_point.whole_network(self._model), *self._in_memory, from_cut=False)
        self._announce(number, stage, f"what the layers up to {where.name} make of them, computed once")
        later = self._later_cuts(number)
        augmentation = self._config.augmentation if stage.augment else None
        with self._timed("features"):
            train, validation = (
                self._frozen.sources(self._model, where.name, also, images, changed)
                for images, changed, also in (
                    (self._train, augmentation, () if augmentation else later),
                    (self._validation, None, later),
                )
            )
        return Inputs(where.above, train, validation, from_cut=True)

    def cut_of(self, number: int) -> split_point.Cut | None:
        """The cut at which stage `number`, whose layers are set, reads kept tensors; None where it reads images."""
        where = split_point.frozen_cut(self._model)
        return where if where is not None and self._keeps(number, where) else None

    def _keeps(self, number: int, where: split_point.Cut) -> bool:
        decided, stage = self._decided(), self._config.stages[number]
        use = cache.use_of_cut(self._config.features, stage, where.name)
        # By all that it was decided about: a trial may begin with the first stage of another, and end with its own.
        key = f"{number} {where.name} {use}"
        if key not in decided:
            images = self._train.source.count + self._validation.source.count
            # What a clock decides is not the same in every run.
            measured = use == "auto" and not self._config.deterministic
            decided[key] = use == "on" or (
                measured and self._frozen.pays(self._model, where, self._train, images, stage.epochs)
            )
        return decided[key]

    def _later_cuts(self, number: int) -> tuple[str, ...]:
        """Those of later stages that read the images as they are: one pass computes them all."""
        config, batch_norm = self._config, trains_base_batch_norm(self._config)
        names = []
        for later, stage in sorted(config.stages.items()):
            if later > number and stage.epochs and not stage.augment:
                set_trainable(self._model, stage.unfreeze_layers, batch_norm)
                where = split_point.frozen_cut(self._model)
                set_trainable(self._model, config.stages[number].unfreeze_layers, batch_norm)
                if where is not None and self._keeps(later, where):
                    names.append(where.name)
        return tuple(names)
