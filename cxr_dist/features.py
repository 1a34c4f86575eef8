"""What a frozen base computes, computed once.

With the base frozen and no augmentation, the pooled features of an image are 2,048 numbers that never
change. A stage that trains the head alone then needs one forward pass, and each further epoch is almost
free. The numbers are those of the full network, so the loss curve is too (within float tolerance).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.config import Config, StageConfig
from cxr_dist.data import EvaluationPlan, Source, worker_batches
from cxr_dist.steps import make_forward_step
from cxr_dist.strategy import Topology


def caches_features(config: Config, stage: StageConfig) -> bool:
    """Whether the stage trains on pooled features instead of images."""
    return config.features.cache != "off" and stage.unfreeze_layers == 0 and not stage.augment


def run_forward(
    strategy: Any,
    topology: Topology,
    model: Any,
    source: Source,
    batch_size: int,
    *,
    softmax: bool,
    xla: bool,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """The outputs of `model` for every input of `source` once, in order, in inference mode.

    Args:
        batch_size: images per replica and step.
        progress: called with the steps done and their number.

    Returns:
        float32 [N, ...], complete on every worker.
    """
    plan = EvaluationPlan(source.count, batch_size, topology.replicas)
    step = make_forward_step(strategy, model, softmax=softmax, xla=xla)
    iterator = distributed_batches(strategy, topology, source, plan)
    outputs: list[npt.NDArray[np.float32]] = []
    for number in range(plan.steps):
        outputs.append(step(iterator))
        if progress:
            progress(number + 1, plan.steps)
    return np.concatenate(outputs)[: source.count]


def distributed_batches(strategy: Any, topology: Topology, source: Source, plan: Any, start_step: int = 0) -> Any:
    """An iterator over the batches of this worker's replicas."""
    local = len(topology.devices)

    def pipeline(_context: Any) -> Any:
        return worker_batches(
            source, plan, first_replica=topology.worker * local, local_replicas=local, start_step=start_step
        )

    return iter(strategy.distribute_datasets_from_function(pipeline))
