"""Time and memory of builds, analyses and the near-duplicate search by the number of images, for people to run.

python -m tests.scale search XRAYS SIZE ...     variants of the X-rays in a folder; processor time of one thread
python -m tests.scale images SOURCE WORK SIZE ...    `build` and `eda` of so many images of a folder with class folders
python -m tests.scale dicom WORK SIZE ...       `build` of so many DICOM files of 8 MB
python -m tests.scale large WORK SIDE ...       `build` of 28 DICOM files of 0.5 MB and one of SIDE x SIDE pixels

WORK is a folder that does not exist. Peak memory is that of all processes of a command together: the sum of their
proportional set sizes, twice a second (`large`: fifty times). What several processes share counts once.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

_ALIKE = 100
"""Each variant is a mix of an X-ray and one of so many that are most like it."""

Thumbnails = npt.NDArray[np.uint8]


def measured(arguments: list[str], interval: float = 0.5) -> str:
    """Run `cxr-dist` with `arguments`; its time and memory as cells of a table."""
    started, cpu = time.perf_counter(), _children_seconds()
    process = psutil.Popen([sys.executable, "-m", "cxr_dist", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _proportional_memory(process))
        time.sleep(interval)
    if process.returncode:
        raise SystemExit(f"{arguments[0]}: ended with status {process.returncode}")
    seconds, cpu = time.perf_counter() - started, _children_seconds() - cpu
    return f"{seconds:9.0f}{cpu:9.0f}{peak / 1e6:9.0f}"


def _proportional_memory(process: psutil.Process) -> int:
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended
    return total


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def images(source: Path, work: Path, sizes: list[int]) -> None:
    """An equal share of each class, by hard links, or copies where the file system has none."""
    folders = [folder for folder in sorted(source.iterdir()) if folder.is_dir()]
    print(f"{'':9}{'build':>27}{'eda':>27}")
    print("   images" + 2 * "  seconds    cpu s  peak MB" + "     load")
    for size in sizes:
        for folder in folders:
            files = sorted(file for file in folder.rglob("*.png") if file.parent.name != "masks")
            (work / "images" / folder.name).mkdir(parents=True)
            for file in files[: size // len(folders)]:
                _link(file, work / "images" / folder.name / file.name)
        build = measured(["build", str(work / "images"), str(work / "dataset")])
        eda = measured(["eda", str(work / "dataset"), "--out", str(work / "analysis")])
        print(f"{size:9,}{build}{eda}{os.getloadavg()[1]:9.1f}", flush=True)
        shutil.rmtree(work)


def _link(file: Path, link: Path) -> None:
    try:
        link.hardlink_to(file)
    except OSError:
        shutil.copy(file, link)


def dicom(work: Path, sizes: list[int]) -> None:
    from cxr_dist.bench.dicom_files import write_dicom_files

    print("    files" + "  seconds    cpu s  peak MB" + "     load")
    for size in sizes:
        work.mkdir()
        write_dicom_files(work / "images", size)
        print(
            f"{size:9,}{measured(['build', str(work / 'images'), str(work / 'dataset')])}{os.getloadavg()[1]:9.1f}",
            flush=True,
        )
        shutil.rmtree(work)


def large(work: Path, sides: list[int]) -> None:
    from cxr_dist.bench.dicom_files import write_dicom_files

    print("     side  file MB  seconds    cpu s  peak MB     load")
    for side in sides:
        work.mkdir()
        write_dicom_files(work / "images", 28, side=500)
        write_dicom_files(work / "images", 1, seed=1, side=side)
        cells = measured(["build", str(work / "images"), str(work / "dataset")], interval=0.02)
        print(f"{side:9,}{2 * side**2 / 1e6:9.0f}{cells}{os.getloadavg()[0]:9.1f}", flush=True)
        shutil.rmtree(work)


def search(xrays: Path, sizes: list[int]) -> None:
    from threadpoolctl import threadpool_limits

    from tfrecords_builder.splitting.near_duplicates import near_duplicates

    thumbnails = variants(read_thumbnails(xrays), max(sizes))
    print("   images    cpu s  us per image    pairs     load")
    for size in sizes:
        some = thumbnails[:size]
        started = time.process_time()
        with threadpool_limits(1):  # threads that wait for others take processor time
            pairs = near_duplicates(some)
        seconds = time.process_time() - started
        print(
            f"{size:9,}{seconds:9.2f}{seconds / size * 1e6:14.0f}{len(pairs):9,}{os.getloadavg()[0]:9.1f}", flush=True
        )


def read_thumbnails(folder: Path) -> Thumbnails:
    """uint8 [N, 64, 64] of the PNG files under `folder`."""
    from tfrecords_builder.images.decode import decode_gray, read_bytes
    from tfrecords_builder.images.resizing import squares
    from tfrecords_builder.writing.writer import THUMBNAIL

    paths = sorted(folder.rglob("*.png"))
    return np.stack([squares([decode_gray(read_bytes(path), path).gray], [THUMBNAIL])[0][0] for path in paths])


def variants(originals: Thumbnails, count: int) -> Thumbnails:
    """`count` thumbnails that are as alike as different X-rays: a mix of one and of one that looks like it, moved.

    Noise would not do: the search is slow where unrelated images look alike.
    """
    from tfrecords_builder.splitting import near_duplicates

    coarse = near_duplicates._coarse(originals)
    alike = np.argsort(-(coarse @ coarse.T), 1)[:, 1:_ALIKE]
    rng = np.random.default_rng(0)
    found = np.empty((count, *originals.shape[1:]), np.uint8)
    for number in range(count):
        one = rng.integers(0, len(originals))
        first, second = originals[one], originals[rng.choice(alike[one])]
        share = rng.uniform(0.3, 0.5)
        mixed = (1 - share) * _moved(first, rng) + share * _moved(second, rng)
        mixed = (mixed - mixed.mean()) / max(mixed.std(), 1.0) * first.std() + first.mean()
        found[number] = np.clip(np.rint(mixed), 0, 255)
    return found


def _moved(image: Thumbnails, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    from scipy.ndimage import affine_transform

    angle, middle = np.deg2rad(rng.uniform(-5, 5)), (np.array(image.shape) - 1) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * rng.uniform(0.95, 1.05, (2, 1))
    offset = middle - turn @ middle + rng.uniform(-3, 3, 2)
    return affine_transform(image.astype(np.float32), turn, offset, order=1, mode="nearest")


COMMANDS: dict[str, tuple[Callable[..., None], int]] = {
    "search": (search, 1),
    "images": (images, 2),
    "dicom": (dicom, 1),
    "large": (large, 1),
}


if __name__ == "__main__":
    command, folders = COMMANDS[sys.argv[1]]
    given = sys.argv[2:]
    command(*map(Path, given[:folders]), [int(size) for size in given[folders:]])
