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
from cxr_dist.runs.ranking import best_index, rank
from cxr_dist.runs.versions import FORMAT, check_format
from cxr_dist.tuning import hparams
from cxr_dist.tuning.sampler import Finished
from cxr_dist.tuning.search_space import SearchPlan, Values, from_tree
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import is_temporary, write_json, write_text
from tfrecords_builder.common.locks import LOCK
from tfrecords_builder.format.manifest import Manifest
from tfrecords_builder.remote import Place, absolute

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
class Outcome:
    """A trial, and what its run says of it."""

    trial: Trial
    history: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def objective(self) -> float | None:
        """The best validation accuracy; None before the first epoch."""
        return max((row["val_accuracy"] for row in self.history), default=None)

    @property
    def best_row(self) -> dict[str, Any] | None:
        """The epoch that the run's best weights are from."""
        index = best_index(self.history)
        return None if index is None else self.history[index]

    def finished(self) -> Finished:
        best, curve = -1.0, []
        for row in self.history:
            best = max(best, row["val_accuracy"])
            curve.append((int(row["epochs_done"]), best))
        failed = self.trial.state == "failed"
        return Finished(
            self.trial.values, None if failed else self.objective, self.trial.state == "stopped", tuple(curve)
        )


class Experiment:
    """A search's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._keep: int | None = None

    # -- the search -------------------------------------------------------------------------------

    @contextmanager
    def begun(self, plan: SearchPlan, dataset: Place, manifest: Manifest) -> Iterator[None]:
        """The folder, made or found, held against other searches.

        Raises:
            UserError: it cannot be made, another search is using it, or it holds something else.
        """
        with run_folder.locked(self.folder):
            ours = (SEARCH, EXPERIMENT)
            foreign = [
                path for path in self.folder.iterdir() if path.name != LOCK and not is_temporary(path.name, ours)
            ]
            if not (self.folder / SEARCH).exists() and foreign:
                raise UserError(
                    f"{self.folder}: holds something that is not a search of this program; give a new folder as --out"
                )
            written = {"format": FORMAT, "dataset": absolute(dataset), "fingerprint": manifest.fingerprint}
            if (self.folder / SEARCH).exists() and (self.folder / EXPERIMENT).exists():
                self._check_same(plan, written)
            else:
                write_text(self.folder / SEARCH, yaml.safe_dump(plan.tree(), sort_keys=False))
                write_json(self.folder / EXPERIMENT, written)
                (self.folder / TRIALS).mkdir(exist_ok=True)
            self._keep = plan.search.keep
            yield

    def _check_same(self, plan: SearchPlan, written: dict[str, Any]) -> None:
        searched = self.info()
        earlier = self.plan().tree()
        now = plan.tree()
        for name in ("search", "config"):
            for key in sorted(earlier[name].keys() | now[name].keys()):
                # What changes no trial's result may change: how many, how many at a time, how long, how many are kept.
                if name == "search" and key in ("trials", "concurrent", "time_limit_s", "keep"):
                    continue
                before, after = earlier[name].get(key), now[name].get(key)
                if before != after:
                    raise UserError(
                        f"{self.folder}: holds a search with another {name}.{key}; give another --out, or the same "
                        "settings to go on"
                    )
        if searched["fingerprint"] != written["fingerprint"]:
            other = run_folder.other_dataset(searched["dataset"], written["dataset"])
            raise UserError(f"{self.folder}: holds a search on {other}; give another --out")

    def plan(self) -> SearchPlan:
        self._require(SEARCH)
        try:
            return from_tree(read_yaml(self.folder / SEARCH))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder / SEARCH}: damaged ({str(error).splitlines()[0]})") from None

    def info(self) -> dict[str, Any]:
        self._require(EXPERIMENT)
        return _read_formatted(self.folder / EXPERIMENT)

    def _require(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise UserError(f"{self.folder}: is not the folder of a search (no {name}); give what tune wrote")

    # -- trials -----------------------------------------------------------------------------------

    def run(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:05d}"

    def log(self, number: int) -> Path:
        """What the trial's process prints."""
        return self.folder / TRIALS / f"{number:05d}.log"

    def failure(self, number: int) -> Path:
        """Where a trial's process writes why it failed: a line, and after it what helps to find the cause."""
        return self.folder / TRIALS / f"{number:05d}.failure.txt"

    def write(self, trial: Trial) -> None:
        write_json(self._file(trial.number), {"format": FORMAT, **asdict(trial)})

    def _file(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:05d}.json"

    def trials(self) -> list[Trial]:
        """All that were begun, in order."""
        found = []
        for path in sorted((self.folder / TRIALS).glob("?????.json")):
            found.append(_read_trial(path))
        return found

    def begin(self, number: int, values: Values) -> Trial:
        """Write that a trial starts, for the first time or again."""
        earlier = _read_trial(self._file(number)) if self._file(number).is_file() else None
        trial = replace(earlier, attempts=earlier.attempts + 1) if earlier else Trial(number, values)
        self.failure(number).unlink(missing_ok=True)
        self.write(trial)
        name = f"{self.folder.name}/{number:05d}"
        hparams.write_start(self.run(number) / run_folder.TENSORBOARD, name, values)
        return trial

    def end(self, trial: Trial, seconds: float, *, reason: str | None = None) -> Outcome:
        """Write how a trial ended.

        Args:
            trial: As `begin` gave it.
            seconds: Of this attempt.
            reason: Why it failed; None when it did not: then it is complete if its run is, and was stopped if not.
        """
        if self.failure(trial.number).is_file():  # of its own process, which knows best
            reason = self.failure(trial.number).read_text(encoding="utf-8").partition("\n")[0]
        result = run_folder.read_result(self.run(trial.number))
        state: State = "complete" if result is not None else "stopped" if reason is None else "failed"
        ended = replace(
            trial, state=state, reason=reason or "" if state == "failed" else "", seconds=trial.seconds + seconds
        )
        self.write(ended)
        self._close(ended)
        self._reduce_models()
        return self.outcome(ended)

    def _close(self, trial: Trial) -> None:
        """Say to other programs how a trial ended, where its own process was killed too, and remove what is not needed.

        One that was stopped early did not fail.
        """
        run = self.run(trial.number)
        hparams.write_end(run / run_folder.TENSORBOARD, "failure" if trial.state == "failed" else "success")
        states: dict[State, EndState] = {"complete": "finished", "stopped": "killed", "failed": "failed"}
        end_mlflow_run(run, states[trial.state])
        self._reduce(trial)

    def _reduce(self, trial: Trial) -> None:
        """Keep of an ended trial what its result needs: the best weights where it is complete, else no weights."""
        checkpoints = CheckpointFolder(self.run(trial.number) / run_folder.CHECKPOINTS)
        if trial.state == "complete":
            checkpoints.keep_best_alone()
        else:
            checkpoints.remove_all()

    def _reduce_models(self) -> None:
        """Remove `resnet.keras` of all trials but the best `search.keep` so far: who leaves them is beaten for good."""
        models = [path.parent for path in (self.folder / TRIALS).glob(f"?????/{run_folder.MODEL}")]
        if self._keep is None:
            self._keep = self.plan().search.keep
        whole = [self.outcome(each) for each in self.trials() if self.run(each.number) in models]
        for outcome in ranked(whole)[self._keep :]:
            (self.run(outcome.trial.number) / run_folder.MODEL).unlink(missing_ok=True)

    def outcome(self, trial: Trial) -> Outcome:
        run = self.run(trial.number)
        return Outcome(trial, run_folder.read_history(run), run_folder.read_result(run))

    def settle(self) -> tuple[list[Outcome], list[Trial]]:
        """What an earlier process left: the trials that ended, and those to go on with."""
        ended, open_ = [], []
        self._reduce_models()
        for trial in self.trials():
            if trial.state in ENDED:
                self._close(trial)  # the search may have been killed before it had done so
                ended.append(self.outcome(trial))
            elif run_folder.read_result(self.run(trial.number)) is not None:
                ended.append(self.end(trial, 0.0))  # it was done, and the search was killed before it heard of it
            else:
                open_.append(trial)
        return ended, open_

    # -- what it leaves ---------------------------------------------------------------------------

    def write_tables(self) -> Outcome | None:
        """`trials.parquet` and `best.json` of all trials so far; the best of them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from tfrecords_builder.common.files import write_atomically

        outcomes = [self.outcome(trial) for trial in self.trials()]
        keys = list(self.plan().search.parameters)
        mixed = {key for key in keys if len({type(each.trial.values.get(key)) for each in outcomes}) > 1}
        rows = [_row(each, keys, mixed) for each in outcomes]
        if rows:
            table = pa.Table.from_pylist(rows)
            write_atomically(self.folder / TRIALS_TABLE, lambda file: pq.write_table(table, file))
        best = best_outcome(outcomes)
        if best is not None:
            write_json(self.folder / BEST, self._best_tree(best))
        return best

    def _best_tree(self, best: Outcome) -> dict[str, Any]:
        run = self.run(best.trial.number)
        relative = run.relative_to(self.folder)
        best_file = CheckpointFolder(run / run_folder.CHECKPOINTS).newest_best()
        row = best.best_row or {}
        return {
            "trial": best.trial.number,
            "values": best.trial.values,
            "metrics": {key: value for key, value in row.items() if key.startswith("val_")}
            | {"stage": row["stage"], "epoch": row["epoch"]},
            "run": str(relative),
            "checkpoint": str(best_file.relative_to(self.folder)) if best_file else None,
            "model": str(relative / run_folder.MODEL),
            "config": run_folder.read_config(run).tree(),
        }


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The complete trials, best first: by accuracy, then by loss, then the earlier."""
    complete = [each for each in outcomes if each.trial.state == "complete" and each.best_row]
    return sorted(complete, key=_rank, reverse=True)


def best_outcome(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The first of `ranked`."""
    return next(iter(ranked(outcomes)), None)


def best_run(folder: Path) -> Path:
    """The run of the best trial, when `folder` is that of a search; `folder` itself when it is not.

    Raises:
        UserError: it is a search in which no trial is complete.
    """
    if not (folder / SEARCH).is_file():
        return folder
    if not (folder / BEST).is_file():
        raise UserError(f"{folder}: no trial of the search is complete yet; start it again with tune to go on")
    best = _read_json(folder / BEST)
    try:
        return folder / str(best["run"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / BEST}: damaged (no run); start tune again to write it anew") from None


def _rank(outcome: Outcome) -> tuple[float, float, int]:
    return (*rank(outcome.best_row or {}), -outcome.trial.number)


def _row(outcome: Outcome, keys: list[str], mixed: set[str]) -> dict[str, Any]:
    """A row of trials.parquet. A key that varies keeps its dotted name."""
    trial, row, result = outcome.trial, outcome.best_row or {}, outcome.result or {}
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
        "epochs_done": max((int(each["epochs_done"]) for each in outcome.history), default=0),
        "steps_computed": result.get("steps_computed"),
        "resumed_from": result.get("resumed_from"),
        "seconds": trial.seconds,
        "run": f"{TRIALS}/{trial.number:05d}",
    }


def _cell(value: Any, *, mixed: bool) -> Any:
    """A column has one type: where choices are of several, as text."""
    if not mixed or value is None:
        return value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _read_formatted(path: Path) -> dict[str, Any]:
    raw = _read_json(path)
    try:
        check_format(path, raw)
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return dict(raw)


def _read_trial(path: Path) -> Trial:
    raw = _read_formatted(path)
    try:
        return Trial(**{key: value for key, value in raw.items() if key != "format"})
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}); remove it to run the trial anew") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
