"""The output folder of a build: held against other builds, put together under other names, published in one order.

While it is built, a dataset is a folder with `.cxr-build` in it and no manifest (or, when another dataset is replaced,
with the manifest of that one, which stays whole until the new shards are complete). A build that was stopped or failed
is therefore never taken for a dataset, and the next one into the same folder knows what it may use or remove.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tfrecords_builder.common import locks
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import ENVIRONMENT_ERRORS, intended_name, is_temporary, sync, write_bytes
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.format.manifest import MANIFEST_NAME, Manifest, write_manifest
from tfrecords_builder.format.sharding import is_shard_name
from tfrecords_builder.format.tfds_files import FILES, tfds_files
from tfrecords_builder.writing.parts import bytes_of_parts, is_half

WORK_FOLDER = ".cxr-build"
"""Holds a build in progress, inside the output folder."""
_ATTEMPTS = 5


@contextmanager
def locked_folder(dataset: Path) -> Iterator[None]:
    """The output folder, made if need be, held against other builds; gone again if a failed build made it."""
    with explained(dataset), ExitStack() as held:
        busy = "another build is writing to this folder; wait for it, or give another output folder"
        try:
            held.enter_context(locks.held_folder(dataset, busy))
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{dataset}: is not a folder; give another output folder") from error
        yield


@contextmanager
def work_folder(dataset: Path) -> Iterator[Path]:
    """The work folder, with the parts of an earlier build that did not come to its end, if there was one.

    It is removed at the end. On an error its parts are kept, whatever the error: parts are keyed and checksummed, so
    the next build uses those that are right. Everything else that this build made is removed, and so is a work folder
    without parts. The error gets a note that names the folder. A process that is stopped by a signal or Ctrl-C leaves
    the folder as it is.

    Raises:
        UserError: The output folder holds what no build left.
    """
    work = dataset / WORK_FOLDER
    names = {path.name for path in dataset.iterdir()} - {LOCK}
    replaces = MANIFEST_NAME in names
    if not replaces:
        # Without the work folder, even a file with a shard's name was not left by a build that was stopped.
        foreign = sorted(name for name in names - {WORK_FOLDER} if WORK_FOLDER not in names or not _is_ours(name))
        if foreign:
            raise UserError(
                f"{dataset}: contains other files than a dataset ('{foreign[0]}'); give another output folder"
            )
        _remove_published(dataset)
    work.mkdir(exist_ok=True)
    _remove_unfinished(work)
    try:
        yield work
    except Exception as error:
        if not (dataset / MANIFEST_NAME).exists():
            _remove_published(dataset)
        _remove_unfinished(work)
        size = bytes_of_parts(work)
        if size:
            error.add_note(
                f"{work}: keeps the images that were decoded ({size / 1e9:.3f} GB); the next build into {dataset} uses "
                "them; remove the folder if there is none"
            )
        else:
            remove_work(dataset)
        raise
    remove_work(dataset)


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
    """Remove the work folder, if there is one."""
    work = dataset / WORK_FOLDER
    for _ in range(_ATTEMPTS):
        try:
            shutil.rmtree(work)
        except FileNotFoundError:
            pass  # of a file: a task that was given up, on a machine that is out of reach, renames its own
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        if not work.exists():
            return
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(work))


def _is_ours(name: str) -> bool:
    return is_shard_name(name) or name in FILES or is_temporary(name, (MANIFEST_NAME, *FILES))


def _remove_published(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if _is_ours(path.name):
            path.unlink()


def _remove_unfinished(work: Path) -> None:
    """Remove all but whole parts: shards, and what killed tasks left (temporary files, halves of parts)."""
    for path in list(work.iterdir()):
        if is_shard_name(path.name) or intended_name(path.name) is not None or is_half(path):
            path.unlink(missing_ok=True)


@contextmanager
def explained(dataset: Path) -> Iterator[None]:
    """Turn what the user can fix about the output folder into a `UserError`, with the notes of the error."""
    try:
        yield
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        fix = "fix this, or give another output folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free space on that disk, and start the same command again to resume"
        told = UserError(f"{dataset}: cannot be written ({error.strerror}); {fix}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error
