"""Training from a configuration and a dataset to a finished run."""

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.runs import run_folder
from cxr_dist.runs.loggers import ConsoleReporter, progress_bar
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.remote import Place


@contextmanager
def local_dataset(place: Place) -> Iterator[Path]:
    """A dataset's folder on this machine, wherever it is."""
    from tfrecords_builder.remote import local_copy

    with progress_bar("fetch") as progress, local_copy(place, progress=progress) as dataset:
        yield dataset


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
    """Check all that can be checked, prepare the run's folder, and train through the launcher."""
    from cxr_dist.data.batch_sampler import TrainBatchSampler
    from cxr_dist.launch.local import train_locally
    from cxr_dist.launch.ray_train import train_with_ray
    from cxr_dist.model.resnet import check_weights
    from cxr_dist.runs.corrupt_records import leave_out
    from cxr_dist.runs.disk_space import check_space, needed_by_run
    from tfrecords_builder.format.manifest import check_shards, read_manifest

    if launcher == "local" and ((workers or (1, 1))[1] > 1 or address):
        raise UserError("--launcher local: is one process; leave --workers and --address out, or use --launcher ray")
    with ExitStack() as held:
        folder = held.enter_context(local_dataset(dataset))
        manifest = read_manifest(folder)
        check_shards(folder, manifest)
        config = run_folder.resolve_config(config, manifest)
        check_weights(config.model.weights)
        reporter = ConsoleReporter()

        def prepare(replicas: int) -> bool:
            check_plan(replicas, ())
            held.enter_context(run_folder.locked(run))
            if run_folder.read_result(run) is None:
                images = len(manifest.split("train")) + len(manifest.split("validation"))
                check_space(run, run_folder.feature_cache(config, run), needed_by_run(config, images))
            run_folder.prepare(run, config, dataset, manifest)
            if _finished(run) is not None:
                return False
            check_plan(replicas, leave_out(run, folder, manifest, config.input.max_corrupt_records).paths)
            return True

        def check_plan(replicas: int, without: Collection[str]) -> None:
            count, microbatches = len(manifest.split("train", without)), config.accumulation_steps
            TrainBatchSampler(count, config.global_batch_size, replicas, config.seed, accumulation_steps=microbatches)

        if launcher == "local":
            result = train_locally(
                config, folder, run, reporter, manifest=manifest, prepare=prepare, devices_per_worker=devices_per_worker
            )
        else:
            result = train_with_ray(
                config,
                dataset,
                run,
                reporter,
                prepare=prepare,
                workers=workers,
                devices_per_worker=devices_per_worker,
                address=address,
                verbose=verbose,
            )
        remove_checkpoints(run)
        return result


def remove_checkpoints(run: Path) -> None:
    """Of a finished run that has its model, which is all that other commands read."""
    from cxr_dist.runs.checkpoints import CheckpointFolder

    if run_folder.read_result(run) is not None and (run / run_folder.MODEL).is_file():
        CheckpointFolder(run / run_folder.CHECKPOINTS).remove_all()


def _finished(run: Path) -> dict[str, Any] | None:
    result = run_folder.read_result(run)
    if result is not None:
        print(f"{run}: was finished already", file=sys.stderr)
    return result
