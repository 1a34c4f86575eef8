"""A run's folder and images in, figures out: nothing of training is needed, and no Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data import pipeline
from cxr_dist.data.arrays import ArraySource, Source
from cxr_dist.data.batch_sampler import EvaluationBatchSampler, Positions
from cxr_dist.distributed.devices import Topology, prepare_devices
from cxr_dist.distributed.precision import resolve_precision, resolve_xla
from cxr_dist.distributed.strategy import make_strategy
from cxr_dist.evaluation import calibration
from cxr_dist.evaluation.compare import Images
from cxr_dist.evaluation.evaluated_images import (
    EvaluationSpec,
    ImageSource,
    check_risk,
    evaluated_images,
)
from cxr_dist.evaluation.examination.examine import ExaminationInputs, examine, looks
from cxr_dist.evaluation.examination.findings import Examination
from cxr_dist.evaluation.examination.statistics import balanced_sample
from cxr_dist.evaluation.predictions import Predictions
from cxr_dist.evaluation.report import Evaluation, check_output_folder, write_evaluation
from cxr_dist.evaluation.seen import origin_of
from cxr_dist.inference.classifier import BATCH_SIZE, load_model
from cxr_dist.model import forward, split_point
from cxr_dist.runs import run_folder
from cxr_dist.runs.calibration_file import CALIBRATION, read_fitted
from cxr_dist.runs.run_folder import FinishedRun, read_finished
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import write_json
from tfrecords_builder.common.places import Place, parse_place


def evaluate_run(
    spec: EvaluationSpec,
    devices: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    comparing: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run and write metrics, predictions, figures and report; what metrics.json holds.

    Args:
        spec: What to evaluate.
        devices: GPUs, or logical CPUs; all GPUs or one CPU when None.
        progress: Called with the images done and their number.
        comparing: Likewise, before, while they are compared with those that the run has seen.

    Raises:
        UserError: the run is not finished, or the images cannot be had.
    """
    check_output_folder(spec.out)  # now, not after minutes of computing
    run = read_finished(spec.run)
    read_fitted(spec.run)  # likewise, where it is damaged
    with evaluated_images(spec, run.info) as images:
        origin = origin_of(spec, images, run.info, comparing)
        loaded = LoadedRun.load(run, devices)
        predictions, examination = loaded.evaluate(images.source, spec.examine, progress)
    calibrated, note = _calibration(spec, loaded, predictions if images.as_trained else None)
    described = {
        "run": str(spec.run),
        "images": images.title,
        **({"split": spec.split} if spec.images is None else {}),
        **({"drawn": True} if spec.drawn else {}),
        "precision": loaded.precision,
        "replicas": loaded.topology.replicas,
        "training": loaded.run.result,
        "config": loaded.run.config.tree(),
    }
    history = run_folder.read_history(spec.run)
    return write_evaluation(
        spec.out, Evaluation(predictions, history, described, calibrated, note, examination, origin)
    )


def predict_run(
    spec: EvaluationSpec, devices: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """The predictions alone of what `evaluate_run` would evaluate; nothing is written."""
    run = read_finished(spec.run)
    with evaluated_images(spec, run.info) as images:
        return LoadedRun.load(run, devices).predict(images.source, progress)


def images_of(spec: EvaluationSpec) -> Images:
    """What `predict_run` would predict, without the work."""
    info = read_finished(spec.run).info
    with evaluated_images(spec, info) as images:
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
        risk: Error rate that the threshold allows, 0 to 1.
        dataset: Where the run's dataset is now; by default where it was.
        devices, progress: As `evaluate_run`.

    Raises:
        UserError: the run is not finished, its validation images cannot be had, or the file cannot be written.
    """
    check_risk(risk)
    run = read_finished(run_path)
    validation = EvaluationSpec(run_path, run_path, "validation", dataset=dataset)
    with evaluated_images(validation, run.info, as_trained=True) as images:
        predictions = LoadedRun.load(run, devices).predict(images.source, progress)
    fitted = calibration.fit(predictions, risk)
    try:
        write_json(run_path / CALIBRATION, fitted)
    except OSError as error:
        raise UserError(
            f"{run_path / CALIBRATION}: cannot be written ({error.strerror or error}); calibrate a copy of the run"
        ) from None
    return fitted


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A finished run's best model, ready to predict."""

    run: FinishedRun
    model: Any
    strategy: Any
    topology: Topology
    precision: str

    @classmethod
    def load(cls, run: FinishedRun, devices: int | None = None) -> "LoadedRun":
        """Raises UserError where the model is damaged."""
        topology = prepare_devices(devices, option="--devices")
        precision = resolve_precision(run.config.precision, topology.kind)
        strategy = make_strategy(topology)
        with strategy.scope():
            model = load_model(run, precision)
        return cls(run, model, strategy, topology, precision)

    @cached_property
    def _forward_step(self) -> Any:
        xla = resolve_xla(self.run.config)
        return forward.make_forward_step(self.strategy, split_point.whole_network(self.model), xla=xla)

    def predict(self, source: ImageSource, progress: Callable[[int, int], None] | None = None) -> Predictions:
        """Predictions of every image of `source`; `progress` is called with the images done and their number."""
        return self.evaluate(source, 0, progress)[0]

    def evaluate(
        self, source: ImageSource, examined: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Predictions, Examination | None]:
        """Predictions of every image, and an examination of `examined` of them at most (None of none).

        Args:
            progress: Called with the images done and their number, an examined one as often as it is looked at.
        """
        names = self.run.info.class_names
        rows = balanced_sample(source.labels, examined, self.run.config.seed)
        total = source.count + len(rows) * looks(len(names)) * bool(examined)
        done = 0

        def count(images: int) -> None:
            nonlocal done
            done = min(done + images, total)
            if progress is not None:
                progress(done, total)

        try:
            probabilities = self._probabilities(source, lambda predicted, _all: count(predicted - done))
            predictions = Predictions(
                source.paths, source.labels, probabilities.astype(np.float64), names, source.groups
            )
            return predictions, self._examine(source, rows, count) if len(rows) else None
        except Exception as error:
            if source.failure is not None:
                raise source.failure from error
            raise

    def _probabilities(
        self, source: Source, progress: Callable[[int, int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        return class_probabilities(self.strategy, self.topology, source, BATCH_SIZE, self._forward_step, progress)

    def _examine(self, source: ImageSource, rows: Positions, done: Callable[[int], None]) -> Examination:
        def forward(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
            given = ArraySource(images[..., None], np.zeros(len(images), np.int32))
            return self._probabilities(given).astype(np.float64)

        sources, groups = source.origins(rows)
        inputs = ExaminationInputs(
            forward,
            source.pixels(rows),
            source.labels[rows],
            [source.paths[row] for row in rows],
            self.run.info.class_names,
            self.run.config.seed,
            source.masks(rows),
            sources,
            groups,
            self.model,
        )
        return examine(inputs, done)


def _calibration(
    spec: EvaluationSpec, loaded: LoadedRun, own: Predictions | None
) -> tuple[dict[str, Any] | None, str | None]:
    """The run's calibration, or one fitted for this report alone; and what the report has to say about it.

    With a dataset or images given, no address is opened that the run alone names.

    Args:
        spec: What is evaluated.
        loaded: The run.
        own: The predictions of the evaluation, where its images are of the dataset that the run was trained on.
    """
    known, info = read_fitted(spec.run), loaded.run.info
    risk = spec.risk or (known["target_risk"] if known else calibration.RISK)
    if known is not None and known["target_risk"] == risk:
        return known | {"kept_with_run": True}, None
    validation = EvaluationSpec(spec.run, spec.out, "validation", dataset=spec.dataset)
    if own is not None and spec.split == "validation":
        predictions = own
    else:
        try:
            # With --images, no address is opened that only the run names: the run may come from somebody else.
            if spec.dataset is None and spec.images is not None and isinstance(parse_place(info.dataset), str):
                raise UserError(f"{info.dataset}: is an address that the run names; give the dataset with --dataset")
            with evaluated_images(validation, info, as_trained=True) as images:
                predictions = loaded.predict(images.source)
        except UserError as error:
            cannot = f"The run's validation images are not available: {error}."
            if known is None:
                return None, f"The model is not calibrated. {cannot}"
            kept = known["target_risk"]
            return known | {
                "kept_with_run": True
            }, f"The threshold is the run's, for a target error rate of {kept}. {cannot}"
    fitted = calibration.fit(predictions, risk) | {"kept_with_run": False}
    if known is not None:
        return fitted, (
            f"Temperature and threshold were fitted for this report only, for a target error rate of {risk}. The run "
            f"keeps its own, for a target error rate of {known['target_risk']}."
        )
    return fitted, (
        "Temperature and threshold were fitted for this report only. `cxr-dist calibrate "
        f"{spec.run}` stores them with the run, for predict, serve and export."
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

    `batch_size` is per replica and step; `step`, of `forward.make_forward_step`, is traced once for all sources;
    `progress` is called with the images done and their number.

    Returns:
        float32 [N, C], complete on every worker.
    """
    plan = EvaluationBatchSampler(source.count, batch_size, topology.replicas)
    iterator = pipeline.distributed_batches(strategy, topology, source, plan)
    outputs: list[npt.NDArray[np.float32]] = []
    for number in range(plan.steps):
        outputs.append(step(iterator))
        if progress:
            progress(min((number + 1) * batch_size * topology.replicas, source.count), source.count)
    return np.concatenate(outputs)[: source.count]
