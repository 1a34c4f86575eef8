"""What is kept of a search: a folder whose files alone say which trials there are, what they set and how they went.

    EXPERIMENT/search.yaml          the search and the configuration its trials start from, resolved
    EXPERIMENT/experiment.json      the dataset
    EXPERIMENT/trials/00007.json    a trial: its values, its state; its run is the folder 00007 beside it
    EXPERIMENT/trials.parquet       one row per trial      } written anew whenever the search ends or is interrupted;
    EXPERIMENT/best.json            the best of them       } all they hold is in the files above

A trial's own process writes its run's folder, and the search's process all else. So whatever is killed when, the next
start finds what was finished, and goes on with what was not.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from cxr_dist.config.loading import read_yaml
from cxr_dist.runs import run_folder
from cxr_dist.runs.checkpoints import CheckpointFolder
from cxr_dist.runs.events import EndState
from cxr_dist.runs.loggers import end_mlflow_run
from cxr_dist.runs.ranking import best_index, rank, score_of
from cxr_dist.runs.versions import FORMAT, check_format
from cxr_dist.tuning import hparams
from cxr_dist.tuning.sampler import Finished
from cxr_dist.tuning.search_space import SearchPlan, Values, from_tree
from tfrecords_builder.common.errors import UserError, reading
from tfrecords_builder.common.files import is_temporary, write_atomically, write_json, write_text
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.common.places import Place, absolute
from tfrecords_builder.format.manifest import Manifest

SEARCH = "search.yaml"
EXPERIMENT = "experiment.json"
TRIALS = "trials"
SHARED = "shared"
TRIALS_TABLE = "trials.parquet"
BEST = "best.json"
PAGE = "search.html"
TUNE = "tune"
"""Ray Tune's own files."""
EVALUATION = "evaluation"

State = Literal["running", "complete", "stopped", "failed"]
"""Of an interrupted search, `running` is a trial that was begun and not ended."""
ENDED: tuple[State, ...] = ("complete", "stopped", "failed")
ANOTHER_OUT = "give another --out"


@dataclass(frozen=True)
class Trial:
    """A trial as its file has it."""

    number: int
    values: Values
    state: State = "running"
    reason: str = ""
    """Why it failed."""
    attempts: int = 1
    """How often it was started: more than once where the search was interrupted in its middle."""
    seconds: float = 0.0
    """Of all attempts that ended."""


@dataclass(frozen=True)
class TrialResult:
    """A trial, and what its run says of it."""

    trial: Trial
    history: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def objective(self) -> float | None:
        """The best of what the selection maximises; None before the first epoch."""
        return max(map(score_of, self.history), default=None)

    @property
    def best_row(self) -> dict[str, Any] | None:
        """The epoch that the run's best weights are from."""
        index = best_index(self.history)
        return None if index is None else self.history[index]

    def finished(self) -> Finished:
        """As the sampler learns from it."""
        best, curve = -math.inf, []
        for row in self.history:
            best = max(best, score_of(row))
            curve.append((int(row["epochs_done"]), best))
        objective = None if self.trial.state == "failed" else self.objective
        return Finished(self.trial.values, objective, self.trial.state == "stopped", tuple(curve))


class Experiment:
    """A search's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._keep: int | None = None

    @contextmanager
    def opened(self, plan: SearchPlan, dataset: Place, manifest: Manifest) -> Iterator[None]:
        """The folder, made or found, held against other searches.

        Raises:
            UserError: it cannot be made, another search is using it, or it holds something else.
        """
        with run_folder.locked(self.folder):
            is_begun = (self.folder / SEARCH).exists()
            ours = (SEARCH, EXPERIMENT)
            names = [path.name for path in self.folder.iterdir()]
            if not is_begun and any(name != LOCK and not is_temporary(name, ours) for name in names):
                raise UserError(f"{self.folder}: contains other files than a search; give a new folder as --out")
            info = {"format": FORMAT, "dataset": absolute(dataset), "fingerprint": manifest.fingerprint}
            if is_begun and (self.folder / EXPERIMENT).exists():
                _check_same(self, plan, info)
            else:
                write_text(self.folder / SEARCH, yaml.safe_dump(plan.tree(), sort_keys=False))
                write_json(self.folder / EXPERIMENT, info)
                (self.folder / TRIALS).mkdir(exist_ok=True)
            self._keep = plan.search.keep
            yield

    def plan(self) -> SearchPlan:
        """The search, as its folder has it."""
        with reading(_required(self.folder, SEARCH), ANOTHER_OUT):
            return from_tree(read_yaml(self.folder / SEARCH))

    def info(self) -> dict[str, Any]:
        """The dataset, as the folder has it."""
        return _read_formatted(_required(self.folder, EXPERIMENT), ANOTHER_OUT)

    def run(self, number: int) -> Path:
        """The run of a trial. Beside it are the trial's file and `.log`, what its process prints without Ray."""
        return self.folder / TRIALS / f"{number:05d}"

    def failure(self, number: int) -> Path:
        """Where a trial's process writes why it failed: a line, and after it what helps to find the cause."""
        return self.folder / TRIALS / f"{number:05d}.failure.txt"

    def trials(self) -> list[Trial]:
        """All that were begun, in order."""
        return [_read_trial(path) for path in sorted((self.folder / TRIALS).glob("?????.json"))]

    def results(self) -> list[TrialResult]:
        """Of all trials that were begun, in order."""
        return [self.result(trial) for trial in self.trials()]

    def begin(self, number: int, values: Values) -> Trial:
        """Write that a trial starts, for the first time or again."""
        path = self.run(number).with_suffix(".json")
        trial = Trial(number, values)
        if path.is_file():
            earlier = _read_trial(path)
            trial = replace(earlier, attempts=earlier.attempts + 1)
        self.failure(number).unlink(missing_ok=True)
        _write_trial(self.run(number), trial)
        name = f"{self.folder.name}/{number:05d}"
        hparams.write_start(self.run(number) / run_folder.TENSORBOARD, name, values)
        return trial

    def end(self, trial: Trial, seconds: float, *, reason: str | None = None) -> TrialResult:
        """Write how a trial ended.

        Args:
            trial: As `begin` gave it.
            seconds: Of this attempt.
            reason: Why it failed; None when it did not: then it is complete if its run is, and was stopped if not.
        """
        if self.failure(trial.number).is_file():  # of its own process, which knows best
            reason = self.failure(trial.number).read_text(encoding="utf-8").partition("\n")[0]
        is_complete = run_folder.read_result(self.run(trial.number)) is not None
        state: State = "complete" if is_complete else "stopped" if reason is None else "failed"
        why = reason or "" if state == "failed" else ""
        ended = replace(trial, state=state, reason=why, seconds=trial.seconds + seconds)
        _write_trial(self.run(trial.number), ended)
        self._close(ended)
        self._reduce_models()
        return self.result(ended)

    def _close(self, trial: Trial) -> None:
        """Say to other programs how a trial ended, as its process may have been killed; remove what is not needed.

        One that was stopped early did not fail.
        """
        run = self.run(trial.number)
        hparams.write_end(run / run_folder.TENSORBOARD, "failure" if trial.state == "failed" else "success")
        states: dict[State, EndState] = {"complete": "finished", "stopped": "killed", "failed": "failed"}
        end_mlflow_run(run, states[trial.state])
        checkpoints = CheckpointFolder(run / run_folder.CHECKPOINTS)
        if trial.state == "complete":
            checkpoints.keep_best_alone()
        else:
            checkpoints.remove_all()

    def _reduce_models(self) -> None:
        """Remove `model.keras` of all trials but the best `search.keep` so far: who leaves them is beaten for good."""
        if self._keep is None:
            self._keep = self.plan().search.keep
        whole = [trial for trial in self.trials() if (self.run(trial.number) / run_folder.MODEL).exists()]
        for result in ranked([self.result(trial) for trial in whole])[self._keep :]:
            (self.run(result.trial.number) / run_folder.MODEL).unlink(missing_ok=True)

    def result(self, trial: Trial) -> TrialResult:
        """A trial with what its run says of it."""
        run = self.run(trial.number)
        return TrialResult(trial, run_folder.read_history(run), run_folder.read_result(run))

    def settle(self) -> tuple[list[TrialResult], list[Trial]]:
        """What an earlier process left: the trials that ended, and those to go on with."""
        ended, open_ = [], []
        self._reduce_models()
        for trial in self.trials():
            if trial.state in ENDED:
                self._close(trial)  # the search may have been killed before it had done so
                ended.append(self.result(trial))
            elif run_folder.read_result(self.run(trial.number)) is not None:
                ended.append(self.end(trial, 0.0))  # it was done, and the search was killed before it heard of it
            else:
                open_.append(trial)
        return ended, open_

    def write_tables(self) -> TrialResult | None:
        """`trials.parquet` and `best.json` of all trials so far; the best of them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        results = self.results()
        keys = list(self.plan().search.parameters)
        mixed = {key for key in keys if len({type(result.trial.values.get(key)) for result in results}) > 1}
        rows = [_row(result, keys, mixed) for result in results]
        if rows:
            table = pa.Table.from_pylist(rows)
            write_atomically(self.folder / TRIALS_TABLE, lambda file: pq.write_table(table, file))
        best = best_result(results)
        if best is None:
            return None
        run, row = self.run(best.trial.number), best.best_row or {}
        relative = run.relative_to(self.folder)
        weights = CheckpointFolder(run / run_folder.CHECKPOINTS).newest_best()
        content = {
            "trial": best.trial.number,
            "values": best.trial.values,
            "metrics": {key: value for key, value in row.items() if key.startswith("val_")}
            | {"stage": row["stage"], "epoch": row["epoch"]},
            "run": str(relative),
            "checkpoint": str(weights.relative_to(self.folder)) if weights else None,
            "model": str(relative / run_folder.MODEL),
            "config": run_folder.read_config(run).tree(),
        }
        write_json(self.folder / BEST, content)
        return best


def _check_same(experiment: Experiment, plan: SearchPlan, info: dict[str, Any]) -> None:
    """Raise `UserError` where the folder's search is not this one."""
    earlier_info, earlier, now = experiment.info(), experiment.plan().tree(), plan.tree()
    for section in ("search", "config"):
        for key in sorted(earlier[section].keys() | now[section].keys()):
            # What changes no trial's result may change: how many, how many at a time, how long, how many are kept.
            if section == "search" and key in ("trials", "concurrent", "time_limit_s", "keep"):
                continue
            if earlier[section].get(key) != now[section].get(key):
                raise UserError(
                    f"{experiment.folder}: holds a search with another {section}.{key}; give another --out, or the "
                    "same settings to resume"
                )
    if earlier_info["fingerprint"] != info["fingerprint"]:
        other = run_folder.other_dataset(earlier_info["dataset"], info["dataset"])
        raise UserError(f"{experiment.folder}: holds a search on {other}; give another --out")


def _required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder}: is not the folder of a search (no {name}); give the --out of cxr-dist tune")
    return folder / name


def _write_trial(run: Path, trial: Trial) -> None:
    write_json(run.with_suffix(".json"), {"format": FORMAT, **asdict(trial)})


def ranked(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The complete trials, best first: by accuracy, then by loss, then the earlier."""
    complete = [result for result in results if result.trial.state == "complete" and result.best_row]
    return sorted(complete, key=lambda result: (*rank(result.best_row or {}), -result.trial.number), reverse=True)


def best_result(results: Sequence[TrialResult]) -> TrialResult | None:
    """The first of `ranked`."""
    return next(iter(ranked(results)), None)


def best_run(folder: Path) -> Path:
    """The run of the best trial, when `folder` is that of a search; `folder` itself when it is not.

    Raises:
        UserError: it is a search in which no trial is complete.
    """
    if not (folder / SEARCH).is_file():
        return folder
    if not (folder / BEST).is_file():
        raise UserError(f"{folder}: no trial of the search is complete; resume it with cxr-dist tune")
    with reading(folder / BEST, "start cxr-dist tune again to rewrite it"):
        return folder / str(json.loads((folder / BEST).read_text(encoding="utf-8"))["run"])


def _row(result: TrialResult, keys: list[str], mixed: set[str]) -> dict[str, Any]:
    """A row of trials.parquet. A key that varies keeps its dotted name."""
    trial, row, finished = result.trial, result.best_row or {}, result.result or {}
    return {
        "trial": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "attempts": trial.attempts,
        **{key: _cell(trial.values.get(key), mixed=key in mixed) for key in keys},
        "val_accuracy": row.get("val_accuracy"),
        "val_loss": row.get("val_loss"),
        "best_stage": row.get("stage"),
        "best_epoch": row.get("epoch"),
        "epochs_done": max((int(row["epochs_done"]) for row in result.history), default=0),
        "steps_computed": finished.get("steps_computed"),
        "resumed_from": finished.get("resumed_from"),
        "seconds": trial.seconds,
        "run": f"{TRIALS}/{trial.number:05d}",
    }


def _cell(value: Any, *, mixed: bool) -> Any:
    """A column has one type: where choices are of several, text."""
    if not mixed or value is None:
        return value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _read_formatted(path: Path, fix: str) -> dict[str, Any]:
    with reading(path, fix):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content)
        return content


def _read_trial(path: Path) -> Trial:
    fix = "remove it to run the trial again"
    content = _read_formatted(path, fix)
    del content["format"]
    with reading(path, fix):
        return Trial(**content)
