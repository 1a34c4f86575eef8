"""A run's folder and images in, figures out: nothing of training is needed, and no Ray."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist import cut, run_folder, steps
from cxr_dist.config import Config
from cxr_dist.data import ArraySource, EvaluationPlan, Positions, ShardSource, Source
from cxr_dist.examine import run as examine_run
from cxr_dist.examine.result import Examination
from cxr_dist.examine.scores import balanced_sample
from cxr_dist.metrics import Predictions
from cxr_dist.model import build_model, set_trainable
from cxr_dist.report import check_output_folder, write_evaluation
from cxr_dist.strategy import Topology, dtype_policy, make_strategy, prepare_devices, resolve_precision, resolve_xla
from tfrecords_builder.errors import UserError, one_line
from tfrecords_builder.images import decode_mask, load_gray, read_bytes
from tfrecords_builder.manifest import check_shards, read_manifest
from tfrecords_builder.metadata import read_metadata
from tfrecords_builder.seal import check_seal
from tfrecords_builder.sources import find_images
from tfrecords_builder.storage import Place, local_copy, parse_place

BATCH_SIZE = 32


class FolderSource:
    """Labelled image files, decoded when they are read: uint8 [B, S, S, 1]."""

    def __init__(self, folder: Path, class_names: tuple[str, ...], image_size: int) -> None:
        images = find_images(folder)
        unknown = sorted({image.class_name for image in images} - set(class_names))
        if unknown:
            raise UserError(
                f"{folder}: class {unknown[0]} is none of the run's ({', '.join(class_names)}); rename or remove it"
            )
        self._found, self.paths = images, [image.path for image in images]
        self._folder, self._image_size = folder, image_size
        self._labels = np.array([class_names.index(image.class_name) for image in images], dtype=np.int32)
        self.failure: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        images = tf.numpy_function(self._read, [positions], tf.uint8)
        images.set_shape([positions.shape[0], self._image_size, self._image_size, 1])
        return images

    def pixels(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """As `ShardSource.pixels`."""
        return self._read(positions)[..., 0]

    def masks(self, positions: Positions) -> npt.NDArray[np.bool_] | None:
        """As `ShardSource.masks`."""
        if not any(image.mask for image in self._found):
            return None
        masks = np.zeros((len(positions), self._image_size, self._image_size), np.bool_)
        for mask, position in zip(masks, positions, strict=True):
            name = self._found[position].mask
            if name is not None:
                path = self._folder / name
                mask[:] = decode_mask(read_bytes(path), self._image_size, path)
        return masks

    def origins(self, positions: Positions) -> tuple[list[str | None], None]:
        """As `ShardSource.origins`; what shows the same has not been looked for."""
        known = read_metadata(self._folder, self._found)
        paths = [self.paths[position] for position in positions]
        return [known[path].source if path in known else None for path in paths], None

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
    examine: int = 0
    """How many of the images to examine at most, each some thirty times; 0 leaves the examination out."""


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
    config, info = run_folder.read_config(request.run), run_folder.read_info(request.run)
    result = run_folder.read_result(request.run)
    model_file = request.run / run_folder.MODEL
    if result is None or not model_file.is_file():
        raise UserError(f"{request.run}: the run is not finished; start it again with train to go on")
    check_output_folder(request.out)  # now, not after minutes of computing
    with _source(request, info) as (source, what):
        predictions, used, examination = _predict(config, info, model_file, source, devices, progress, request.examine)
    described = {
        "run": str(request.run),
        "images": what,
        **({"split": request.split} if request.images is None else {}),
        **used,
        "training": result,
        "config": config.tree(),
    }
    history = run_folder.read_history(request.run)
    return write_evaluation(request.out, predictions, history, described, examination=examination)


def _predict(
    config: Config,
    info: run_folder.RunInfo,
    model_file: Path,
    source: "ShardSource | FolderSource",
    devices: int | None,
    progress: Callable[[int, int], None] | None,
    examine: int,
) -> tuple[Predictions, dict[str, Any], Examination | None]:
    """Predictions of the images, what the report says of how they were computed, and an examination of some."""
    topology = prepare_devices(devices, option="--devices")
    precision = resolve_precision(config.precision, topology.kind)
    strategy = make_strategy(topology)
    with strategy.scope():
        model = build_model(len(info.class_names), info.image_size, config, dtype_policy(precision))
        _load_weights(model, model_file)
        set_trainable(model, 0, train_batch_norm=False)
    xla = resolve_xla(config, topology.kind)

    rows = balanced_sample(source.labels, examine, config.seed)
    total = source.count + len(rows) * examine_run.looks(len(info.class_names)) * bool(examine)
    seen = 0

    def count_images(steps: int, _total: int) -> None:
        if progress is not None:
            progress(min(steps * BATCH_SIZE * topology.replicas, source.count), total)

    def count_looks(images: int) -> None:
        nonlocal seen
        seen += images
        if progress is not None:
            progress(min(source.count + seen, total), total)

    network = cut.whole_network(model)
    step = steps.make_forward_step(strategy, network, xla=xla)

    def forward(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        given = ArraySource(images[..., None], np.zeros(len(images), np.int32))
        return class_probabilities(strategy, topology, network, given, BATCH_SIZE, xla=xla, step=step).astype(float)

    examination = None
    try:
        probabilities = class_probabilities(
            strategy, topology, network, source, BATCH_SIZE, xla=xla, progress=count_images, step=step
        )
        if len(rows):
            sources, groups = source.origins(rows)
            examination = examine_run.examine(
                forward,
                source.pixels(rows),
                source.labels[rows],
                source.masks(rows),
                sources,
                groups,
                info.class_names,
                config.seed,
                model=model,
                names=[source.paths[row] for row in rows],
                done=count_looks,
            )
    except Exception as error:
        if source.failure is not None:
            raise source.failure from error
        raise
    predictions = Predictions(source.paths, source.labels, probabilities.astype(np.float64), info.class_names)
    return predictions, {"precision": precision, "replicas": topology.replicas}, examination


def class_probabilities(
    strategy: Any,
    topology: Topology,
    network: Any,
    source: Source,
    batch_size: int,
    *,
    xla: bool,
    progress: Callable[[int, int], None] | None = None,
    step: Callable[[Any], Any] | None = None,
) -> npt.NDArray[np.float32]:
    """The softmax of `network`'s logits for every input of `source` once, in order, in inference mode.

    Args:
        batch_size: Images per replica and step.
        progress: Called with the steps done and their number.
        step: `steps.make_forward_step` of the network, traced once for several sources.

    Returns:
        float32 [N, C], complete on every worker.
    """
    plan = EvaluationPlan(source.count, batch_size, topology.replicas)
    step = step or steps.make_forward_step(strategy, network, xla=xla)
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


def _load_weights(model: Any, path: Path) -> None:
    try:
        check_seal(path)  # Keras does not read the zip's members to their ends, where their CRCs are
        model.load_weights(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = one_line(error)
        raise UserError(f"{path}: cannot be loaded ({reason}); train the run again") from None
