"""A run's folder and images in, figures out: nothing of training is needed, and no Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist import calibration, cut, damage, run_folder, steps
from cxr_dist.calibration_file import CALIBRATION, read_fitted
from cxr_dist.classifier import BATCH_SIZE, FinishedRun, load_model, read_finished
from cxr_dist.examine import run as examine_run
from cxr_dist.examine.result import Examination
from cxr_dist.examine.scores import balanced_sample
from cxr_dist.metrics import Predictions
from cxr_dist.plans import EvaluationPlan, Positions
from cxr_dist.report import check_output_folder, write_evaluation
from cxr_dist.sources import ArraySource, ShardSource, Source, weakly
from cxr_dist.strategy import Topology, make_strategy, prepare_devices, resolve_precision, resolve_xla
from tfrecords_builder.errors import UserError
from tfrecords_builder.files import write_json
from tfrecords_builder.images import decode_mask, load_gray, read_bytes
from tfrecords_builder.manifest import check_shards, read_manifest
from tfrecords_builder.metadata import read_metadata
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
        self._found, self.paths = images, [image.path for image in images]
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


ImageSource = ShardSource | FolderSource


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
    examine: int = 0
    """How many of the images to examine at most, each some thirty times; 0 leaves the examination out."""
    drawn: bool = False
    """The images are phantoms, of which the published result says nothing."""


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
    run = read_finished(request.run)
    with _source(request, run.info) as (source, what):
        network = Network.load(run, devices)
        predictions, examination = network.evaluate(source, request.examine, progress)
    calibrated, reason = _calibrate(request, network, predictions)
    described = {
        "run": str(request.run),
        "images": what,
        **({"split": request.split} if request.images is None else {}),
        **({"drawn": True} if request.drawn else {}),
        "precision": network.precision,
        "replicas": network.topology.replicas,
        **({"calibration": reason} if reason else {}),
        "training": network.run.result,
        "config": network.run.config.tree(),
    }
    return write_evaluation(
        request.out,
        predictions,
        run_folder.read_history(request.run),
        described,
        calibrated=calibrated,
        examination=examination,
    )


def predict_run(
    request: Request, devices: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """The predictions alone of what `evaluate_run` would evaluate; nothing is written."""
    run = read_finished(request.run)
    with _source(request, run.info) as (source, _):
        return Network.load(run, devices).predict(source, progress)


@dataclass(frozen=True, eq=False)
class Network:
    """A finished run's best model, ready to predict."""

    run: FinishedRun
    model: Any
    strategy: Any
    topology: Topology
    precision: str

    @classmethod
    def load(cls, run: FinishedRun, devices: int | None = None) -> "Network":
        """Raises UserError where the model is damaged."""
        topology = prepare_devices(devices, option="--devices")
        precision = resolve_precision(run.config.precision, topology.kind)
        strategy = make_strategy(topology)
        with strategy.scope():
            model = load_model(run, precision)
        return cls(run, model, strategy, topology, precision)

    @cached_property
    def _forward_step(self) -> Any:
        xla = resolve_xla(self.run.config, self.topology.kind)
        return steps.make_forward_step(self.strategy, cut.whole_network(self.model), xla=xla)

    def predict(self, source: ImageSource, progress: Callable[[int, int], None] | None = None) -> Predictions:
        """Predictions of every image of `source`; `progress` is called with the images done and their number."""
        return self.evaluate(source, 0, progress)[0]

    def evaluate(
        self, source: ImageSource, examine: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Predictions, Examination | None]:
        """Predictions of every image, and an examination of `examine` of them at most (None of none).

        Args:
            progress: Called with the images done and their number, an examined one as often as it is looked at.
        """
        names = self.run.info.class_names
        rows = balanced_sample(source.labels, examine, self.run.config.seed)
        total = source.count + len(rows) * examine_run.looks(len(names)) * bool(examine)
        done = 0

        def count(images: int) -> None:
            nonlocal done
            done = min(done + images, total)
            if progress is not None:
                progress(done, total)

        def count_step(number: int, _total: int) -> None:
            count(min(number * self._per_step, source.count) - done)

        try:
            probabilities = self._probabilities(source, count_step)
            predictions = Predictions(
                source.paths, source.labels, probabilities.astype(np.float64), names, source.groups
            )
            return predictions, self._examine(source, rows, count) if len(rows) else None
        except Exception as error:
            if source.failure is not None:
                raise source.failure from error
            raise

    @property
    def _per_step(self) -> int:
        return BATCH_SIZE * self.topology.replicas

    def _probabilities(
        self, source: Source, progress: Callable[[int, int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        return class_probabilities(self.strategy, self.topology, source, BATCH_SIZE, self._forward_step, progress)

    def _examine(self, source: ImageSource, rows: Positions, done: Callable[[int], None]) -> Examination:
        def forward(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
            given = ArraySource(images[..., None], np.zeros(len(images), np.int32))
            return self._probabilities(given).astype(np.float64)

        sources, groups = source.origins(rows)
        return examine_run.examine(
            forward,
            source.pixels(rows),
            source.labels[rows],
            source.masks(rows),
            sources,
            groups,
            self.run.info.class_names,
            self.run.config.seed,
            model=self.model,
            names=[source.paths[row] for row in rows],
            done=done,
        )


def _calibrate(
    request: Request, network: Network, predictions: Predictions
) -> tuple[dict[str, Any] | None, str | None]:
    """The run's calibration, fitted on its validation images if it has none for this risk yet; else why there is none.

    The test images have no part in it. With a dataset or images given, no address is opened that the run alone names.
    """
    known = read_fitted(request.run)
    if known is not None and known.get("target_risk") == request.risk:
        return known, None
    info = network.run.info
    own = Request(request.run, request.out, "validation", dataset=request.dataset)
    if (request.split, request.images, request.dataset) == (own.split, None, None):
        validation = predictions
    else:
        try:
            # Whoever asks for images asks for no dataset: somebody who sent the run may have written the address.
            if own.dataset is None and request.images is not None and isinstance(parse_place(info.dataset), str):
                raise UserError(f"{info.dataset}: the run names an address; give the dataset with --dataset")
            with _source(own, info, as_trained=True) as (source, _):
                validation = network.predict(source)
        except UserError as error:
            kept = "none" if known is None else f"for a risk of {known['target_risk']}, as it was fitted before"
            return known, f"{kept}: the validation images of the run cannot be had ({error})"
    fitted = calibration.fit(validation, request.risk)
    try:
        write_json(request.run / CALIBRATION, fitted)
    except OSError as error:
        return fitted, f"not kept with the run ({error.strerror or error})"
    return fitted, None


def class_probabilities(
    strategy: Any,
    topology: Topology,
    source: Source,
    batch_size: int,
    step: Callable[[Any], Any],
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """The softmax of a network's logits for every input of `source` once, in order, in inference mode.

    Args:
        batch_size: Images per replica and step.
        step: `steps.make_forward_step` of the network; traced once, whatever the number of sources.
        progress: Called with the steps done and their number.

    Returns:
        float32 [N, C], complete on every worker.
    """
    plan = EvaluationPlan(source.count, batch_size, topology.replicas)
    iterator = steps.distributed_batches(strategy, topology, source, plan)
    outputs: list[npt.NDArray[np.float32]] = []
    for number in range(plan.steps):
        outputs.append(step(iterator))
        if progress:
            progress(number + 1, plan.steps)
    return np.concatenate(outputs)[: source.count]


@contextmanager
def _source(
    request: Request, info: run_folder.RunInfo, as_trained: bool = False
) -> "Iterator[tuple[ShardSource | FolderSource, str]]":
    """The images, and what the report calls them.

    Args:
        as_trained: Whether a dataset that is given must be the one that the run was trained on, as without one.
    """
    if request.images is not None:
        yield FolderSource(request.images, info.class_names, info.image_size), str(request.images)
        return
    place = request.dataset or parse_place(info.dataset)
    with local_copy(place) as dataset:
        source = _split_source(request, info, dataset, as_trained or request.dataset is None)
        yield source, f"{place}, split {request.split}"


def _split_source(request: Request, info: run_folder.RunInfo, dataset: Path, as_trained: bool) -> ShardSource:
    manifest = read_manifest(dataset)
    if as_trained and manifest.fingerprint != info.fingerprint:
        raise UserError(
            f"{dataset}: is not, or no longer, what the run was trained on; give the dataset with --dataset"
        )
    if manifest.class_names != info.class_names or manifest.image_size != info.image_size:
        raise UserError(
            f"{dataset}: has classes {', '.join(manifest.class_names)} at {manifest.image_size} pixels, the run has "
            f"{', '.join(info.class_names)} at {info.image_size}; give a dataset that was built alike"
        )
    check_shards(dataset, manifest)
    # The validation images of a run are those that it had; in any other evaluation a damaged record is an error.
    without = damage.left_out(request.run).paths if as_trained and request.split == "validation" else ()
    return ShardSource(dataset, manifest, request.split, without)
