"""Training in this process."""

from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import prepare_devices
from cxr_dist.launch.ray_train import Prepare, _result
from cxr_dist.runs import run_folder
from cxr_dist.runs.events import Reporter, Reporters, closing
from cxr_dist.runs.loggers import run_reporters
from cxr_dist.runs.stop_request import stopped_by_sigterm
from tfrecords_builder.format.manifest import Manifest


def train_locally(
    config: Config,
    dataset: Path,
    run: Path,
    reporter: Reporter,
    *,
    manifest: Manifest,
    prepare: Prepare,
    devices_per_worker: int | None = None,
) -> dict[str, Any]:
    """Train in this process, with no Ray at all: the single-node fallback."""
    from cxr_dist.training.loop import train

    topology = prepare_devices(devices_per_worker)
    if not prepare(topology.replicas):
        return _result(run)
    reporters = Reporters([reporter, *run_reporters(run, run_folder.TENSORBOARD, run.name)])
    with stopped_by_sigterm(run), closing(reporters):
        return train(config, dataset, manifest, run, topology, reporters, "local")
