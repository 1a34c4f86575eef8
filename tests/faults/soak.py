"""Small runs, evaluations and searches, one after another in one process; what the process holds after each.

python -m tests.faults.soak DATASET FOLDER SECONDS
"""

import gc
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import SMALL_RUN, use_small_base

RUNS_PER_SEARCH = 8


def held() -> dict[str, int]:
    """Allocated and resident KiB, objects, open files, threads, children, entries of the folder for temporary files."""
    gc.collect()  # what is no one's any more may still wait for the collector
    psutil.heap_trim()  # nor is what the allocator keeps for later
    heap, process = psutil.heap_info(), psutil.Process()
    return {
        "allocated": (heap.heap_used + heap.mmap_used) // 1024,
        "resident": process.memory_info().rss // 1024,
        "objects": len(gc.get_objects()),
        "files": process.num_fds(),
        "threads": threading.active_count(),
        "children": len(process.children()),
        "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


def main() -> None:
    from cxr_dist.config.loading import load_config
    from cxr_dist.evaluation.evaluate import evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.launch.train import run_training
    from tests.integration.workers import small_search

    dataset, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    until = time.monotonic() + seconds
    number = 0
    with pytest.MonkeyPatch.context() as patch:
        use_small_base(patch)
        while time.monotonic() < until:
            run = folder / "run"
            run_training(load_config(None, [*SMALL_RUN, f"seed={number}"]), dataset, run, launcher="local")
            evaluate_run(EvaluationSpec(run, folder / "evaluation"))
            if number % RUNS_PER_SEARCH == RUNS_PER_SEARCH - 1:
                small_search(dataset, folder / "search", {"model.dropout": {"choices": [0.05, 0.5]}})
            for left in folder.iterdir():
                shutil.rmtree(left)
            number += 1
            print("held", json.dumps(held()), flush=True)


if __name__ == "__main__":
    main()
