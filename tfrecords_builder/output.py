"""The output folder of a build: held against other builds, put together under other names, published in one order.

While it is built, a dataset is a folder with `.cxr-build` in it and no manifest (or, when another dataset is replaced,
with the manifest of that one, which stays whole until the new shards are complete). A build that was stopped is
therefore never taken for a dataset, and the next one into the same folder knows what it may use or remove.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfrecords_builder.errors import UserError
from tfrecords_builder.files import ENVIRONMENT_ERRORS, is_temporary, sync, write_bytes
from tfrecords_builder.manifest import MANIFEST_NAME, Manifest, write_manifest
from tfrecords_builder.sharding import is_shard_name
from tfrecords_builder.tfds_files import FILES, tfds_files

WORK_FOLDER = ".cxr-build"
"""Holds a build in progress, inside the output folder."""


@contextmanager
def locked_folder(dataset: Path) -> Iterator[None]:
    """The output folder, made if need be, held against other builds; gone again if a failed build made it."""
    created = not dataset.exists()
    with explained(dataset):
        try:
            dataset.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{dataset}: is not a folder; give another output folder") from error
        descriptor = os.open(dataset, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{dataset}: another build is writing here; wait for it or give another output folder"
                ) from error
            yield
        finally:
            os.close(descriptor)
            if created and not any(dataset.iterdir()):
                dataset.rmdir()


@contextmanager
def work_folder(dataset: Path) -> Iterator[Path]:
    """The work folder, with the parts of a build that was stopped, if there was one.

    It is removed at the end, and on an error with all that this build made. Whoever stops the process, by a signal or
    Ctrl-C, finds it again.

    Raises:
        UserError: The output folder holds what no build left.
    """
    work = dataset / WORK_FOLDER
    names = {path.name for path in dataset.iterdir()}
    replaces = MANIFEST_NAME in names
    if not replaces:
        # Without the work folder, even a file with a shard's name was not left by a build that was stopped.
        foreign = sorted(name for name in names - {WORK_FOLDER} if WORK_FOLDER not in names or not _is_ours(name))
        if foreign:
            raise UserError(
                f"{dataset}: is not empty and no dataset (it holds '{foreign[0]}'); give another output folder"
            )
        _remove_published(dataset)
    work.mkdir(exist_ok=True)
    _remove_published(work)
    try:
        yield work
    except Exception:
        if not (dataset / MANIFEST_NAME).exists():
            _remove_published(dataset)
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def publish(dataset: Path, work: Path, manifest: Manifest) -> None:
    """Move the shards of `work` into place, in the order in which a stop does no harm.

    The manifest of a dataset that is replaced goes first, the new one comes last: in between the folder is no dataset.
    """
    (dataset / MANIFEST_NAME).unlink(missing_ok=True)
    sync(dataset)
    _remove_published(dataset)
    for shard in manifest.shards:
        (work / shard.name).rename(dataset / shard.name)
    for name, content in tfds_files(manifest).items():
        write_bytes(dataset / name, content)
    # The names must be on the disk before the manifest that vouches for them.
    sync(dataset)
    write_manifest(dataset, manifest)


def remove_work(dataset: Path) -> None:
    """Remove what a build left that was stopped after its manifest."""
    if (dataset / WORK_FOLDER).exists():
        shutil.rmtree(dataset / WORK_FOLDER)


def _is_ours(name: str) -> bool:
    return is_shard_name(name) or name in FILES or is_temporary(name, (MANIFEST_NAME, *FILES))


def _remove_published(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if _is_ours(path.name):
            path.unlink()


@contextmanager
def explained(dataset: Path) -> Iterator[None]:
    """Turn what the user can mend about the output folder into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in ENVIRONMENT_ERRORS:
            raise UserError(
                f"{dataset}: cannot be written ({error.strerror}); mend that or give another output folder"
            ) from error
        raise
