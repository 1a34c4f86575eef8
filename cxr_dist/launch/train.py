"""Training from a configuration and a dataset to a finished run."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import Topology, prepare_devices
from cxr_dist.runs import run_folder
from cxr_dist.runs.events import Reporter, Reporters, closing
from cxr_dist.runs.loggers import ConsoleReporter, progress_bar, run_reporters
from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.runs.stop_request import stopped_by_sigterm
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place


class Workers(Protocol):
    """Workers that have their places."""

    @property
    def replicas(self) -> int: ...

    def train(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """Train in the opened folder `run`; result.json."""
        ...


@dataclass(frozen=True)
class LocalWorker:
    """This process and its devices: no Ray at all."""

    config: Config
    dataset: OpenDataset
    topology: Topology

    @property
    def replicas(self) -> int:
        return self.topology.replicas

    def train(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """Train in the opened folder `run`; result.json."""
        from cxr_dist.training.loop import train

        reporters = Reporters([reporter, *run_reporters(run, run.name)])
        with stopped_by_sigterm(run), closing(reporters):
            folder, manifest = self.dataset.folder, self.dataset.manifest
            return train(self.config, folder, manifest, run, self.topology, reporters, "local")


@contextmanager
def local_dataset(place: Place) -> Iterator[Path]:
    """A dataset's folder on this machine, wherever it is."""
    from tfrecords_builder.remote import local_copy

    with progress_bar("fetch") as progress, local_copy(place, progress=progress) as dataset:
        yield dataset


@contextmanager
def open_dataset(place: Place) -> Iterator[OpenDataset]:
    """A dataset with its manifest read, and the sizes of its shards checked.

    Raises:
        UserError: it is not there, or not whole.
    """
    from tfrecords_builder.format.manifest import check_shards, read_manifest

    with local_dataset(place) as folder:
        manifest = read_manifest(folder)
        check_shards(folder, manifest)
        yield OpenDataset(place, folder, manifest)


def run_training(
    config: Config,
    dataset: Place,
    run: Path,
    *,
    launcher: str,
    workers: tuple[int, int] | None = None,
    devices_per_worker: int | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Place the workers, open the run's folder, train.

    Args:
        launcher: `ray` or `local`, which is this process.
        workers: Least and most, of Ray.
        devices_per_worker: None: what there is.
        address: Of the Ray cluster; None: one of this machine.
        verbose: Whether Ray's own messages are shown.

    Returns:
        result.json.

    Raises:
        UserError: what the user gave is wrong, or more is asked than there is.
    """
    from cxr_dist.launch.ray_train import workers_on_cluster
    from cxr_dist.model.resnet import check_weights
    from tfrecords_builder.splitting.splits import count_warnings

    if launcher == "local" and ((workers or (1, 1))[1] > 1 or address):
        raise UserError("--launcher local: uses one process; leave --workers and --address out, or use --launcher ray")
    with open_dataset(dataset) as data:
        config = run_folder.resolve_config(config, data.manifest)
        check_weights(config.model.weights)
        placed: AbstractContextManager[Workers]
        if launcher == "local":
            placed = nullcontext(LocalWorker(config, data, prepare_devices(devices_per_worker)))
        else:
            placed = workers_on_cluster(config, dataset, workers, devices_per_worker, address, verbose)
        with placed as team, opened_run(run, config, data, team.replicas) as is_finished:
            if is_finished:
                print(f"{run}: is already finished", file=sys.stderr)
                result = run_folder.finished_result(run)
            else:
                for text in count_warnings(data.manifest.counts):
                    print(f"warning: {text}", file=sys.stderr)
                result = team.train(run, ConsoleReporter())
            remove_checkpoints(run)
            return result


@contextmanager
def opened_run(run: Path, config: Config, dataset: OpenDataset, replicas: int) -> Iterator[bool]:
    """The run's folder, made or found, locked and checked, its corrupt records excluded; whether the run is finished.

    Raises:
        UserError: the batch cannot be shared, the disk is too small, or the folder is not that of this run.
    """
    from cxr_dist.launch.disk_space import check_space, needed_by_run
    from cxr_dist.runs.corrupt_records import exclude_corrupt

    manifest = dataset.manifest
    check_batch(config, len(manifest.split("train")), replicas)
    with run_folder.locked(run):
        is_finished = run_folder.read_result(run) is not None
        if not is_finished:
            images = len(manifest.split("train")) + len(manifest.split("validation"))
            check_space(run, run_folder.feature_cache(config, run), needed_by_run(config, images))
        run_folder.prepare(run, config, dataset.place, manifest)
        if not is_finished:
            excluded = exclude_corrupt(run, dataset.folder, manifest, config.input.max_corrupt_records)
            check_batch(config, len(manifest.split("train", excluded.paths)), replicas)
        yield is_finished


def check_batch(config: Config, images: int, replicas: int) -> None:
    """Raise `UserError` unless so many replicas can share the batches of so many training images."""
    from cxr_dist.data.batch_sampler import TrainBatchSampler

    TrainBatchSampler(
        images, config.global_batch_size, replicas, config.seed, accumulation_steps=config.accumulation_steps
    )


def remove_checkpoints(run: Path) -> None:
    """Of a finished run that has its model, which is all that other commands read."""
    from cxr_dist.runs.checkpoints import CheckpointFolder

    if run_folder.read_result(run) is not None and (run / run_folder.MODEL).is_file():
        CheckpointFolder(run / run_folder.CHECKPOINTS).remove_all()
