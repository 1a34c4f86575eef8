"""What the integration tests run on Ray's workers. Imported there, so it holds no tests."""

import json
import os
from pathlib import Path
from typing import Any


def record_bundle(arguments: dict[str, Any]) -> None:
    """Write what this worker was given."""
    import ray
    import ray.train

    context = ray.train.get_context()
    found = {
        "rank": context.get_world_rank(),
        "workers": context.get_world_size(),
        "gpus": sorted(ray.get_gpu_ids()),
        "tf_config": json.loads(os.environ["TF_CONFIG"])["task"],
        "bundles": [
            bundle
            for table in ray.util.placement_group_table().values()
            if table["state"] == "CREATED"
            for bundle in table["bundles"].values()
        ],
    }
    Path(arguments["out"], f"{found['rank']}.json").write_text(json.dumps(found))


def fail_in_words(_arguments: dict[str, Any]) -> None:
    """What a reader of a damaged shard raises, under the error that TensorFlow makes of it."""
    from tfrecords_builder.errors import UserError

    try:
        raise RuntimeError("an error of many lines\nfrom TensorFlow")
    except RuntimeError as error:
        raise UserError("shard 7: damaged") from error


def train_curves(arguments: dict[str, Any]) -> None:
    """Train the small two stages under MultiWorkerMirroredStrategy, once per variant, and write the curves."""
    import ray.train

    from cxr_dist.strategy import prepare_devices
    from tests import training

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    topology = prepare_devices(1, workers, rank)
    curves = {}
    for name, settings in arguments["variants"].items():
        run = training.Training(topology=topology, **settings)
        # A scale that does not overflow on the way, as in `training.two_stages`.
        trace = run.stage(training.UPPER, run.stage(training.HEAD, loss_scale=2.0**8), loss_scale=2.0**8)
        weights = [float(abs(variable.numpy()).sum()) for variable in run.model.weights]
        curves[name] = {"losses": trace.losses, "validation": trace.validation, "weights": weights}
    Path(arguments["out"], f"{rank}.json").write_text(json.dumps(curves))


def train_on_poisoned_images(arguments: dict[str, Any]) -> None:
    """float16, with an infinite pixel among the images of the last worker alone."""
    import numpy as np
    import ray.train

    from cxr_dist.config import StageConfig
    from cxr_dist.strategy import prepare_devices
    from tests import training

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    run = training.Training(topology=prepare_devices(1, workers, rank), precision="float16")
    run.poison(replica=workers - 1)
    before = [variable.numpy().copy() for variable in run.model.weights]
    trace = run.stage(StageConfig(epochs=1, learning_rate=1e-3))
    same = all((old == variable.numpy()).all() for old, variable in zip(before, run.model.weights, strict=True))
    found = {"skipped": trace.skipped, "same": same, "scale": float(np.asarray(run.loss_scale.scale))}
    Path(arguments["out"], f"poisoned-{rank}.json").write_text(json.dumps(found))


def curves_and_overflow(arguments: dict[str, Any]) -> None:
    """Both of the above in one start of two workers."""
    train_curves(arguments)
    train_on_poisoned_images(arguments)
