"""A function for each step of the work."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from cxr_dist.api.classifier import Classifier, PathLike
from cxr_dist.api.results import Comparison, Dataset, Evaluation, Run, Search
from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    from cxr_dist.config.loading import Overrides
    from cxr_dist.config.schema import Config
    from tfrecords_builder.common.places import Place

LAUNCHERS = ("ray", "local")
LAUNCHER = "ray"
"""By default, of training and of a search."""
SEARCH = "search_cpu"
"""The search space, by default."""
EXAMINED = 128
"""Images that `evaluate` examines by default, at most."""


class BuildKeywords(TypedDict, total=False):
    """Keyword arguments of `build`; see there."""

    image_size: int
    encoding: str
    workers: int | None
    seed: int
    split: str | None
    split_file: PathLike | None
    labels: PathLike | None
    exclude: PathLike | None
    conflicts: str | None
    masks: str
    on_error: str
    launcher: str
    address: str | None
    verbose: bool


class LaunchKeywords(TypedDict, total=False):
    """Keyword arguments of `train` and `tune` that say where to compute; see `train`."""

    launcher: str
    workers: int | tuple[int, int] | None
    devices_per_worker: int | None
    address: str | None
    verbose: bool


def build(source: PathLike, dataset: PathLike, **options: Unpack[BuildKeywords]) -> Dataset:
    """Build a dataset of TFRecord shards from a folder of labelled images. A build that was stopped resumes.

    Args:
        source: A folder of labelled images: <Class>/*.png, <Class>/images/*.png, <Class>/<patient>/*.png, the like in
            train, val and test, or any with `labels`.
        dataset: A new folder or one of an earlier build, or an address: s3://bucket/name, gs://...
        image_size: Side of the stored images in pixels. Default: 224.
        encoding: Format of a stored image: "raw", "png" or "jpeg". Default: "raw".
        workers: Number of processes. Default: one per core.
        seed: Random seed of the split. Default: 0.
        split: "leak-free" (near-duplicates and images of a patient stay in one split) or "published" (image by image),
            each 70/15/15 of every class. Default: the split that folders or a table give, else "leak-free".
        split_file: A CSV file with the columns path and split, in place of a rule. Default: none.
        labels: A CSV, TSV or Parquet file with the columns path (or file_name) and label, and perhaps patient, source,
            split and others, in place of class folders. Default: none.
        exclude: A CSV file with the column path: images to leave out. Default: none.
        conflicts: Near-duplicates in several classes: "exclude" or "keep". Default: "exclude"; "keep" with "published".
        masks: Lung masks: "read" or "ignore". Default: "read".
        on_error: At a damaged file, or a class that would lose more than 1 % of its images: "stop", or "skip" to leave
            them out. Default: "stop".
        launcher: "local" (processes of this machine) or "ray" (tasks of a Ray cluster). Default: "local".
        address: Of a running Ray cluster. Default: $RAY_ADDRESS, or a cluster of its own on this machine.
        verbose: Whether Ray's own messages are shown. Default: False.

    Returns:
        The dataset, also where it was complete already.

    Raises:
        UserError: an argument is wrong, a file is damaged, or the folder holds something else.
    """
    from cxr_dist.launch.build import run_build
    from tfrecords_builder.build import BuildOptions

    given: dict[str, Any] = {**options}
    launch: dict[str, Any] = {"launcher": "local", "address": None, "verbose": False}
    launch = {name: given.pop(name, default) for name, default in launch.items()}
    _prepare(launch["verbose"], launch["launcher"])
    for name in ("split_file", "labels", "exclude"):
        if given.get(name) is not None:
            given[name] = Path(given[name])
    place = _place(dataset)
    summary = run_build(Path(source), place, BuildOptions(**given), **launch)
    manifest = summary.manifest
    return Dataset(place, manifest.class_names, manifest.image_size, manifest.counts, summary)


def load_config(config: "PathLike | Config | None" = None, overrides: "Overrides | None" = None) -> "Config":
    """A configuration, checked.

    Args:
        config: The name of a preset (published, cpu, smoke, ...), a YAML file, or a configuration. Default: each
            key's default.
        overrides: Values by dotted key, such as {"stages.1.epochs": 5}; or texts such as "stages.1.epochs=5". Default:
            none.

    Returns:
        The configuration; `to_yaml()` prints it.

    Raises:
        UserError: neither a preset nor a file, or a key or a value is not valid.
    """
    from cxr_dist.config import loading

    base = loading.resolve_preset(Path(config)) if isinstance(config, str | os.PathLike) else config
    return loading.load_config(base, overrides)


def train(
    dataset: PathLike,
    out: PathLike,
    *,
    config: "PathLike | Config | None" = None,
    overrides: "Overrides | None" = None,
    **launch: Unpack[LaunchKeywords],
) -> Run:
    """Train all stages. A run that was interrupted resumes with the same arguments; a finished one is left as it is.

    Args:
        dataset: A dataset's folder, or its address.
        out: The run's folder: a new one, or that of this run.
        config: As `load_config` takes it.
        overrides: As `load_config` takes them.
        launcher: "ray", or "local": this process, without Ray. Default: "ray".
        workers: Number of worker processes; or (least, most): as many as there is room for. With Ray alone. Default:
            from the cluster.
        devices_per_worker: GPUs of each worker, or logical CPUs of a single one. Default: from the cluster.
        address: Of a running Ray cluster. Default: $RAY_ADDRESS, or a cluster of its own on this machine.
        verbose: Whether TensorFlow's and Ray's own messages are shown. Default: False.

    Returns:
        The finished run.

    Raises:
        UserError: an argument is wrong, the folder holds something else, or more is asked than there is.
        StoppedError: the run was asked to stop by SIGTERM; the next call resumes.
    """
    from cxr_dist.launch.train import run_training

    keywords = _launch(launch)
    place = _place(dataset)
    result = run_training(load_config(config, overrides), place, Path(out), **keywords)
    best = result["best"]
    return Run(Path(out), best["val_accuracy"], best["stage"], best["epoch"], result["seconds"]["total"], result)


def tune(
    dataset: PathLike,
    out: PathLike,
    *,
    config: PathLike = SEARCH,
    overrides: "Overrides | None" = None,
    **launch: Unpack[LaunchKeywords],
) -> Search:
    """Search settings, as `cxr-dist tune --no-evaluation`. An interrupted search resumes with the same arguments.

    Args:
        dataset: A dataset's folder, or its address.
        out: The experiment's folder: a new one, or that of this search.
        config: A search space: the name of a preset (search, search_cpu) or a YAML file. Default: "search_cpu".
        overrides: As `load_config` takes them, of the trials' configuration or of the search ("search.trials").
        launcher: "ray", or "local": processes of this machine, without Ray. Default: "ray".
        workers: Number of worker processes of each trial. Default: as the search space says.
        devices_per_worker: GPUs of each trial. Default: as the search space says.
        address: Of a running Ray cluster. Default: $RAY_ADDRESS, or a cluster of its own on this machine.
        verbose: Whether TensorFlow's and Ray's own messages are shown. Default: False.

    Returns:
        The search, with its best trial.

    Raises:
        UserError: an argument is wrong, the folder holds something else, or no trial is complete.
    """
    from cxr_dist.config.loading import resolve_preset
    from cxr_dist.launch.tune import run_search, trial_overrides
    from cxr_dist.tuning.experiment import PAGE, Experiment
    from cxr_dist.tuning.search_space import load_search

    keywords = _launch(launch)
    changes = trial_overrides(overrides, keywords.pop("workers"), keywords.pop("devices_per_worker"))
    space = Path(config)
    plan = load_search(resolve_preset(space) or space, changes)
    experiment = Experiment(Path(out))
    best = run_search(plan, experiment, _place(dataset), **keywords)
    accuracy, number = (best.best_row or {})["val_accuracy"], best.trial.number
    return Search(Path(out), number, experiment.run(number), accuracy, best.trial.values, Path(out) / PAGE)


def evaluate(
    run: PathLike,
    out: PathLike,
    *,
    split: str | None = None,
    images: PathLike | None = None,
    dataset: PathLike | None = None,
    devices: int | None = None,
    risk: float | None = None,
    examine: int = EXAMINED,
) -> Evaluation:
    """Evaluate a finished run: metrics with intervals, predictions, figures and a report.

    Args:
        run: A finished run, or a search, whose best trial is taken.
        out: A new folder, or that of an earlier evaluation.
        split: The images of this split of the dataset: "train", "validation" or "test". Default: "test".
        images: A folder of labelled images that are not in the dataset, in place of a split. Default: none.
        dataset: A dataset; with `images`, where the dataset that the run was trained on is now. Default: that one.
        devices: Number of GPUs, or of logical CPUs without one. Default: all GPUs, or one CPU.
        risk: Target share of wrong answers among those that are given, between 0 and 1. Default: that of the run's
            calibration, else 0.05.
        examine: Number of images to run the checks of attention, lungs and robustness on, about 30 forward passes each;
            0 for none. Default: 128.

    Returns:
        The evaluation, with the content of metrics.json.

    Raises:
        UserError: an argument is wrong, the run is not finished, or the images cannot be had.
    """
    from cxr_dist.evaluation.evaluate import evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.evaluation.report import REPORT
    from cxr_dist.runs.loggers import progress_bar
    from cxr_dist.tuning.experiment import best_run

    if split is not None and images is not None:
        raise UserError("--images: takes the place of --split; leave one out")
    _prepare(devices=devices)
    folder, place = Path(out), None if dataset is None else _place(dataset)
    labelled = None if images is None else Path(images)
    spec = EvaluationSpec(
        best_run(Path(run)), folder, split or "test", labelled, place, risk, _count("examine", examine)
    )
    with progress_bar("compare") as comparing, progress_bar("evaluate", "forward passes") as progress:
        metrics = evaluate_run(spec, devices, progress, comparing)
    return Evaluation(
        path=folder,
        report=folder / REPORT,
        images=metrics["n"],
        accuracy=metrics["accuracy"],
        f1_macro=metrics["f1_macro"],
        auc_macro=metrics["auc_macro_ovr"],
        alarms=tuple(metrics.get("alarms", ())),
        metrics=metrics,
    )


def compare(first: PathLike, second: PathLike, *, devices: int | None = None) -> Comparison:
    """Compare two runs on the same images, by paired intervals and McNemar's test. Nothing is written.

    Args:
        first: A finished run, a search, or an evaluation of one, which saves predicting.
        second: Likewise.
        devices: Number of GPUs, or of logical CPUs without one. Default: all GPUs, or one CPU.

    Returns:
        The second less the first.

    Raises:
        UserError: a run is not finished, or the images, their labels or the classes differ.
    """
    from cxr_dist.evaluation.compare_folders import compare_folders, seen_share
    from cxr_dist.tuning.experiment import best_run

    _prepare(devices=devices)
    folders = (Path(first), Path(second))
    shares = {folder: seen_share(folder) for folder in folders}
    notes = tuple(f"{name}: its model has seen {share:.1%} of these images" for name, share in shares.items() if share)
    result = compare_folders(best_run(folders[0]), best_run(folders[1]), devices)
    named = {"first": str(folders[0]), "second": str(folders[1]), **result}
    return Comparison(*folders, result["n"], result["metrics"], result["mcnemar"]["p_value"], notes, named)


def load(run: PathLike) -> Classifier:
    """A finished run as a function of images, on the first GPU or the CPU.

    It abstains where an image is unlike the training images. Once `cxr-dist calibrate` has run, its probabilities are
    calibrated, and it abstains below the threshold too.

    Args:
        run: A finished run, or a search, whose best trial is taken.

    Returns:
        The classifier. Its first prediction takes some seconds more, as the network is compiled then.

    Raises:
        UserError: the run is not finished, or something in its folder is damaged.
    """
    from cxr_dist.inference.classifier import load_classifier
    from cxr_dist.tuning.experiment import best_run

    _prepare()
    return Classifier(load_classifier(best_run(Path(run))))


def _prepare(verbose: bool = False, launcher: str = LAUNCHER, devices: int | None = None) -> None:
    """What each function does before it begins to work."""
    from cxr_dist.distributed.devices import prepare_environment

    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher {launcher}: must be one of {', '.join(LAUNCHERS)}")
    if devices is not None:
        _count("devices", devices, 1)
    prepare_environment(verbose)


def _launch(given: LaunchKeywords) -> dict[str, Any]:
    """All keyword arguments of a launch, checked."""
    unknown = sorted(set(given) - set(LaunchKeywords.__annotations__))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    defaults = {"launcher": LAUNCHER, "workers": None, "devices_per_worker": None, "address": None, "verbose": False}
    keywords: dict[str, Any] = {**defaults, **given}
    _prepare(keywords["verbose"], keywords["launcher"])
    if (workers := keywords["workers"]) is not None:
        least, most = (workers, workers) if isinstance(workers, int) else workers
        if not 1 <= least <= most:
            raise UserError(
                f"--workers {least}:{most}: invalid range; give a number of at least 1, or the least and the most"
            )
        keywords["workers"] = (least, most)
    if keywords["devices_per_worker"] is not None:
        _count("devices-per-worker", keywords["devices_per_worker"], 1)
    return keywords


def _count(option: str, number: int, least: int = 0) -> int:
    if number < least:
        raise UserError(f"--{option} {number}: must be a whole number, at least {least}")
    return number


def _place(given: PathLike) -> "Place":
    from tfrecords_builder.common.places import parse_place

    return parse_place(os.fspath(given))
