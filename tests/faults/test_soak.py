"""Half an hour of small runs, evaluations and searches: nothing that a process holds grows with their number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("CXR_SOAK_SECONDS", 1800))
LIMITS_PER_RUN = {
    "allocated": 128,
    "resident": 512,
    "objects": 20,
    "files": 0.05,
    "threads": 0.05,
    "children": 0.05,
    "temporary": 0.05,
}
"""Of the slopes; memory in KiB. No Python object stays (six graphs of functions a run once did: 1,000 and 310 KiB).
Some 60 KiB a run stay in TensorFlow's own C++; a plain Keras model of this size, fitted, saved, loaded and cleared with
`clear_session`, leaves 19,800 and 43,000 objects. What is resident also rises and falls with the allocator's needs."""


@pytest.mark.nightly
@pytest.mark.timeout(SECONDS + 600)
def test_nothing_grows(dataset: Path, tmp_path: Path) -> None:
    temporary, folder = tmp_path / "temporary", tmp_path / "work"
    temporary.mkdir()
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "tests.faults.soak", str(dataset), str(folder), str(SECONDS)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=SECONDS + 300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    held = [json.loads(line.removeprefix("held ")) for line in done.stdout.splitlines() if line.startswith("held ")]
    settled = held[len(held) // 3 :]  # the first runs load libraries and fill pools
    assert len(settled) >= 5
    slopes = {
        name: float(np.polyfit(np.arange(len(settled)), [each[name] for each in settled], 1)[0]) for name in settled[0]
    }
    print(f"{len(held)} runs; per run: {slopes}; at the end: {held[-1]}")
    assert {name: slope for name, slope in slopes.items() if slope > LIMITS_PER_RUN[name]} == {}
