"""Search spaces, what a sampler tries, what is kept of trials, and what each trial of a cluster gets."""

import itertools
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, strategies as some

import tune_configs
from cxr_dist.config.loading import resolve_preset
from cxr_dist.launch.placement import Node, plan_trials
from cxr_dist.runs import checkpoints, run_folder
from cxr_dist.runs.checkpoints import Position
from cxr_dist.tuning.experiment import (
    BEST,
    EXPERIMENT,
    SEARCH,
    TRIALS,
    Experiment,
    Trial,
    TrialResult,
    best_result,
    best_run,
)
from cxr_dist.tuning.figures import Point, best_so_far, position
from cxr_dist.tuning.page import importance, render
from cxr_dist.tuning.sampler import Finished, Sampler
from cxr_dist.tuning.search import Search
from cxr_dist.tuning.search_space import Parameter, SearchConfig, SearchPlan, from_tree, load_search
from cxr_dist.tuning.shared_stages import FirstStages, SharedBase, first_stage_key
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

DROPOUT, RATE, DEPTH = "model.dropout", "stages.1.learning_rate", "stages.2.unfreeze_layers"
SPACE = {DROPOUT: {"low": 0.0, "high": 0.5}, RATE: {"low": 1e-4, "high": 1e-2, "log": True}}


def plan_of(
    parameters: dict[str, object] = SPACE, layer: dict[str, object] | None = None, **changes: object
) -> SearchPlan:
    search = SearchConfig.model_validate({"parameters": parameters, "scheduler": "off", **changes})
    return SearchPlan(search, (("test ", layer or {}),))


@pytest.mark.parametrize("name", ["search", "search_cpu"])
def test_search_presets_load_and_vary_what_they_say(name: str) -> None:
    path = Path(tune_configs.__file__).parent / f"{name}.yaml"
    plan = load_search(resolve_preset(Path(name)) or path)
    assert list(plan.search.parameters) == list(yaml.safe_load(path.read_text())["search"]["parameters"])
    first = Sampler(plan).ask()
    assert first == (0, plan.base_values()), "the first trial is the recipe itself"
    rate = plan.trial_config({RATE: 4e-3}).stages[2].learning_rate
    assert rate == pytest.approx(4e-4), "stage 2 follows at a tenth"
    assert from_tree(json.loads(json.dumps(plan.tree()))).tree() == plan.tree()


def test_a_search_of_the_head_alone_is_known_as_such() -> None:
    assert load_search(resolve_preset(Path("search_cpu")) or Path()).trains_head_alone()
    assert not load_search(resolve_preset(Path("search")) or Path()).trains_head_alone()
    assert not plan_of(
        {**SPACE, "stages.2.epochs": {"choices": [0, 1]}}, {"stages": {2: {"epochs": 0}}}
    ).trains_head_alone()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["search.parameters={model.dropot: {low: 0, high: 0.5}}"], "did you mean model.dropout?"),
        (["search.parameters={model.dropout: {low: 0, high: 1.5}}"], "model.dropout 1.5"),
        (["search.parameters={model.dropout: {low: 0.5, high: 0.1}}"], "low must be below high"),
        (["search.parameters={model.dropout: {low: 0.5}}"], "both be given"),
        (["search.parameters={model.dropout: {choices: [0.1], log: true}}"], "belong to a range"),
        (["search.parameters={stages.1.learning_rate: {low: 0, high: 1, log: true}}"], "low above 0"),
        (["search.parameters={stages.3.epochs: {low: 0, high: 1}}"], "stage"),
        (["search.parameters={selection.metric: {choices: [accuracy, f1_macro]}}"], "ranks the trials"),
        (["search.parameters={}"], "search.parameters"),
        (["search.trials=0"], "search.trials"),
        (["search.trails=4"], "search.trails"),
        (["search.sampler=grid"], "needs choices"),
        (["search.gpus_per_trial=1.5"], "fraction"),
        (["search=4"], "keys of its own"),
        (["stages.1.epoch=4"], "stages.1.epochs"),
    ],
)
def test_what_is_wrong_in_a_space_is_one_line_that_names_it(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_search(resolve_preset(Path("search_cpu")) or Path(), overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_no_search_space() -> None:
    with pytest.raises(UserError, match="no section search"):
        load_search(resolve_preset(Path("cpu")) or Path())


@given(
    low=some.floats(1e-6, 10), width=some.floats(1e-3, 10), log=some.booleans(), seed=some.integers(0, 1000),
    sampler=some.sampled_from(["tpe", "random"]),
)  # fmt: skip
def test_samples_stay_in_their_ranges(low: float, width: float, log: bool, seed: int, sampler: str) -> None:
    parameters = {
        "augmentation.zoom": {"low": low, "high": low + width, "log": log},
        DEPTH: {"low": 10, "high": 50, "step": 20},
        "stages.2.optimizer": {"choices": ["adam", "sgd"]},
    }
    plan = plan_of(parameters, seed=seed, sampler=sampler, start_from_base=False, trials=12)
    chosen = Sampler(plan)
    for _ in range(12):
        number, values = chosen.ask() or (-1, {})
        assert low <= values["augmentation.zoom"] <= low + width
        assert values[DEPTH] in (10, 30, 50)
        assert values["stages.2.optimizer"] in ("adam", "sgd")
        assert all(0 <= position(plan.search.parameters[key], value) <= 1 for key, value in values.items())
        chosen.tell(number, Finished(values, 0.5))
    assert chosen.ask() is None


def test_a_grid_has_every_point_once_wherever_it_is_interrupted() -> None:
    parameters = {DROPOUT: {"choices": [0.1, 0.2]}, DEPTH: {"low": 0, "high": 100, "step": 50}}
    expected = [{DROPOUT: a, DEPTH: b} for a, b in itertools.product([0.1, 0.2], [0, 50, 100])]
    plan = plan_of(parameters, sampler="grid", trials=50)
    for started in range(len(expected) + 1):
        earlier = [Finished(values, 0.5) for values in expected[:started]]
        sampler, found = Sampler(plan, earlier, started), expected[:started]
        while (chosen := sampler.ask()) is not None:
            assert chosen[0] == len(found)
            found.append(chosen[1])
            sampler.tell(chosen[0], Finished(chosen[1], None))
        assert found == expected


def test_tpe_finds_a_peak_that_random_search_does_not() -> None:
    def best(sampler_name: str, seed: int) -> float:
        plan = plan_of(sampler=sampler_name, trials=40, seed=seed, start_from_base=False)
        sampler, found = Sampler(plan), []
        while (chosen := sampler.ask()) is not None:
            number, values = chosen
            found.append(
                1 - (values[DROPOUT] - 0.11) ** 2 - (position(plan.search.parameters[RATE], values[RATE]) - 0.8) ** 2
            )
            sampler.tell(number, Finished(values, found[-1]))
        return max(found)

    wins = sum(best("tpe", seed) > best("random", seed) for seed in range(7))
    assert wins >= 5


def test_a_sampler_that_goes_on_knows_what_was_and_does_not_repeat_its_draws() -> None:
    plan = plan_of(sampler="random", trials=6, start_from_base=False)
    whole, values = Sampler(plan), []
    while (chosen := whole.ask()) is not None:
        values.append(chosen[1])
    resumed = Sampler(plan, [Finished(value, 0.5) for value in values[:3]], 3)
    further = [chosen[1] for chosen in iter(resumed.ask, None)]
    assert len(further) == 3
    assert not any(value in values[:3] for value in further)


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_far_below_the_others_is_stopped_and_the_best_is_not(scheduler: str) -> None:
    plan = plan_of(scheduler=scheduler, trials=12, sampler="random", reduction_factor=2)
    sampler, stopped = Sampler(plan), []
    for quality in [0.5, 0.6, 0.7, 0.8, 0.1, 0.9]:
        number, values = sampler.ask() or (-1, {})
        for epoch in range(1, 9):
            if sampler.report(number, epoch, quality + epoch / 1000):
                stopped.append(quality)
                break
        sampler.tell(number, Finished(values, quality, quality in stopped, ((1, quality),)))
    assert 0.1 in stopped
    assert 0.9 not in stopped


def _result(number: int, accuracy: float, state: str = "complete", loss: float = 0.5, **values: float) -> TrialResult:
    row = {"val_accuracy": accuracy, "val_loss": loss, "epochs_done": 1, "stage": 1, "epoch": 1}
    found = {DROPOUT: 0.1, RATE: 1e-3} | values
    return TrialResult(Trial(number, found, state), [row], {"steps_computed": 7})  # type: ignore[arg-type]


def test_the_best_is_complete_then_accurate_then_of_low_loss_then_early() -> None:
    results = [
        _result(0, 0.8), _result(1, 0.99, "stopped"), _result(2, 0.99, "failed"), _result(3, 0.9, loss=0.4),
        _result(4, 0.9, loss=0.3), _result(5, 0.9, loss=0.3),
    ]  # fmt: skip
    best = best_result(results)
    assert best is not None
    assert best.trial.number == 4
    assert best_result(results[1:3]) is None


def test_importance_finds_the_key_that_matters() -> None:
    plan = plan_of()
    rates = [10 ** (-4 + 2 * (number * 7 % 16) / 16) for number in range(16)]
    results = [
        _result(number, 0.5 + 0.4 * position(plan.search.parameters[RATE], rate), **{DROPOUT: number / 40, RATE: rate})
        for number, rate in enumerate(rates)
    ]
    shares = importance(plan, results)
    assert shares is not None
    assert shares[RATE] > 0.8
    assert importance(plan, results[:5]) is None


def test_the_page_loads_nothing_and_escapes_names() -> None:
    results = [
        _result(0, 0.8),
        _result(1, 0.7, "stopped"),
        TrialResult(Trial(2, {DROPOUT: 0.2, RATE: 1e-3}, "failed", "<script>"), [], None),
    ]
    page = render(plan_of(), results, "<b>dataset")
    assert "<script>" not in page
    assert "<b>dataset" not in page
    assert "1 complete, 1 stopped early, 1 failed" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<img ") == page.count('alt="') == 4


def test_best_so_far_never_falls_and_counts_complete_trials_alone() -> None:
    points = [
        Point(number, {}, state, objective)
        for number, (state, objective) in enumerate(
            [("complete", 0.5), ("stopped", 0.9), ("complete", 0.4), ("complete", 0.7)]
        )
    ]
    assert best_so_far(points[::-1]) == ([0, 2, 3], [0.5, 0.5, 0.7])


def test_a_folder_of_something_else_is_no_search(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("")
    manifest = SimpleNamespace(fingerprint="a")
    with (
        pytest.raises(UserError, match="other files than a search"),
        Experiment(tmp_path).opened(plan_of(), tmp_path, manifest),
    ):  # type: ignore[arg-type]
        pass
    assert best_run(tmp_path) == tmp_path


def test_a_search_goes_on_with_more_trials_and_not_with_other_settings_or_data(tmp_path: Path) -> None:
    out = tmp_path / "search"

    def begin(plan: SearchPlan, fingerprint: str = "a", data: Path = tmp_path) -> None:
        with Experiment(out).opened(plan, data, SimpleNamespace(fingerprint=fingerprint)):  # type: ignore[arg-type]
            pass

    begin(plan_of(trials=4))
    begin(plan_of(trials=9))
    with pytest.raises(UserError, match=r"search\.seed"):
        begin(plan_of(seed=3))
    with pytest.raises(UserError, match=r"config\.seed"):
        begin(plan_of(layer={"seed": 5}))
    with pytest.raises(UserError, match=f"the dataset {tmp_path} as it was before it was rebuilt; give another --out"):
        begin(plan_of(), "b")
    with pytest.raises(UserError, match=rf"another dataset \({tmp_path}\); give another --out"):
        begin(plan_of(), "b", tmp_path / "other")
    with pytest.raises(UserError, match="no trial of the search is complete"):
        best_run(out)
    (out / BEST).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        best_run(out)


def test_a_search_or_a_trial_of_another_format_is_one_line(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "search")
    data = SimpleNamespace(fingerprint="a")

    def begin() -> None:
        with experiment.opened(plan_of(), tmp_path, data):  # type: ignore[arg-type]
            pass

    begin()
    experiment.begin(0, {"model.dropout": 0.1})
    trial = experiment.folder / TRIALS / "00000.json"
    as_written = json.loads(trial.read_text())
    for change, words in (
        ({"format": 2}, "has format 2"),
        ({"unknown": 1}, "damaged .*unknown.*; remove it to run the trial again"),
    ):
        trial.write_text(json.dumps(as_written | change))
        for read in (experiment.trials, lambda: experiment.begin(0, {})):
            with pytest.raises(UserError, match=words) as caught:
                read()
            assert str(caught.value).startswith(f"{trial}: ")
            assert "\n" not in str(caught.value)
    trial.write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        experiment.trials()
    trial.write_text(json.dumps(as_written))
    assert experiment.trials()[0].values == {"model.dropout": 0.1}
    (experiment.folder / EXPERIMENT).write_text(json.dumps(experiment.info() | {"format": 2}))
    (experiment.folder / SEARCH).write_text("of: another version")
    with pytest.raises(UserError, match=rf"{EXPERIMENT}: has format 2, .*; use the version that wrote it"):
        begin()


def test_a_trial_finds_the_dataset_from_a_folder_of_its_own(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune starts each trial in another working folder than the command's."""
    monkeypatch.chdir(dataset.parent)
    given = Path(dataset.name)
    plan = plan_of({"model.dropout": {"choices": [0.1]}})
    data = run_folder.OpenDataset(given, given, read_manifest(given))
    job = Search(plan, Experiment(tmp_path / "search"), data).job(0, {"model.dropout": 0.1})
    assert (Path(job.dataset), Path(job.place)) == (dataset, dataset)


def test_first_stages_are_equal_only_where_all_that_decides_them_is() -> None:
    def key(*changes: tuple[str, object], fingerprint: str = "a", replicas: int = 1) -> str | None:
        return first_stage_key(plan_of().trial_config(dict(changes)), fingerprint, replicas)  # type: ignore[arg-type]

    assert key() == key((DEPTH, 32)) == key(("stages.2.learning_rate", 1.0)) == key(("stages.2.epochs", 1))
    others = [key((DROPOUT, 0.11)), key((RATE, 0.5)), key(("seed", 4)), key(fingerprint="b"), key(replicas=2)]
    assert len({key(), *others}) == 6
    assert key(("stages.2.epochs", 0)) is None, "nothing follows"


def ended_trial(
    experiment: Experiment, number: int, accuracy: float, loss: float, *, reason: str | None = None
) -> None:
    """A trial's folder as its process leaves it, and its end."""
    import numpy as np

    trial, run = experiment.begin(number, {DROPOUT: 0.1}), experiment.run(number)
    folder = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS)
    folder.start_from({"model/base": np.zeros(3)})
    with SharedBase(experiment.folder / "shared", run).used():
        for done in (1, 2):
            arrays = {"model/base": np.zeros(3), "model/head": np.full(2, number)}
            folder.save(Position(done), arrays, {}, done, arrays)
    row = {"stage": 1, "epoch": 2, "epochs_done": 2, "val_accuracy": accuracy, "val_loss": loss}
    run_folder.write_history(run, [row])
    if reason is None:
        (run / run_folder.MODEL).write_bytes(b"model")
        (run / run_folder.RESULT).write_text("{}")
    experiment.end(trial, 1.0, reason=reason)


def kept(experiment: Experiment, pattern: str) -> list[int]:
    """The trials whose folder holds such a file."""
    return [trial.number for trial in experiment.trials() if list(experiment.run(trial.number).glob(pattern))]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_best_trials_so_far_are_whole_and_the_others_keep_what_training_changed(tmp_path: Path, keep: int) -> None:
    experiment = Experiment(tmp_path / "search")
    (tmp_path / "search" / "trials").mkdir(parents=True)
    (tmp_path / "search" / "search.yaml").write_text(yaml.safe_dump(plan_of(keep=keep).tree()))
    figures = [(0.5, 0.3), (0.25, 0.1), (0.75, 0.2), (0.75, 0.1), (0.5, 0.3), (0.75, 0.1)]
    for number, pair in enumerate(figures):
        ended_trial(experiment, number, *pair)
        expected = sorted(range(number + 1), key=lambda each: (-figures[each][0], figures[each][1], each))[:keep]
        assert kept(experiment, run_folder.MODEL) == sorted(expected)
    ended_trial(experiment, 6, 1.0, 0.0, reason="out of memory")
    assert kept(experiment, "checkpoints/best-00002.safetensors") == list(range(6)), "a failed trial keeps no weights"
    assert kept(experiment, "checkpoints/epoch-*") == kept(experiment, "checkpoints/best-00001.safetensors") == []
    assert kept(experiment, "checkpoints/base-*") == list(range(6))
    bases = {path.stat().st_ino for path in (tmp_path / "search").rglob("base-*.safetensors")}
    assert len(bases) == 1, "one file of base weights on the disk"
    for number in range(6):
        folder = checkpoints.CheckpointFolder(experiment.run(number) / run_folder.CHECKPOINTS)
        assert folder.load_best(folder.best(2))["model/head"].tolist() == [number, number]
        assert folder.load_best(folder.best(2))["model/base"].tolist() == [0, 0, 0]


def test_a_search_that_was_killed_before_it_removed_files_does_so_at_its_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment(tmp_path / "search")
    (tmp_path / "search" / "trials").mkdir(parents=True)
    (tmp_path / "search" / "search.yaml").write_text(yaml.safe_dump(plan_of().tree()))
    with monkeypatch.context() as killed:
        killed.setattr(Experiment, "_close", lambda *_: None)
        killed.setattr(Experiment, "_reduce_models", lambda *_: None)
        for number in range(3):
            ended_trial(experiment, number, 0.5, 0.1)
    assert kept(experiment, run_folder.MODEL) == kept(experiment, "checkpoints/epoch-*") == [0, 1, 2]
    ended, left = experiment.settle()
    assert (len(ended), left) == (3, [])
    assert kept(experiment, run_folder.MODEL) == [0]
    assert kept(experiment, "checkpoints/epoch-*") == []
    assert kept(experiment, "checkpoints/best-00002.safetensors") == [0, 1, 2]


def test_without_links_each_trial_has_its_own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    experiment = Experiment(tmp_path / "search")
    (tmp_path / "search" / "trials").mkdir(parents=True)
    (tmp_path / "search" / "search.yaml").write_text(yaml.safe_dump(plan_of().tree()))
    for number in range(2):
        ended_trial(experiment, number, 0.5, 0.1)
        folder = checkpoints.CheckpointFolder(experiment.run(number) / run_folder.CHECKPOINTS)
        assert folder.load_best(folder.best(2))["model/head"].tolist() == [number, number]


def shown_by_hparams(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """By session group: what TensorBoard's HParams page shows, as its plugin answers the page."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(base_plugin.TBContext(logdir=str(folder), data_provider=provider))
    request = RequestContext()
    metadata = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, metadata, [])
    every = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=every)
    groups = Handler(request, context, "", asked).run().session_groups
    del experiment
    return {
        group.name: (
            {name: value.number_value for name, value in group.hparams.items()},
            api_pb2.Status.Name(group.sessions[0].status),
        )
        for group in groups
    }


def test_hparams_shows_every_trial_and_how_it_ended(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "search")
    (tmp_path / "search" / "trials").mkdir(parents=True)
    (tmp_path / "search" / "search.yaml").write_text(yaml.safe_dump(plan_of().tree()))
    ended_trial(experiment, 0, 0.5, 0.1)
    ended_trial(experiment, 1, 0.5, 0.1, reason="diverged")
    for number, reason in ((2, None), (3, "its process ended")):  # stopped early, killed before its first epoch
        experiment.end(experiment.begin(number, {DROPOUT: 0.2}), 1.0, reason=reason)
    experiment.begin(4, {DROPOUT: 0.3})
    experiment.begin(4, {DROPOUT: 0.3})  # a search that goes on
    experiment.settle()
    shown = shown_by_hparams(tmp_path / "search" / "trials")
    statuses = ["SUCCESS", "FAILURE", "SUCCESS", "FAILURE", "UNKNOWN"]
    assert shown == {
        f"search/{number:05d}": ({DROPOUT: values}, f"STATUS_{status}")
        for number, (values, status) in enumerate(zip([0.1, 0.1, 0.2, 0.2, 0.3], statuses, strict=True))
    }


def test_a_finished_first_stage_is_given_to_the_next_trial_and_not_to_one_that_has_begun(tmp_path: Path) -> None:
    import numpy as np

    def write(run: Path, stage: int, epochs: int) -> None:
        folder = checkpoints.CheckpointFolder(run / run_folder.CHECKPOINTS)
        state = {"stage": stage, "best": {"epochs_done": epochs}}
        folder.save(Position(epochs), {"a": np.full(2, epochs)}, state, epochs, {"a": np.zeros(2)})

    stages, first, second, third = FirstStages(tmp_path / "shared"), *(tmp_path / name for name in "123")
    with stages.used_by(first, "key") as publisher:
        publisher.emit({"kind": "stage", "stage": 1})
        write(first, 1, 3)
        publisher.emit({"kind": "stage", "stage": 2})
        write(first, 2, 4)
    write(third, 1, 1)
    for run in (second, third):
        with stages.used_by(run, "key"):
            pass
    found = checkpoints.CheckpointFolder(second / run_folder.CHECKPOINTS).newest(print)
    assert found is not None
    assert (found.position, found.state["stage"]) == (Position(3), 1)
    assert found.best_epochs_done == 3
    assert found.best_arrays
    own = checkpoints.CheckpointFolder(third / run_folder.CHECKPOINTS).newest(print)
    assert own is not None
    assert own.position == Position(1)


NODES = [[Node(2)], [Node(8), Node(4)], [Node(16, 4)], [Node(16, 4), Node(16, 2), Node(8)]]


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("cpus", [None, 0.5, 3])
@pytest.mark.parametrize("gpus", [None, 0, 0.5, 2])
def test_trials_that_are_planned_fit_and_others_are_refused_with_figures(
    nodes: list[Node], workers: int, cpus: float | None, gpus: float | None
) -> None:
    if gpus == 0.5 and workers > 1:
        return
    search = plan_of(workers_per_trial=workers, cpus_per_trial=cpus, gpus_per_trial=gpus).search
    try:
        plan = plan_trials(nodes, search)
    except UserError as error:
        room = str(error)
        assert f"{nodes[0].cpus:g} CPU" in room
        return
    # A worker is on one machine; fill the machines one after another, each GPU by itself where it is divided.
    places = 0
    for node in nodes:
        on_cpus = int(node.cpus / plan.cpus)
        on_gpus = (
            int(node.gpus) * int(1 / plan.gpus)
            if 0 < plan.gpus < 1
            else int(node.gpus // plan.gpus)
            if plan.gpus
            else on_cpus
        )
        places += min(on_cpus, on_gpus)
    assert plan.concurrent * workers <= places
    assert (plan.concurrent + 1) * workers > places
    with pytest.raises(UserError, match="has room for"):
        plan_trials(nodes, search.model_copy(update={"concurrent": plan.concurrent + 1}))


def test_the_last_epoch_is_the_last_planned_one() -> None:
    from cxr_dist.tuning.trial import ends_stage, is_last_epoch

    config = plan_of().trial_config({"stages.1.epochs": 2, "stages.2.epochs": 3})
    rows = [{"stage": stage, "epoch": epoch} for stage, epochs in ((1, 2), (2, 3)) for epoch in range(1, epochs + 1)]
    assert [ends_stage(config, row) for row in rows] == [False, True, False, False, True]
    assert [is_last_epoch(config, row) for row in rows] == [False, False, False, False, True]
    head = plan_of().trial_config({"stages.1.epochs": 2, "stages.2.epochs": 0})
    assert [is_last_epoch(head, row) for row in rows[:2]] == [False, True]


def test_a_search_that_this_machine_cannot_hold_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr_dist.launch import ray_tune

    def unexpected(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_tune, "connected", unexpected)
    with (
        pytest.raises(UserError, match=r"100000 CPU each, and the cluster .* has room for 0"),
        ray_tune.trials_on_cluster(plan_of(cpus_per_trial=100_000), None, False),
    ):
        raise AssertionError("it was placed")


def opened_search(folder: Path, dataset: Path, plan: SearchPlan, stack: ExitStack) -> Search:
    experiment, manifest = Experiment(folder), read_manifest(dataset)
    stack.enter_context(experiment.opened(plan, dataset, manifest))
    search = Search(plan, experiment, run_folder.OpenDataset(dataset, dataset, manifest))
    search.resume()
    return search


def reported(quality: float, epochs: int) -> list[tuple[int, float]]:
    return [(epoch, quality + epoch / 1000) for epoch in range(1, epochs + 1)]


def leave_run(search: Search, number: int, curve: list[tuple[int, float]], *, is_complete: bool) -> None:
    run = search.experiment.run(number)
    run_folder.write_history(run, [{"epochs_done": epoch, "val_accuracy": best} for epoch, best in curve])
    if is_complete:
        (run / run_folder.RESULT).write_text("{}")


@pytest.mark.parametrize("scheduler", ["asha", "median", "off"])
@pytest.mark.parametrize("epochs_in_a_report", [1, 3])
def test_the_same_results_in_the_same_order_give_the_same_decisions_under_both_launchers(
    dataset: Path, tmp_path: Path, scheduler: str, epochs_in_a_report: int
) -> None:
    """Through a local worker's connection, and through Tune's searcher and stopper."""
    from multiprocessing import Pipe

    from cxr_dist.launch.ray_tune import searcher_and_stopper
    from cxr_dist.tuning.local_search import _Worker, local_trials

    plan = plan_of(scheduler=scheduler, trials=12, sampler="random", reduction_factor=2)
    qualities = [0.5, 0.6, 0.7, 0.8, 0.1, 0.9, 0.75, 0.2]
    with ExitStack() as stack:
        search = opened_search(tmp_path / "local", dataset, plan, stack)
        trials, local = local_trials(plan), []
        for quality in qualities:
            job = search.begin_next()
            assert job is not None
            ours, theirs = Pipe()
            worker, stopped = _Worker(None, ours, job.number), None
            for point in reported(quality, 9):
                theirs.send(("epoch", point))
                trials._receive(worker, search)
                if theirs.recv():
                    stopped = point[0]
                    break
            local.append((job.values, stopped))
            leave_run(search, job.number, reported(quality, stopped or 9), is_complete=stopped is None)
            search.end(job.number)
        search = opened_search(tmp_path / "ray", dataset, plan, stack)
        (searcher, stopper), through_tune = searcher_and_stopper(search), []
        for name, quality in enumerate(qualities):
            number = json.loads(searcher.suggest(str(name))["job"])["number"]
            curve, stopped = reported(quality, 9), None
            for done in range(epochs_in_a_report, 10, epochs_in_a_report):
                result = {"trial": number, "curve": curve[:done]}
                if stopper(str(name), result):
                    stopped = done
                    break
                assert not stopper(str(name), result), "what is reported twice decides nothing"
            leave_run(search, number, reported(quality, stopped or 9), is_complete=stopped is None)
            searcher.on_trial_complete(str(name))
            through_tune.append((search.experiment.trials()[-1].values, stopped))
            assert not stopper(str(name), {"trial": number, "curve": curve}), "it has ended"
    assert [values for values, _ in local] == [values for values, _ in through_tune]
    up = {epoch: -(-epoch // epochs_in_a_report) * epochs_in_a_report for epoch in range(1, 10)}
    assert [stopped and up[stopped] for _, stopped in local] == [stopped for _, stopped in through_tune]
    assert any(stopped for _, stopped in local) == (scheduler != "off")


def test_points_of_a_parameter() -> None:
    assert Parameter(low=1, high=7, step=3).points() == (1, 4, 7)
    assert Parameter(low=0.0, high=0.3, step=0.1).points() == pytest.approx((0, 0.1, 0.2, 0.3))
    assert Parameter(low=0.0, high=0.3).points() is None


def test_a_search_whose_trials_find_no_place_says_so_once_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cxr_dist.launch import ray_tune
    from cxr_dist.launch.placement import TrialPlan

    now = 100.0
    monkeypatch.setattr(ray_tune.time, "monotonic", lambda: now)
    callback = ray_tune._slow_start_warning(TrialPlan(2.0, 0.0, 1))
    spoken = []
    for states in [["PENDING"]] * 70 + [["RUNNING", "PENDING"]] * 70 + [["TERMINATED"]] * 70 + [["PENDING"]] * 130:
        callback.on_step_end(0, [SimpleNamespace(status=state) for state in states])
        if text := capsys.readouterr().err:
            assert "each needs 2 CPU" in text
            spoken.append(now)
        now += 1.0
    assert spoken == [161.0, 371.0, 432.0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 64])
def test_fewer_cpus_are_asked_for_down_to_one(count: int) -> None:
    from cxr_dist.launch.ray_tune import halves

    found = halves(count)
    assert (found[0], found[-1]) == (count, 1)
    assert all(after == before // 2 for before, after in itertools.pairwise(found))
