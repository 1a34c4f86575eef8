"""What the integration tests run on Ray's workers. Imported there, so it holds no tests."""

import json
import os
from pathlib import Path
from typing import Any


def record_bundle(arguments: dict[str, Any]) -> None:
    """Write what this worker was given."""
    import ray
    import ray.train

    context = ray.train.get_context()
    found = {
        "rank": context.get_world_rank(),
        "workers": context.get_world_size(),
        "gpus": sorted(ray.get_gpu_ids()),
        "tf_config": json.loads(os.environ["TF_CONFIG"])["task"],
        "bundles": [
            bundle
            for table in ray.util.placement_group_table().values()
            if table["state"] == "CREATED"
            for bundle in table["bundles"].values()
        ],
    }
    Path(arguments["out"], f"{found['rank']}.json").write_text(json.dumps(found))


def fail_in_words(_arguments: dict[str, Any]) -> None:
    """What a reader of a damaged shard raises, under the error that TensorFlow makes of it."""
    from tfrecords_builder.common.errors import UserError

    try:
        raise RuntimeError("an error of many lines\nfrom TensorFlow")
    except RuntimeError as error:
        raise UserError("shard 7: damaged") from error


def train_curves(arguments: dict[str, Any]) -> None:
    """Train the small two stages under MultiWorkerMirroredStrategy, once per variant, and write the curves."""
    import ray.train

    from cxr_dist.distributed.devices import prepare_devices
    from tests import small_training as training

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    topology = prepare_devices(1, workers, rank)
    curves = {}
    for name, settings in arguments["variants"].items():
        run = training.Training(topology=topology, **settings)
        # A scale that does not overflow on the way, as in `training.two_stages`.
        trace = run.stage(training.UPPER, run.stage(training.HEAD, loss_scale=2.0**8), loss_scale=2.0**8)
        weights = [float(abs(variable.numpy()).sum()) for variable in run.model.weights]
        curves[name] = {"losses": trace.losses, "validation": trace.validation, "weights": weights}
    Path(arguments["out"], f"{rank}.json").write_text(json.dumps(curves))


def train_on_poisoned_images(arguments: dict[str, Any]) -> None:
    """float16, with an infinite pixel among the images of the last worker alone."""
    import numpy as np
    import ray.train

    from cxr_dist.config.schema import StageConfig
    from cxr_dist.distributed.devices import prepare_devices
    from tests import small_training as training

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    run = training.Training(topology=prepare_devices(1, workers, rank), precision="float16")
    run.poison(replica=workers - 1)
    before = [variable.numpy().copy() for variable in run.model.weights]
    trace = run.stage(StageConfig(epochs=1, learning_rate=1e-3))
    same = all((old == variable.numpy()).all() for old, variable in zip(before, run.model.weights, strict=True))
    found = {"skipped": trace.skipped, "same": same, "scale": float(np.asarray(run.loss_scale.scale))}
    Path(arguments["out"], f"poisoned-{rank}.json").write_text(json.dumps(found))


def curves_and_overflow(arguments: dict[str, Any]) -> None:
    """Both of the above in one start of two workers."""
    train_curves(arguments)
    train_on_poisoned_images(arguments)


def serve_small_trials(connection: Any, cores: int, folder: str) -> None:
    """A search's process that trains the small network, and does to a trial what its dropout says."""
    import time
    from dataclasses import replace

    import pytest

    from cxr_dist.tuning import local_search
    from tests.conftest import use_small_base

    patch = pytest.MonkeyPatch()
    use_small_base(patch)
    run_trial = local_search.run_trial

    def run(job: Any, topology: Any, report: Any, launcher: str) -> Any:
        from cxr_dist.tuning import trial

        fault = FAULTS.get(job.values["model.dropout"])
        if fault == "raises":
            with patch.context() as broken:
                broken.setattr(trial, "first_stage_key", _raise)
                return run_trial(job, topology, report, launcher)
        if fault == "diverges":
            stages = {str(number): stage for number, stage in job.config["stages"].items()}
            stages["1"] = {**stages["1"], "learning_rate": 1e38}
            job = replace(job, config={**job.config, "stages": stages})
        if fault == "is killed":
            os.kill(os.getpid(), 9)
        if fault == "leaves":
            return run_trial(job, topology, _leave, launcher)
        if fault == "hangs":
            return run_trial(replace(job, time_limit_s=1.0), topology, _wait, launcher)
        return run_trial(job, topology, lambda row, best: _slowly(report, row, best), launcher)

    def _slowly(report: Any, row: Any, best: Any) -> Any:
        time.sleep(SECONDS_AFTER_EPOCH if row["stage"] == 2 else 0)
        return report(row, best)

    def _leave(row: Any, best: Any) -> bool:
        connection.send(("epoch", (row["epochs_done"], best)))
        connection.close()  # so that the answer finds nobody
        os._exit(9)

    def _wait(row: Any, best: Any) -> bool:
        time.sleep(600)
        return False

    patch.setattr(local_search, "run_trial", run)
    local_search.serve_trials(connection, cores, folder)


FAULTS = {0.1: "raises", 0.2: "diverges", 0.3: "is killed", 0.4: "hangs", 0.15: "leaves"}
SECONDS_AFTER_EPOCH = 0.7


def _raise(*_: Any) -> None:
    raise RuntimeError("a fault\nof two lines")


def small_search(dataset: Path, out: Path, parameters: dict[str, Any], **changes: Any) -> Any:
    """Run a search of the small network in processes of this machine; goes on when it is called again."""
    from cxr_dist.runs.run_folder import OpenDataset
    from cxr_dist.tuning.experiment import Experiment
    from cxr_dist.tuning.local_search import LocalTrials
    from cxr_dist.tuning.search import Search
    from cxr_dist.tuning.search_space import SearchConfig, SearchPlan
    from tfrecords_builder.format.manifest import read_manifest

    stages = {"1": {"epochs": 2}, "2": {"epochs": changes.pop("stage_2_epochs", 0), "unfreeze_layers": 12}}
    settings = {"sampler": "grid", "scheduler": "off", "start_from_base": False, "concurrent": 2} | changes
    section = SearchConfig.model_validate({"trials": 20, "parameters": parameters, **settings})
    small = {"global_batch_size": 8, "precision": "float32", "model": {"weights": "none"}}
    plan = SearchPlan(section, (("small ", small), ("small ", {"stages": stages})))
    experiment, manifest = Experiment(out), read_manifest(dataset)
    with experiment.opened(plan, dataset, manifest):
        search = Search(plan, experiment, OpenDataset(dataset, dataset, manifest))
        search.resume()
        LocalTrials(2, 1, plan.trains_head_alone(), serve_small_trials).run_trials(search)
        experiment.write_tables()
    return experiment


def tune_small_trial(config: dict[str, Any], workers: dict[str, Any] | None) -> None:
    """A trial of a search through Ray Tune, of the small network, on workers that write where they are."""
    import pytest

    from cxr_dist.launch import ray_train, ray_tune
    from tests.conftest import use_small_base

    patch = pytest.MonkeyPatch()
    use_small_base(patch)
    patch.setattr(ray_train, "_train_worker", train_small_worker)
    ray_tune.run_tune_trial(config, workers)


def train_small_worker(arguments: dict[str, Any]) -> None:
    """A worker of such a trial."""
    import pytest
    import ray
    import ray.train

    from tests.conftest import use_small_base

    use_small_base(pytest.MonkeyPatch())
    from cxr_dist.launch import ray_train

    rank = ray.train.get_context().get_world_rank()
    Path(f"{arguments['run']}.node-{rank}").write_text(ray.get_runtime_context().get_node_id())
    ray_train._train_worker(arguments)
