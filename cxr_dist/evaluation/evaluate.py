"""A run's folder and images in, figures out: nothing of training is needed, and no Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import pipeline
from cxr_dist.data.arrays import ArraySource, Source
from cxr_dist.data.batch_sampler import EvaluationBatchSampler, Positions
from cxr_dist.data.image_folder import FolderSource
from cxr_dist.data.shards import ShardSource
from cxr_dist.distributed.devices import Topology, prepare_devices
from cxr_dist.distributed.precision import resolve_precision, resolve_xla
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.evaluation import calibration
from cxr_dist.evaluation.assessment import Origin
from cxr_dist.evaluation.compare import Images
from cxr_dist.evaluation.examination import examine as examine_run
from cxr_dist.evaluation.examination.findings import Examination
from cxr_dist.evaluation.examination.statistics import balanced_sample
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.evaluation.report import check_output_folder, write_evaluation
from cxr_dist.inference.classifier import BATCH_SIZE, load_model
from cxr_dist.model import forward, split_point
from cxr_dist.runs import corrupt_records, run_folder
from cxr_dist.runs.calibration_file import CALIBRATION, read_fitted
from cxr_dist.runs.finished import FinishedRun, read_finished
from cxr_dist.runs.seen_images import SeenImages, read_seen
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import write_json
from tfrecords_builder.format.manifest import Manifest, check_shards, read_manifest
from tfrecords_builder.remote import Place, local_copy, parse_place

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
    risk: float | None = None
    """Share of wrong answers that the threshold allows; by default that of the run's calibration, else 0.05."""
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
    read_fitted(request.run)  # likewise, where it is damaged
    with _images(request, run.info) as images:
        origin = _origin(request, images, read_seen(request.run))
        network = Network.load(run, devices)
        predictions, examination = network.evaluate(images.source, request.examine, progress)
    calibrated, note = _calibration(request, network, predictions if images.as_trained else None)
    described = {
        "run": str(request.run),
        "images": images.title,
        **({"split": request.split} if request.images is None else {}),
        **({"drawn": True} if request.drawn else {}),
        "precision": network.precision,
        "replicas": network.topology.replicas,
        "training": network.run.result,
        "config": network.run.config.tree(),
    }
    return write_evaluation(
        request.out,
        predictions,
        run_folder.read_history(request.run),
        described,
        calibrated=calibrated,
        calibration_note=note,
        examination=examination,
        origin=origin,
    )


def predict_run(
    request: Request, devices: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """The predictions alone of what `evaluate_run` would evaluate; nothing is written."""
    run = read_finished(request.run)
    with _images(request, run.info) as images:
        return Network.load(run, devices).predict(images.source, progress)


def images_of(request: Request) -> Images:
    """What `predict_run` would predict, without the work."""
    info = read_finished(request.run).info
    with _images(request, info) as images:
        source = images.source
        return Images(source.paths, source.labels, info.class_names, source.digests)


def calibrate_run(
    run_path: Path,
    risk: float = calibration.RISK,
    dataset: Place | None = None,
    devices: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fit a finished run's calibration on its validation images, and write calibration.json into its folder.

    Args:
        run_path: The run's folder.
        risk: Share of wrong answers that the threshold allows, 0 to 1.
        dataset: Where the dataset is that the run was trained on; by default where it was then.
        devices: As `evaluate_run`.
        progress: As `evaluate_run`.

    Returns:
        What `calibration.fit` found.

    Raises:
        UserError: the run is not finished, its validation images cannot be had, or the file cannot be written.
    """
    run = read_finished(run_path)
    validation = Request(run_path, run_path, "validation", dataset=dataset)
    with _images(validation, run.info, as_trained=True) as images:
        predictions = Network.load(run, devices).predict(images.source, progress)
    fitted = calibration.fit(predictions, risk)
    try:
        write_json(run_path / CALIBRATION, fitted)
    except OSError as error:
        raise UserError(
            f"{run_path / CALIBRATION}: cannot be written ({error.strerror or error}); calibrate a copy of the run"
        ) from None
    return fitted


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
        return forward.make_forward_step(self.strategy, split_point.whole_network(self.model), xla=xla)

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


def _calibration(
    request: Request, network: Network, own: Predictions | None
) -> tuple[dict[str, Any] | None, str | None]:
    """The run's calibration, or one fitted for this report alone; and what the report has to say about it.

    With a dataset or images given, no address is opened that the run alone names.

    Args:
        request: What is evaluated.
        network: The run's.
        own: The predictions of the request, where its images are of the dataset that the run was trained on.
    """
    known, info = read_fitted(request.run), network.run.info
    risk = request.risk or (known["target_risk"] if known else calibration.RISK)
    if known is not None and known["target_risk"] == risk:
        return known | {"kept_with_run": True}, None
    validation = Request(request.run, request.out, "validation", dataset=request.dataset)
    if own is not None and request.split == "validation":
        predictions = own
    else:
        try:
            # Whoever asks for images asks for no dataset: somebody who sent the run may have written the address.
            if request.dataset is None and request.images is not None and isinstance(parse_place(info.dataset), str):
                raise UserError(f"{info.dataset}: the run names an address; give the dataset with --dataset")
            with _images(validation, info, as_trained=True) as images:
                predictions = network.predict(images.source)
        except UserError as error:
            cannot = f"The validation images of the run cannot be had: {error}."
            if known is None:
                return None, f"There is no calibration. {cannot}"
            kept = known["target_risk"]
            return known | {"kept_with_run": True}, f"The threshold is that of the run, for a risk of {kept}. {cannot}"
    fitted = calibration.fit(predictions, risk) | {"kept_with_run": False}
    if known is not None:
        return fitted, (
            f"Temperature and threshold were computed for this report alone, for a risk of {risk}; the run keeps its "
            f"own, for a risk of {known['target_risk']}."
        )
    return fitted, (
        "Temperature and threshold were computed for this report alone, and not kept: run `cxr-dist calibrate "
        f"{request.run}` so that predict, serve and export use them."
    )


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
        step: `forward.make_forward_step` of the network; traced once, whatever the number of sources.
        progress: Called with the steps done and their number.

    Returns:
        float32 [N, C], complete on every worker.
    """
    plan = EvaluationBatchSampler(source.count, batch_size, topology.replicas)
    iterator = pipeline.distributed_batches(strategy, topology, source, plan)
    outputs: list[npt.NDArray[np.float32]] = []
    for number in range(plan.steps):
        outputs.append(step(iterator))
        if progress:
            progress(number + 1, plan.steps)
    return np.concatenate(outputs)[: source.count]


@dataclass(frozen=True)
class _Evaluated:
    """The images of a request."""

    source: ImageSource
    title: str
    """What the report calls them."""
    as_trained: bool
    """Whether they are a split of the dataset that the run was trained on."""


@contextmanager
def _images(request: Request, info: run_folder.RunInfo, as_trained: bool = False) -> Iterator[_Evaluated]:
    """The images that are asked for.

    Args:
        request: Which.
        info: Of the run.
        as_trained: Whether a dataset that is given must be the one that the run was trained on, as without one.
    """
    if request.images is not None:
        yield _Evaluated(FolderSource(request.images, info.class_names, info.image_size), str(request.images), False)
        return
    place = request.dataset or parse_place(info.dataset)
    if request.dataset is None and isinstance(place, Path) and not place.exists():
        raise UserError(f"{request.run}: was trained on {place}, which is gone; give its new place with --dataset")
    with local_copy(place) as dataset:
        manifest = read_manifest(dataset)
        is_same = manifest.fingerprint == info.fingerprint
        if not is_same and (as_trained or request.dataset is None):
            raise UserError(
                f"{place}: is not the dataset that the run was trained on ({_difference(request.run, manifest)}); "
                "build that again from the same images with the same options, give its place with --dataset, or train "
                "a new run on this one"
            )
        yield _Evaluated(
            _split_source(request, info, dataset, manifest, is_same), f"{place}, split {request.split}", is_same
        )


def _difference(run: Path, manifest: Manifest) -> str:
    """In what a dataset differs from the one that the run was trained on."""
    seen = read_seen(run)
    if seen is None:
        return "its fingerprint differs"
    now = asdict(manifest.settings)
    changed = [key for key in now if now[key] != seen.settings.get(key)]
    if not changed:
        return "its images differ"
    return ", ".join(f"{key} {now[key]} where it was {seen.settings.get(key)}" for key in changed)


def _split_source(
    request: Request, info: run_folder.RunInfo, dataset: Path, manifest: Manifest, is_same: bool
) -> ShardSource:
    if manifest.class_names != info.class_names or manifest.image_size != info.image_size:
        raise UserError(
            f"{dataset}: has classes {', '.join(manifest.class_names)} at {manifest.image_size} pixels, the run has "
            f"{', '.join(info.class_names)} at {info.image_size}; give a dataset that was built alike"
        )
    check_shards(dataset, manifest)
    # The validation images of a run are those that it had; in any other evaluation a damaged record is an error.
    without = corrupt_records.left_out(request.run).paths if is_same and request.split == "validation" else ()
    return ShardSource(dataset, manifest, request.split, without)


def _origin(request: Request, images: _Evaluated, seen: SeenImages | None) -> Origin:
    """Which of the images the run has seen: of its own training and validation split all, by the user's wish."""
    source = images.source
    if images.as_trained and request.split in ("train", "validation"):
        training = np.full(source.count, request.split == "train")
        return Origin(training, ~training, own=True, asked_for=True, patients=source.patients)
    if seen is None:
        return Origin(own=images.as_trained, patients=source.patients)
    return Origin(*seen.mark(source.digests), own=images.as_trained, patients=source.patients)
