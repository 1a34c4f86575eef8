"""The COVID-19 Radiography Database from Kaggle, through kagglehub, whole or not at all.

kagglehub resumes an archive that broke off and compares its MD5 with the one that the server names. Around that: a
check of the disk before, of what arrived after, a limit for silence, and errors that say what to do. It runs in a
process of its own, as its requests have no time limit of theirs.
"""

import importlib.util
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import bytes_below, check_output_folder
from tfrecords_builder.common.installation import install_command
from tfrecords_builder.common.interrupts import interrupts_held

HANDLE = "tawsifurrahman/covid19-radiography-database"
PAGE = f"kaggle.com/datasets/{HANDLE}"
FOLDER = "COVID-19_Radiography_Dataset"
IMAGES = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral_Pneumonia": 1345}
"""By class, each with a lung mask, as its page says."""
NEEDED_BYTES = 2_000_000_000
"""The archive has 0.8 GB, and so has what is in it."""
SILENCE_SECONDS = 300.0
"""Without a new byte, after which a download is given up."""

_POLL_SECONDS = 0.5


def download_database(folder: Path, images: Mapping[str, int] = IMAGES) -> bool:
    """Put the database into the new or empty `folder`; False when it is there already.

    A download that was stopped goes on when it is started again: what has arrived is kept beside `folder`. `images`
    says how many of each class there should be.

    Raises:
        UserError: kagglehub is not installed, the disk is too small, Kaggle cannot be reached or wants credentials,
            what arrives is damaged or another collection, or `folder` holds something else.
    """
    if folder.is_dir() and _counts(folder) == dict(images):
        return False
    check_output_folder(folder, "the database", "DIR", lambda _: False)
    if importlib.util.find_spec("kagglehub") is None:
        raise UserError(f"kagglehub: is not installed; install it with: {install_command('download')}")
    work = folder.absolute().with_name(f".{folder.name}.download")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); give a folder that you can write to"
        ) from error
    missing = NEEDED_BYTES - bytes_below(work) - shutil.disk_usage(work).free
    if missing > 0:
        raise UserError(
            f"{folder}: its disk needs {missing / 1e9:.1f} GB more ({NEEDED_BYTES / 1e9:.0f} GB while it is unpacked); "
            "free space, or give another folder"
        )
    arrived = _run_kagglehub(work) / FOLDER
    found = _counts(arrived)
    if found != dict(images):
        raise UserError(
            f"{arrived}: contains {_words(found)} images, but the published database has {_words(images)}; it is kept: "
            "build from it anyway, or remove it and try again"
        )
    arrived.replace(folder)
    shutil.rmtree(work)
    return True


def _run_kagglehub(work: Path) -> Path:
    """The folder into which kagglehub unpacked the archive."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_download, args=(work, sys.stderr.isatty(), sender), daemon=True)
    with interrupts_held():
        process.start()
    sender.close()
    seen, since = -1, time.monotonic()
    try:
        while not receiver.poll(_POLL_SECONDS):
            now = bytes_below(work)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE_SECONDS:
                raise UserError(
                    f"{PAGE}: nothing has arrived for {SILENCE_SECONDS:.0f} seconds; start the same command again to "
                    "resume"
                )
        path, problem = receiver.recv()
    except EOFError:
        process.join()
        if (process.exitcode or 0) > 0:
            raise RuntimeError("the download failed for an unknown reason; see the messages above") from None
        raise UserError(f"{PAGE}: the download was killed; start the same command again to resume") from None
    finally:
        process.kill()
        process.join()
    if problem is not None:
        raise UserError(problem)
    return Path(path)


def _download(work: Path, live: bool, answer: Connection) -> None:
    """In a process of its own: sends the folder, or what went wrong."""
    os.environ["KAGGLEHUB_CACHE"] = str(work)
    os.environ["KAGGLEHUB_VERBOSITY"] = "error"
    if not live:
        os.environ["TQDM_DISABLE"] = "1"
    import zipfile
    import zlib

    import kagglehub
    import requests
    from kagglehub.exceptions import DataCorruptionError, UnauthenticatedError

    again = "start the same command again to resume"
    credentials = (
        f"accept the terms at {PAGE}, and give a token of your account in ~/.kaggle/kaggle.json or in KAGGLE_USERNAME "
        "and KAGGLE_KEY"
    )
    problem = None
    path = ""
    try:
        path = kagglehub.dataset_download(HANDLE)
    except UnauthenticatedError:
        problem = f"{PAGE}: Kaggle requires an account; {credentials}"
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            problem = f"{PAGE}: Kaggle does not allow the download (status {status}); {credentials}"
        else:
            problem = f"{PAGE}: Kaggle answered with status {status}; try again later"
    except requests.RequestException as error:
        problem = (
            f"{PAGE}: the download failed ({one_line(error)}); check the network and {again}, or fetch it "
            f"with a browser and unpack it: {FOLDER} in it is what build takes"
        )
    except (DataCorruptionError, zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        # Kept, it would be taken for an archive that has arrived whole.
        for archive in work.rglob("*.archive"):
            archive.unlink()
        problem = f"{PAGE}: the download is damaged ({one_line(error)}); {again}"
    except OSError as error:
        problem = f"{work}: cannot be written ({error.strerror or one_line(error)}); fix this, and {again}"
    answer.send((path, problem))


def _counts(folder: Path) -> dict[str, int]:
    """Images by class; empty when it holds none."""
    try:
        return dict(Counter(image.class_name for image in find_images(folder)))
    except UserError:
        return {}


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "no"
