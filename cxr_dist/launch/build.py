"""A build from a source folder to a dataset, wherever its work is done and wherever the dataset goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.build import BuildOptions, BuildSummary, Workers, build_dataset
from tfrecords_builder.collection.collect import read_collection
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place
from tfrecords_builder.remote import staged_output


def run_build(
    source: Path,
    dataset: Place,
    options: BuildOptions,
    *,
    launcher: str,
    address: str | None = None,
    verbose: bool = False,
) -> BuildSummary:
    """Build the dataset of the images in `source`.

    Args:
        source: As `build_dataset` takes it.
        dataset: A folder, or an address.
        options: How to build it.
        launcher: `local`: processes of this machine; or `ray`: tasks of a cluster.
        address: Of the Ray cluster; None: one of this machine.
        verbose: Whether Ray's own messages are shown.

    Raises:
        UserError: what the user gave is wrong.
    """
    with (
        _builders(options, launcher, address, verbose) as pool,
        _output_folder(source, dataset, options) as folder,
        progress_bar("build") as progress,
    ):
        return build_dataset(source, folder, options, progress=progress, pool=pool)


@contextmanager
def _output_folder(source: Path, dataset: Place, options: BuildOptions) -> Iterator[Path]:
    """Where a build writes: the folder that was given, or a local one that goes up at the end."""
    if isinstance(dataset, Path):
        yield dataset
        return
    # For a while the disk holds the images twice; raw is the largest encoding.
    needed = (
        2 * len(read_collection(source, options.on_error, options.masks, options.labels).images) * options.image_size**2
    )
    with progress_bar("upload") as progress, staged_output(dataset, needed, progress=progress) as folder:
        yield folder


@contextmanager
def _builders(options: BuildOptions, launcher: str, address: str | None, verbose: bool) -> Iterator[Workers | None]:
    """Where a build's work is done; None for processes of this machine."""
    if launcher == "local":
        if address:
            raise UserError("--address: needs --launcher ray; add it, or leave --address out")
        yield None
        return
    if options.workers is not None:
        raise UserError("--workers: does not apply to --launcher ray, where the cluster decides; leave it out")
    from cxr_dist.launch.ray_connection import connected
    from cxr_dist.launch.ray_pool import RayPool

    with connected(address, verbose):
        yield RayPool()
