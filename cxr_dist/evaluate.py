"""A run's folder and images in, figures out: nothing of training is needed, and no Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist import calibration, cut, run_folder, steps
from cxr_dist.calibration_file import CALIBRATION, read_fitted
from cxr_dist.classifier import BATCH_SIZE, FinishedRun, load_model, read_finished
from cxr_dist.data import EvaluationPlan, Positions, ShardSource, Source, weakly
from cxr_dist.metrics import Predictions
from cxr_dist.report import check_output_folder, write_evaluation
from cxr_dist.strategy import Topology, make_strategy, prepare_devices, resolve_precision, resolve_xla
from tfrecords_builder.errors import UserError
from tfrecords_builder.files import write_json
from tfrecords_builder.images import load_gray
from tfrecords_builder.manifest import check_shards, read_manifest
from tfrecords_builder.sources import find_images
from tfrecords_builder.storage import Place, local_copy, parse_place


class FolderSource:
    """Labelled image files, decoded when they are read: uint8 [B, S, S, 1]."""

    def __init__(self, folder: Path, class_names: tuple[str, ...], image_size: int) -> None:
        images = find_images(folder)
        unknown = sorted({image.class_name for image in images} - set(class_names))
        if unknown:
            raise UserError(
                f"{folder}: class {unknown[0]} is none of the run's ({', '.join(class_names)}); rename or remove it"
            )
        self.paths = [image.path for image in images]
        self._folder, self._image_size = folder, image_size
        self._labels = np.array([class_names.index(image.class_name) for image in images], dtype=np.int32)
        self.groups: list[str] | None = None
        self.failure: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        images = tf.numpy_function(weakly(self._read), [positions], tf.uint8)
        images.set_shape([positions.shape[0], self._image_size, self._image_size, 1])
        return images

    def _read(self, positions: Positions) -> npt.NDArray[np.uint8]:
        try:
            images = [load_gray(self._folder / self.paths[position], self._image_size) for position in positions]
        except Exception as error:
            self.failure = error
            raise
        return np.stack(images)[..., None]


@dataclass(frozen=True)
class Request:
    """Which images of which run to evaluate, and where to write."""

    run: Path
    out: Path
    split: str = "test"
    images: Path | None = None
    dataset: Place | None = None
    """By default the one that the run was trained on."""
    risk: float = calibration.RISK
    """Share of wrong answers that the threshold to answer at all may let through."""


def evaluate_run(
    request: Request, devices: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Evaluate a finished run and write metrics, predictions, figures and report.

    Args:
        request: What to evaluate.
        devices: GPUs, or logical CPUs; all GPUs or one CPU when None.
        progress: Called with the images done and their number.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: the run is not finished, or the images cannot be had.
    """
    check_output_folder(request.out)  # now, not after minutes of computing
    network = Network.load(request.run, devices)
    with _source(request, network.run.info) as (source, what):
        predictions = network.predict(source, progress)
    calibrated, reason = _calibrate(request, network, predictions)
    described = {
        "run": str(request.run),
        "images": what,
        **({"split": request.split} if request.images is None else {}),
        "precision": network.precision,
        "replicas": network.topology.replicas,
        **({"calibration": reason} if reason else {}),
        "training": network.run.result,
        "config": network.run.config.tree(),
    }
    return write_evaluation(
        request.out, predictions, run_folder.read_history(request.run), described, calibrated=calibrated
    )


def predict_run(
    request: Request, devices: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """The predictions alone of what `evaluate_run` would evaluate; nothing is written."""
    network = Network.load(request.run, devices)
    with _source(request, network.run.info) as (source, _):
        return network.predict(source, progress)


@dataclass(frozen=True, eq=False)
class Network:
    """A finished run's best model, ready to predict."""

    run: FinishedRun
    model: Any
    strategy: Any
    topology: Topology
    precision: str

    @classmethod
    def load(cls, folder: Path, devices: int | None = None) -> "Network":
        """Raises UserError where the run is not finished, or its model is damaged."""
        run = read_finished(folder)
        topology = prepare_devices(devices, option="--devices")
        precision = resolve_precision(run.config.precision, topology.kind)
        strategy = make_strategy(topology)
        with strategy.scope():
            model = load_model(run, precision)
        return cls(run, model, strategy, topology, precision)

    def predict(
        self, source: "ShardSource | FolderSource", progress: Callable[[int, int], None] | None = None
    ) -> Predictions:
        """Predictions of every image of `source`; `progress` is called with the images done and their number."""
        per_step = BATCH_SIZE * self.topology.replicas

        def count_images(steps: int, _total: int) -> None:
            if progress is not None:
                progress(min(steps * per_step, source.count), source.count)

        try:
            probabilities = class_probabilities(
                self.strategy,
                self.topology,
                cut.whole_network(self.model),
                source,
                BATCH_SIZE,
                xla=resolve_xla(self.run.config, self.topology.kind),
                progress=count_images,
            )
        except Exception as error:
            if source.failure is not None:
                raise source.failure from error
            raise
        return Predictions(
            source.paths, source.labels, probabilities.astype(np.float64), self.run.info.class_names, source.groups
        )


def _calibrate(
    request: Request, network: Network, predictions: Predictions
) -> tuple[dict[str, Any] | None, str | None]:
    """The run's calibration, fitted on its validation images if it has none for this risk yet; else why there is none.

    The test images have no part in it.
    """
    known = read_fitted(request.run)
    if known is not None and known.get("target_risk") == request.risk:
        return known, None
    own = Request(request.run, request.out, "validation")
    if (request.split, request.images, request.dataset) == (own.split, None, None):
        validation = predictions
    else:
        try:
            with _source(own, network.run.info) as (source, _):
                validation = network.predict(source)
        except UserError as error:
            return known, f"none: the validation images of the run cannot be had ({error})"
    fitted = calibration.fit(validation, request.risk)
    try:
        write_json(request.run / CALIBRATION, fitted)
    except OSError as error:
        return fitted, f"not kept with the run ({error.strerror or error})"
    return fitted, None


def class_probabilities(
    strategy: Any,
    topology: Topology,
    network: Any,
    source: Source,
    batch_size: int,
    *,
    xla: bool,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """The softmax of `network`'s logits for every input of `source` once, in order, in inference mode.

    Args:
        batch_size: Images per replica and step.
        progress: Called with the steps done and their number.

    Returns:
        float32 [N, C], complete on every worker.
    """
    plan = EvaluationPlan(source.count, batch_size, topology.replicas)
    step = steps.make_forward_step(strategy, network, xla=xla)
    iterator = steps.distributed_batches(strategy, topology, source, plan)
    outputs: list[npt.NDArray[np.float32]] = []
    for number in range(plan.steps):
        outputs.append(step(iterator))
        if progress:
            progress(number + 1, plan.steps)
    return np.concatenate(outputs)[: source.count]


@contextmanager
def _source(request: Request, info: run_folder.RunInfo) -> "Iterator[tuple[ShardSource | FolderSource, str]]":
    """The images, and what the report calls them."""
    if request.images is not None:
        yield FolderSource(request.images, info.class_names, info.image_size), str(request.images)
        return
    place = request.dataset or parse_place(info.dataset)
    with local_copy(place) as dataset:
        yield _split_source(request, info, dataset), f"{place}, split {request.split}"


def _split_source(request: Request, info: run_folder.RunInfo, dataset: Path) -> ShardSource:
    manifest = read_manifest(dataset)
    if request.dataset is None and manifest.fingerprint != info.fingerprint:
        raise UserError(f"{dataset}: has changed since the run was trained; give the dataset with --dataset")
    if manifest.class_names != info.class_names or manifest.image_size != info.image_size:
        raise UserError(
            f"{dataset}: has classes {', '.join(manifest.class_names)} at {manifest.image_size} pixels, the run has "
            f"{', '.join(info.class_names)} at {info.image_size}; give a dataset that was built alike"
        )
    check_shards(dataset, manifest)
    return ShardSource(dataset, manifest, request.split)
