"""A search in processes of this machine, without Ray.

Trials that train the head alone take turns in a process, as starting TensorFlow takes longer than such a trial; one
that trains upper layers too has a process of its own, which takes all its memory along when it ends.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cxr_dist.distributed.devices import prepare_devices, scratch_folder
from cxr_dist.tuning.experiment import Experiment
from cxr_dist.tuning.search import Search
from cxr_dist.tuning.search_space import SearchConfig, SearchPlan
from cxr_dist.tuning.trial import TIME_LIMIT_STATUS, TrialJob, compute_shared_features, run_trial
from tfrecords_builder.common.errors import UserError, one_line
from tfrecords_builder.common.files import disk_error
from tfrecords_builder.common.interrupts import interrupts_held
from tfrecords_builder.common.pool import default_workers, prepare_child

Serve = Callable[[Connection, int, str], None]
DEFAULT_CONCURRENT = 2
"""Trials at a time: a second fills the gaps of the first; more have no use of cores that one would use as well."""
TRIALS_PER_PROCESS = 25
"""After so many a warm process is replaced, whatever TensorFlow may have kept of them."""
EXIT_LIMIT_S = 30.0


@dataclass
class _Worker:
    """A process that runs trials."""

    process: Any
    connection: Connection
    trial: int | None = None
    """The number of the trial that it runs now."""
    trials: int = 0
    """Begun so far."""


@dataclass
class LocalTrials:
    """Runs the trials of a search in processes."""

    concurrent: int
    cores: int
    """Of each process."""
    is_warm: bool
    """Whether a process may run trial after trial."""
    serve: Serve
    """What a process does, given its connection, cores and the experiment's folder."""

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, search: Search) -> None:
        """Compute what all trials read, then run all that are left."""
        fill_cache(search, default_workers())
        self.run_trials(search)

    def run_trials(self, search: Search) -> None:
        """Run all that are left. A trial in the middle of an interrupted search goes on with its next start."""
        try:
            while True:
                while sum(worker.trial is not None for worker in self._workers) < self.concurrent:
                    job = search.begin_next()
                    if job is None:
                        break
                    self._start(job, search)
                busy = {worker.connection: worker for worker in self._workers if worker.trial is not None}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    self._receive(busy[connection], search)  # type: ignore[index]
        finally:
            for worker in list(self._workers):
                if worker.trial is not None:
                    worker.process.kill()
                self._retire(worker)

    def _start(self, job: TrialJob, search: Search) -> None:
        worker = next((worker for worker in self._workers if worker.trial is None), None)
        if worker is None:
            ours, theirs = self._context.Pipe()
            arguments = (theirs, self.cores, str(search.experiment.folder))
            worker = _Worker(self._context.Process(target=self.serve, args=arguments), ours)
            with interrupts_held():
                worker.process.start()
            theirs.close()  # so that its end closes the connection
            self._workers.append(worker)
        worker.trial = job.number
        worker.trials += 1
        try:
            worker.connection.send(job)
        except OSError:
            self._lost(worker, search)  # it died while it was idle

    def _receive(self, worker: _Worker, search: Search) -> None:
        trial = worker.trial
        if trial is None:
            return
        try:
            kind, content = worker.connection.recv()
            if kind == "epoch":
                worker.connection.send(search.should_stop(trial, [content]))
                return
        except (EOFError, OSError):
            self._lost(worker, search)
            return
        worker.trial = None
        search.end(trial, content)
        if not self.is_warm or worker.trials >= TRIALS_PER_PROCESS:
            self._retire(worker)

    def _lost(self, worker: _Worker, search: Search) -> None:
        """Its process is gone: killed by its time limit, or by the system."""
        worker.process.join(EXIT_LIMIT_S)
        status = worker.process.exitcode
        self._retire(worker)
        if worker.trial is not None:
            how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
            # Of a time limit the process wrote itself why.
            reason = None if status == TIME_LIMIT_STATUS else f"its process ended ({how}), perhaps out of memory"
            search.end(worker.trial, reason)

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(EXIT_LIMIT_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def local_trials(plan: SearchPlan) -> LocalTrials:
    """As many processes as were asked for, or two, which share the cores of this machine.

    Raises:
        UserError: more is asked than one machine has.
    """
    workers, cores = plan.search.workers_per_trial, default_workers()
    if workers > 1:
        raise UserError(f"search.workers_per_trial {workers}: needs --launcher ray; with local, a trial is one process")
    concurrent = local_concurrency(plan.search, cores)
    return LocalTrials(concurrent, max(1, cores // concurrent), plan.trains_head_alone(), serve_trials)


def local_concurrency(search: SearchConfig, cores: int) -> int:
    """How many trials run at a time on so many cores.

    Raises:
        UserError: more are asked for than there are cores for.
    """
    cpus = search.cpus_per_trial
    fitting = cores if cpus is None else int(cores / cpus)
    if fitting < 1 or (search.concurrent or 1) > fitting:
        wanted = search.concurrent or 1
        raise UserError(
            f"search.concurrent {wanted} trials with search.cpus_per_trial {cpus or 1:g} need {wanted * (cpus or 1):g} "
            f"cores, but there are {cores}; use fewer"
        )
    return search.concurrent or (fitting if cpus else min(cores, DEFAULT_CONCURRENT))


def fill_cache(search: Search, cores: int) -> None:
    """Compute what all trials read, in a process with all cores.

    Raises:
        UserError: it met something that the user can mend.
        RuntimeError: the process failed; its log is named.
    """
    context = multiprocessing.get_context("spawn")
    log = search.experiment.folder / "trials" / "features.log"
    problem, problem_end = context.Pipe(duplex=False)
    arguments = (search.shared_job(), cores, log, problem_end)
    process = context.Process(target=_fill_cache, args=arguments, daemon=True)
    with interrupts_held():
        process.start()
    process.join()
    if problem.poll():
        raise UserError(problem.recv())
    if process.exitcode:
        raise RuntimeError(f"the features that all trials share could not be computed; see {log}")


def _fill_cache(job: TrialJob, cores: int, log: Path, problem: Connection) -> None:
    from cxr_dist.runs.loggers import ConsoleReporter

    prepare_child()
    _print_to(log)
    with scratch_folder():
        topology = prepare_devices(None, cores=cores)
        try:
            compute_shared_features(job, topology, ConsoleReporter())
        except (UserError, OSError) as error:
            mendable = error if isinstance(error, UserError) else disk_error(error)
            if mendable is None:
                raise
            problem.send(str(mendable))
    os._exit(0)  # TensorFlow's iterators may take a minute to end


def serve_trials(connection: Connection, cores: int, folder: str) -> None:
    """What a worker does: trial after trial, until its connection is closed."""
    prepare_child()
    with scratch_folder():
        topology, experiment = None, Experiment(Path(folder))

        def report(row: Mapping[str, Any], best: float) -> bool:
            connection.send(("epoch", (row["epochs_done"], best)))
            should_stop: bool = connection.recv()
            return should_stop

        while True:
            try:
                job: TrialJob = connection.recv()
            except EOFError:
                break
            _print_to(experiment.run(job.number).with_suffix(".log"))
            try:
                topology = topology or prepare_devices(None, cores=cores)
                run_trial(job, topology, report, "local")
            except Exception as error:  # noqa: BLE001 - the search goes on, and the trial's file says what it was
                connection.send(("failed", one_line(error)))
            else:
                connection.send(("done", None))
    os._exit(0)  # TensorFlow's iterators may take a minute to end


def _print_to(path: Path) -> None:
    """What this process prints, and what C++ prints in it, goes to the file from now on."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
