"""One trial, in the process that runs it: a run of the one loop, told of and stopped by whoever runs the search."""

import gc
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import Topology
from cxr_dist.runs import run_folder
from cxr_dist.runs.corrupt_records import exclude_corrupt
from cxr_dist.runs.events import Event, Reporter, Reporters, closing
from cxr_dist.runs.loggers import run_reporters
from cxr_dist.runs.ranking import score_of
from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.runs.stop_request import StoppedError
from cxr_dist.tuning.experiment import SHARED, Experiment
from cxr_dist.tuning.search_space import Values
from cxr_dist.tuning.shared_stages import FirstStages, SharedBase, first_stage_key
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import write_text
from tfrecords_builder.common.places import parse_place
from tfrecords_builder.format.manifest import read_manifest

LOCK_WAIT_S = 60.0
"""For the process of an earlier attempt to end, which may outlive the search by moments."""
TIME_LIMIT_STATUS = 124
"""Of a process that its trial's time limit ended, as of the command `timeout`."""


@dataclass(frozen=True)
class TrialJob:
    """All that a trial's process needs to know; plain data."""

    number: int
    values: Values
    experiment: str
    dataset: str
    """The dataset's folder on this machine."""
    place: str
    """The dataset as it was given: a folder or an address."""
    config: dict[str, Any]
    """Of the trial, resolved."""
    time_limit_s: float | None = None

    @property
    def name(self) -> str:
        """Of the trial's run, in metrics."""
        return f"{Path(self.experiment).name}/{self.number:05d}"


class TrialStopped(StoppedError):  # noqa: N818 - a decision, not an error
    """Raised inside the loop of a trial that the search stops early."""


Report = Callable[[dict[str, Any], float], bool]
"""(the epoch's row, the best so far of what the selection maximises) -> whether to stop."""
Train = Callable[[Config, Path, Reporter, OpenDataset], dict[str, Any]]
"""(configuration, opened run, listeners, dataset) -> result.json."""


class _Listener(Reporter):
    """Hears of a run's epochs, and may end it."""

    def __init__(self, config: Config, report: Report) -> None:
        self._config, self._report, self._best = config, report, -math.inf

    def emit(self, event: Event) -> None:
        if event["kind"] != "epoch":
            return
        row = event["row"]
        self._best = max(self._best, score_of(row))
        # Nothing is saved by stopping what has done its last epoch, and its model would be lost.
        if self._report(row, self._best) and not is_last_epoch(self._config, row):
            raise TrialStopped


def ends_stage(config: Config, row: Mapping[str, Any]) -> bool:
    """Whether the epoch of a row of the history is the last planned one of its stage."""
    return bool(row["epoch"] == config.stages[row["stage"]].epochs)


def is_last_epoch(config: Config, row: Mapping[str, Any]) -> bool:
    """Whether it is the last planned one of all."""
    last = max(number for number, stage in config.stages.items() if stage.epochs)
    return row["stage"] == last and ends_stage(config, row)


def run_trial(
    job: TrialJob, topology: Topology, report: Report, launcher: str, reporters: Sequence[Reporter] = ()
) -> dict[str, Any] | None:
    """Train the trial in this process, from its newest checkpoint.

    Returns:
        result.json; None when it was stopped early.
    """
    from cxr_dist.training.loop import train

    def loop(config: Config, run: Path, listeners: Reporter, dataset: OpenDataset) -> dict[str, Any]:
        owned = Reporters([*reporters, *run_reporters(run, job.name, job.values)])
        with closing(owned):
            # The listener last: it may end the run at an epoch, which the others are to have.
            everyone = Reporters([owned, listeners])
            return train(config, dataset.folder, dataset.manifest, run, topology, everyone, launcher)

    try:
        return run_prepared(job, topology.replicas, report, loop)
    finally:
        _free_memory()


def run_prepared(job: TrialJob, replicas: int, report: Report, train: Train) -> dict[str, Any] | None:
    """Call `train` with the trial's folder opened, within the trial's time; why it fails is written down."""
    experiment = Experiment(Path(job.experiment))
    run, config = experiment.run(job.number), Config.model_validate(job.config)
    try:
        with ExitStack() as held:
            held.enter_context(_limited(job, experiment))
            dataset = OpenDataset(parse_place(job.place), Path(job.dataset), read_manifest(Path(job.dataset)))
            held.enter_context(run_folder.locked(run, LOCK_WAIT_S))
            run_folder.prepare(run, config, dataset.place, dataset.manifest)
            result = run_folder.read_result(run)
            if result is not None:
                return result
            excluded = exclude_corrupt(run, dataset.folder, dataset.manifest, config.input.max_corrupt_records)
            key = first_stage_key(config, excluded.fingerprint(dataset.manifest.fingerprint), replicas)
            base = held.enter_context(SharedBase(experiment.folder / SHARED, run).used())
            publisher = held.enter_context(FirstStages(experiment.folder / SHARED).used_by(run, key))
            return train(config, run, Reporters([base, publisher, _Listener(config, report)]), dataset)
    except TrialStopped:
        return None
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else one_line(error)
        write_text(experiment.failure(job.number), f"{text}\n{traceback.format_exc()}")
        raise


@contextmanager
def _limited(job: TrialJob, experiment: Experiment) -> Iterator[None]:
    """End this process when the trial has had its time: nothing less ends a step that hangs."""
    if job.time_limit_s is None:
        yield
        return

    def end() -> None:
        write_text(experiment.failure(job.number), f"exceeded its time limit of {job.time_limit_s:g} s\n")
        os._exit(TIME_LIMIT_STATUS)

    timer = threading.Timer(job.time_limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _free_memory() -> None:
    """Let go of the trial's graphs and variables: a warm process runs many."""
    import keras

    keras.backend.clear_session(free_memory=True)
    gc.collect()


def compute_shared_features(job: TrialJob, topology: Topology, reporter: Reporter) -> None:
    """Fill the feature cache with what the first stage of every trial reads, with all of the machine."""
    from cxr_dist.training.loop import compute_features

    config, dataset = Config.model_validate(job.config), Path(job.dataset)
    # Stands in for a run's folder; the list of corrupt records is written there, and nothing else.
    scratch = Path(job.experiment) / "trials" / "features"
    manifest = read_manifest(dataset)
    if config.input.max_corrupt_records:
        scratch.mkdir(parents=True, exist_ok=True)
        exclude_corrupt(scratch, dataset, manifest, config.input.max_corrupt_records)
    compute_features(config, dataset, manifest, scratch, topology, reporter)
    _free_memory()
