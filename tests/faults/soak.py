"""Small runs, evaluations and searches, one after another in one process; what the process holds after each.

python -m tests.faults.soak DATASET FOLDER SECONDS
"""

import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL_RUN, use_small_base

RUNS_PER_SEARCH = 8


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc (mallinfo(3)): bytes, in size_t."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_bytes() -> int:
    """What the process has allocated and not freed, of all arenas, after free memory went back to the system."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    libc.mallinfo2.restype = MallocInfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def held() -> dict[str, int]:
    """Allocated and resident KiB, objects, open files, threads, children, entries of the folder for temporary files."""
    gc.collect()  # what is no one's any more may still wait for the collector
    allocated = allocated_bytes()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "allocated": allocated // 1024,
        "resident": int(status["VmRSS"].split()[0]),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "children": len(children),
        "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


def main() -> None:
    from cxr_dist.commands import run_training
    from cxr_dist.config import load_config
    from cxr_dist.evaluate import Request, evaluate_run
    from tests.integration.workers import small_search

    dataset, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    until = time.monotonic() + seconds
    number = 0
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        while time.monotonic() < until:
            run = folder / "run"
            run_training(load_config(None, [*SMALL_RUN, f"seed={number}"]), dataset, run, launcher="local")
            evaluate_run(Request(run, folder / "evaluation"))
            if number % RUNS_PER_SEARCH == RUNS_PER_SEARCH - 1:
                small_search(dataset, folder / "search", {"model.dropout": {"choices": [0.05, 0.5]}})
            for left in folder.iterdir():
                shutil.rmtree(left)
            number += 1
            print("held", json.dumps(held()), flush=True)


if __name__ == "__main__":
    main()
