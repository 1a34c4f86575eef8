"""A search on a Ray cluster of two machines (two raylets): each trial's two workers are on different ones."""

import json
import time
from pathlib import Path

import pytest

from cxr_dist.runs.run_folder import OpenDataset
from cxr_dist.tuning.experiment import BEST, Experiment
from cxr_dist.tuning.search import Search
from cxr_dist.tuning.search_space import SearchConfig, SearchPlan
from tests.integration.workers import tune_small_trial
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.usefixtures("ray_stopped")]
ROOT = Path(__file__).parents[2]


def _search(dataset: Path, out: Path, address: str, **changes: object) -> Experiment:
    from cxr_dist.launch.ray_tune import trials_on_cluster

    small = {"global_batch_size": 8, "precision": "float32", "model": {"weights": "none"}}
    stages = {"stages": {1: {"epochs": 1}, 2: {"epochs": 1, "unfreeze_layers": 12}}}
    settings = {"sampler": "grid", "scheduler": "off", "workers_per_trial": 2, "cpus_per_trial": 1} | changes
    parameters = {"model.dropout": {"choices": [0.1, 0.2]}}
    section = SearchConfig.model_validate({"parameters": parameters, **settings})
    plan = SearchPlan(section, (("small ", small), ("small ", stages)))
    experiment, manifest = Experiment(out), read_manifest(dataset)
    with trials_on_cluster(plan, address, False) as trials, experiment.opened(plan, dataset, manifest):
        search = Search(plan, experiment, OpenDataset(dataset, dataset, manifest))
        search.resume()
        trials.run(search, tune_small_trial)
        experiment.write_tables()
    return experiment


def test_trials_of_two_workers_on_two_machines(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(dataset.parent)  # Ray starts trials in other working folders
    given = Path(dataset.name)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"2 workers of 1 CPU each, and the cluster .* has room for 1"):
            _search(given, tmp_path / "more", cluster.address, concurrent=2)
        assert time.monotonic() - started < 60, "it is refused at once, and does not wait"
        experiment = _search(given, tmp_path / "experiment", cluster.address)
        trials = experiment.trials()
        assert [trial.state for trial in trials] == ["complete", "complete"]
        for trial in trials:
            run = experiment.run(trial.number)
            nodes = {Path(f"{run}.node-{rank}").read_text() for rank in range(2)}
            assert len(nodes) == 2, "both workers were on one machine"
            result = json.loads((run / "result.json").read_text())
            assert (result["workers"], result["launcher"]) == (2, "ray")
        assert (experiment.folder / BEST).is_file()
        # What a trial held is free again.
        ray.init(cluster.address, logging_level="ERROR")
        until = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        assert ray.available_resources()["CPU"] == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
