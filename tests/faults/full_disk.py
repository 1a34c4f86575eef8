"""One scenario on a disk that is full from the N-th call on, for N = 1, 1 + EVERY, ...: preload `full_disk.so`.

python -m tests.faults.full_disk LIBRARY SCENARIO EVERY FOLDER SOURCE

The parent imports what the scenario needs, then a child of its own meets each N: it starts from what `prepare` leaves,
does `act` with the disk full from the N-th call on, and `check`s with room again. Ends when `act` needs fewer calls.
"""

import ctypes
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import ENVIRONMENT_ERRORS


@dataclass(frozen=True)
class Scenario:
    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    check: Callable[[Path, bool], None]
    """Gets whether `act` ended well."""


def build(source: Path) -> Scenario:
    from tfrecords_builder.build import BuildOptions, build_dataset
    from tfrecords_builder.format.manifest import read_manifest
    from tfrecords_builder.images import decode as images
    from tfrecords_builder.verify import verify_dataset
    from tfrecords_builder.writing import parts
    from tfrecords_builder.writing.output_folder import WORK_FOLDER

    total, in_part, decoded = 32, 16, 0
    parts.IMAGES_PER_PART = in_part
    decode_gray = images.decode_gray

    def decode(data: bytes, path: Path) -> images.Decoded:
        nonlocal decoded
        decoded += 1
        return decode_gray(data, path)

    images.decode_gray = decode

    def prepare(_folder: Path) -> None:
        pass

    def act(folder: Path) -> None:
        build_dataset(source, folder / "dataset", BuildOptions(image_size=8, workers=1, masks="ignore"))

    def check(folder: Path, ended_well: bool) -> None:
        nonlocal decoded
        dataset = folder / "dataset"
        try:
            read_manifest(dataset)
        except UserError:
            assert not ended_well
            kept = len(list((dataset / WORK_FOLDER).glob("part-*.json")))
            assert kept >= decoded // in_part - 1, "all parts but the one that could not be written"
            left = total - in_part * kept
        else:
            left = 0
            verify_dataset(dataset)
        decoded = 0
        act(folder)  # with room again, the same command makes the same dataset
        assert decoded == left, "what was decoded is not decoded again"
        verify_dataset(dataset)
        assert not list(dataset.glob(".*")), list(dataset.glob(".*"))

    return Scenario(prepare, act, check)


def keep() -> Scenario:
    from cxr_dist.runs.checkpoint_file import load_arrays
    from cxr_dist.runs.checkpoints import CheckpointFolder, Position

    def arrays(number: int) -> dict[str, Any]:
        return {"model/a": np.full(50_000, number, np.float32), "optimizer/0": np.array(number)}

    def prepare(folder: Path) -> None:
        CheckpointFolder(folder).save(Position(1), arrays(1), {"number": 1}, 1, arrays(1))
        CheckpointFolder(folder).save(Position(2), arrays(2), {"number": 2}, 1, arrays(1))

    def act(folder: Path) -> None:
        CheckpointFolder(folder).save(Position(3), arrays(3), {"number": 3}, 3, arrays(3))

    def check(folder: Path, ended_well: bool) -> None:
        checkpoints = CheckpointFolder(folder)
        checkpoints.clean()
        warnings: list[str] = []
        found = checkpoints.newest(warnings.append)
        assert found is not None
        assert not warnings, "half-written ones are not there at all"
        number = found.state["number"]
        assert found.position.epochs_done == number >= (3 if ended_well else 2)
        np.testing.assert_array_equal(found.arrays["model/a"], arrays(number)["model/a"])
        np.testing.assert_array_equal(found.best_arrays["model/a"], arrays(found.best_epochs_done)["model/a"])
        for path in folder.glob("*"):
            load_arrays(path)
        act(folder)
        assert len(list(folder.iterdir())) == 4

    return Scenario(prepare, act, check)


def report() -> Scenario:
    from cxr_dist.evaluation.assessment import assess
    from cxr_dist.evaluation.predictions import Predictions, read_predictions
    from cxr_dist.evaluation.report import FILES, METRICS, PREDICTIONS, Evaluation, metrics_json, write_evaluation
    from tfrecords_builder.common import figure

    figure.image_bytes = lambda _drawing, _kind: b"PNG" * 1000  # drawing takes seconds and writes nothing

    def predictions(seed: int) -> Predictions:
        rng = np.random.default_rng(seed)
        labels = np.arange(40, dtype=np.int32) % 4
        return Predictions(
            [f"{row}.png" for row in range(40)], labels, rng.dirichlet(np.ones(4), 40), ("A", "B", "C", "D")
        )

    def write(folder: Path, seed: int) -> None:
        write_evaluation(folder / "evaluation", Evaluation(predictions(seed), [], {"split": "test"}))

    def prepare(folder: Path) -> None:
        write(folder, 0)

    def check(folder: Path, ended_well: bool) -> None:
        out = folder / "evaluation"
        assert (out / METRICS).exists() >= ended_well
        if (out / METRICS).exists():
            found = read_predictions(out / PREDICTIONS)
            told = (out / METRICS).read_text(encoding="utf-8")
            expected = assess(found, comparable=True) | {"calibration_note": None}
            assert told == metrics_json(expected), "all of one evaluation"
            assert "</html>" in (out / "report.html").read_text(encoding="utf-8")
        write(folder, 1)
        assert {path.name for path in out.iterdir()} <= set(FILES)

    return Scenario(prepare, lambda folder: write(folder, 1), check)


def cache() -> Scenario:
    from cxr_dist.features.store import FeatureStore

    rows = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    about = {"number": 0}

    def act(folder: Path) -> None:
        store = FeatureStore(folder / "store", 1 << 30)
        with store.computing([about]):
            store.begin(about, rows.nbytes)
            with store.part(about, 0, (4,), "float32") as part:
                part.append(rows)
            store.commit(about, 1, (4,), "float32")

    def check(folder: Path, ended_well: bool) -> None:
        found = FeatureStore(folder / "store", 1 << 30).find(about)
        assert found is not None or not ended_well
        if found is None:
            act(folder)
            found = FeatureStore(folder / "store", 1 << 30).find(about)
        assert found is not None
        np.testing.assert_array_equal(found[np.arange(1000)], rows)

    return Scenario(lambda _folder: None, act, check)


def attempt(library: Any, scenario: Scenario, folder: Path, number: int) -> int:
    """Exit status of the child: 0 when `act` met the full disk, 3 when it needed fewer calls."""
    scenario.prepare(folder)
    library.arm(str(folder).encode(), ctypes.c_long(number))
    ended_well = True
    try:
        scenario.act(folder)
    except UserError:
        ended_well = False
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        ended_well = False
    calls = library.calls_made()
    library.arm(b"", ctypes.c_long(0))
    scenario.check(folder, ended_well)
    return 0 if calls >= number else 3


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    name, every, folder = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    scenario = {"build": lambda: build(Path(sys.argv[5])), "keep": keep, "report": report, "cache": cache}[name]()
    number = 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        child = os.fork()
        if not child:
            try:
                os._exit(attempt(library, scenario, folder, number))
            except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
                traceback.print_exc()
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 3:
            break
        if status:
            sys.exit(f"{name}: full from call {number} on: status {status}")
        number += every
    print(number - 1)


if __name__ == "__main__":
    main()
