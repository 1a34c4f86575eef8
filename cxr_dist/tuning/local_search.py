"""A search in processes of this machine, without Ray: Optuna chooses, and its pruners stop.

A slot is a process. Trials that train the head alone take turns in it, as starting TensorFlow takes longer than such a
trial; one that trains upper layers too has a process of its own, which takes all its memory along when it ends.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cxr_dist.distributed.devices import prepare_devices, scratch_folder
from cxr_dist.tuning.experiment import Experiment, Outcome, Trial
from cxr_dist.tuning.sampler import Sampler
from cxr_dist.tuning.search_space import SearchConfig
from cxr_dist.tuning.trial import TIME_LIMIT_STATUS, TrialJob, compute_shared_features, run_trial
from cxr_dist.tuning.trial_jobs import Jobs, Watch
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import disk_error
from tfrecords_builder.common.interrupts import interrupts_held
from tfrecords_builder.common.pool import prepare_child

Serve = Callable[[Connection, int, str], None]
DEFAULT_CONCURRENT = 2
"""Trials at a time: a second fills the gaps of the first; more have no use of cores that one would use as well."""
TRIALS_PER_PROCESS = 25
"""After so many a warm process is replaced, whatever TensorFlow may have kept of them."""
_ENDING_S = 30.0


@dataclass
class _Slot:
    """A process that runs trials, and the trial that it runs now."""

    process: Any
    connection: Connection
    trial: Trial | None = None
    started: float = 0.0
    trials: int = 0


def search_locally(
    experiment: Experiment,
    sampler: Sampler,
    jobs: Jobs,
    watch: Watch,
    *,
    concurrent: int,
    cores: int,
    warm: bool,
    serve: Serve | None = None,
) -> None:
    """Run all trials that are left, so many at a time; whatever happens to one, the others go on.

    Args:
        cores: Of each process.
        warm: Whether a process may run trial after trial.
        serve: What a process does, given its connection, cores and the experiment's folder.
    """
    search = _LocalSearch(experiment, sampler, jobs, watch, cores, warm, serve or serve_trials)
    try:
        search.run(concurrent)
    finally:
        search.close()


def fill_cache(jobs: Jobs, experiment: Experiment, cores: int) -> None:
    """Compute what all trials read, in a process with all cores.

    Raises:
        UserError: it met something that the user can mend.
        RuntimeError: the process failed; its log is named.
    """
    context = multiprocessing.get_context("spawn")
    log = experiment.folder / "trials" / "features.log"
    mendable, said = context.Pipe(duplex=False)
    process = context.Process(target=_fill_cache, args=(jobs.shared(), cores, log, said), daemon=True)
    with interrupts_held():
        process.start()
    process.join()
    if mendable.poll():
        raise UserError(mendable.recv())
    if process.exitcode:
        raise RuntimeError(f"the features that all trials share could not be computed; see {log}")


def _fill_cache(job: TrialJob, cores: int, log: Path, said: Connection) -> None:
    from cxr_dist.config.schema import Config
    from cxr_dist.runs.loggers import ConsoleReporter

    prepare_child()
    _print_to(log)
    with scratch_folder():
        topology = prepare_devices(None, cores=cores)
        try:
            compute_shared_features(
                Config.model_validate(job.config), Path(job.dataset), Path(job.experiment), topology, ConsoleReporter()
            )
        except (UserError, OSError) as error:
            mendable = error if isinstance(error, UserError) else disk_error(error)
            if mendable is None:
                raise
            said.send(str(mendable))
    os._exit(0)  # TensorFlow's iterators may take a minute to end


class _LocalSearch:
    def __init__(
        self, experiment: Experiment, sampler: Sampler, jobs: Jobs, watch: Watch, cores: int, warm: bool, serve: Serve
    ) -> None:
        self._experiment, self._sampler, self._jobs, self._watch = experiment, sampler, jobs, watch
        self._cores, self._warm, self._serve = cores, warm, serve
        self._context = multiprocessing.get_context("spawn")
        self._slots: list[_Slot] = []

    def run(self, concurrent: int) -> None:
        left = self._left()
        following = next(left, None)
        while True:
            while following is not None and sum(slot.trial is not None for slot in self._slots) < concurrent:
                self._start(following)
                following = next(left, None)
            busy = {slot.connection: slot for slot in self._slots if slot.trial is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                self._hear(busy[connection])  # type: ignore[index]

    def _left(self) -> Iterator[TrialJob]:
        """Those that an earlier process began, then new ones, each chosen when there is room for it."""
        yield from self._jobs.interrupted(self._sampler)
        while (chosen := self._sampler.ask()) is not None:
            yield self._jobs.of(*chosen)

    def _start(self, job: TrialJob) -> None:
        slot = next((slot for slot in self._slots if slot.trial is None), None)
        if slot is None:
            slot = self._new_slot()
        slot.trial = self._experiment.begin(job.number, job.values)
        slot.started = time.monotonic()
        slot.trials += 1
        self._watch.began(slot.trial)
        try:
            slot.connection.send(job)
        except OSError:
            self._lost(slot)  # it died while it was idle

    def _new_slot(self) -> _Slot:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=self._serve, args=(theirs, self._cores, str(self._experiment.folder)))
        with interrupts_held():
            process.start()
        theirs.close()  # so that its end closes the connection
        slot = _Slot(process, ours)
        self._slots.append(slot)
        return slot

    def _hear(self, slot: _Slot) -> None:
        trial = slot.trial
        if trial is None:
            raise RuntimeError("a process without a trial spoke")
        try:
            kind, *told = slot.connection.recv()
        except (EOFError, OSError):
            self._lost(slot)
            return
        if kind == "epoch":
            row, best = told
            try:
                slot.connection.send(self._sampler.report(trial.number, int(row["epochs_done"]), best))
            except OSError:
                self._lost(slot)  # it ended while it waited for the answer
            return
        self._ended(slot, trial, None if kind == "done" else told[0])
        if not self._warm or slot.trials >= TRIALS_PER_PROCESS:
            self._retire(slot)

    def _lost(self, slot: _Slot) -> None:
        """Its process is gone: killed by its time limit, or by the system."""
        slot.process.join(_ENDING_S)
        status = slot.process.exitcode
        self._retire(slot)
        if slot.trial is not None:
            how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
            # Of a time limit the process wrote itself why.
            reason = None if status == TIME_LIMIT_STATUS else f"its process ended ({how}); out of memory?"
            self._ended(slot, slot.trial, reason)

    def _ended(self, slot: _Slot, trial: Trial, reason: str | None) -> Outcome:
        outcome = self._experiment.end(trial, time.monotonic() - slot.started, reason=reason)
        slot.trial = None
        self._sampler.tell(trial.number, outcome.finished())
        self._watch.ended(outcome)
        return outcome

    def _retire(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        slot.connection.close()
        slot.process.join(_ENDING_S)
        if slot.process.is_alive():
            slot.process.kill()
            slot.process.join()

    def close(self) -> None:
        """End all processes; a trial in the middle goes on with the next start."""
        for slot in self._slots:
            if slot.trial is not None:
                slot.process.kill()
        for slot in list(self._slots):
            self._retire(slot)


def serve_trials(connection: Connection, cores: int, folder: str) -> None:
    """What a slot's process does: trial after trial, until its connection is closed."""
    prepare_child()
    with scratch_folder():
        _serve_trials(connection, cores, Experiment(Path(folder)))
    os._exit(0)  # TensorFlow's iterators may take a minute to end


def _serve_trials(connection: Connection, cores: int, experiment: Experiment) -> None:
    topology = None
    while True:
        try:
            job: TrialJob = connection.recv()
        except EOFError:
            return
        _print_to(experiment.log(job.number))
        try:
            if topology is None:
                topology = prepare_devices(None, cores=cores)
            run_trial(job, topology, lambda row, best: _ask(connection, row, best), "local")
        except Exception as error:  # noqa: BLE001 - of any kind: the search goes on, and the trial's file says what
            connection.send(("failed", str(error).partition("\n")[0] or type(error).__name__))
            continue
        connection.send(("done",))


def _ask(connection: Connection, row: dict[str, Any], best: float) -> bool:
    connection.send(("epoch", row, best))
    answer: bool = connection.recv()
    return answer


def _print_to(path: Path) -> None:
    """What this process prints, and what C++ prints in it, goes to the file from now on."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def local_concurrency(search: SearchConfig, cores: int) -> int:
    """How many trials run at a time on so many cores.

    Raises:
        UserError: more are asked for than there are cores for.
    """
    each = search.cpus_per_trial
    fitting = cores if each is None else int(cores / each)
    if fitting < 1 or (search.concurrent or 1) > fitting:
        wanted = search.concurrent or 1
        raise UserError(
            f"search.concurrent {wanted} trials with search.cpus_per_trial {each or 1:g} need {wanted * (each or 1):g} "
            f"cores, and there are {cores}; ask for fewer"
        )
    return search.concurrent or (fitting if each else min(cores, DEFAULT_CONCURRENT))


def shares(cores: int, concurrent: int) -> int:
    """Cores of each of so many processes."""
    return max(1, cores // concurrent)
