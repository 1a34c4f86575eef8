"""The commands `evaluate`, `calibrate` and `compare`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_dist.cli.options import DEVICES_HELP, JSON_HELP, RUN_HELP, Command, count, positive
from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.remote import parse_place

if TYPE_CHECKING:
    from cxr_dist.evaluation.compare import Images
    from cxr_dist.evaluation.predictions import Predictions


RISK_HELP = (
    "target error rate of the predictions; sets the probability below which the model abstains, on validation images "
)


def add_parsers(command: Command) -> None:
    parser = command(
        "evaluate",
        evaluate,
        "compute metrics with confidence intervals, predictions, figures and a report",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or that of an earlier evaluation"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="test",
        help="split of the dataset to evaluate (default: %(default)s)",
    )
    images.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of labelled images to evaluate instead of a split"
    )
    parser.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="dataset to evaluate (default: the run's)",
    )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)
    parser.add_argument(
        "--risk",
        type=float,
        metavar="SHARE",
        help=RISK_HELP + "(default: that of the run's calibration, else 0.05)",
    )
    parser.add_argument(
        "--examine",
        type=count,
        default=128,
        metavar="N",
        help="number of images for the checks of attention, shortcuts and robustness (default: %(default)s)",
    )

    parser = command(
        "calibrate",
        calibrate,
        "fit temperature and abstention threshold on validation images, for predict, serve and export",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument("--risk", type=float, default=0.05, metavar="SHARE", help=RISK_HELP + "(default: %(default)s)")
    parser.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="new location of the run's dataset (default: its location at training)",
    )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)

    parser = command("compare", compare, "compare two runs on the same test images, with confidence intervals")
    for name in ("first", "second"):
        parser.add_argument(
            name,
            type=Path,
            metavar="RUN",
            help="folder of a run, of a search, or of an evaluation (its predictions are reused)",
        )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def evaluate(options: argparse.Namespace) -> None:
    from cxr_dist.evaluation.evaluate import evaluate_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.tuning.experiment import best_run

    _check_risk(options.risk)
    request = EvaluationSpec(
        best_run(options.run),
        options.out,
        options.split,
        options.images,
        options.dataset,
        risk=options.risk,
        examine=options.examine,
    )
    with progress_bar("evaluate") as progress:
        metrics = evaluate_run(request, options.devices, progress)
    print_metrics(metrics)
    for finding in metrics.get("alarms", ()):
        print(f"ALARM: {finding}")
    print(f"report: {options.out / 'report.html'}")


def _check_risk(risk: float | None) -> None:
    if risk is not None and not 0 < risk < 1:
        raise UserError(f"--risk {risk}: expected an error rate between 0 and 1, such as 0.05")


def calibrate(options: argparse.Namespace) -> None:
    """Fit temperature and threshold on the run's validation images, and keep them with the run."""
    from cxr_dist.evaluation.evaluate import calibrate_run
    from cxr_dist.runs.calibration_file import CALIBRATION
    from cxr_dist.tuning.experiment import best_run

    _check_risk(options.risk)
    run = best_run(options.run)
    replaced = (run / CALIBRATION).exists()
    with progress_bar("calibrate") as progress:
        fitted = calibrate_run(run, options.risk, options.dataset, options.devices, progress)
    print_calibration(run / CALIBRATION, fitted, replaced)


def print_calibration(path: Path, fitted: Mapping[str, Any], replaced: bool = False) -> None:
    """The result of a calibration and its limits, as text."""
    threshold = fitted["abstain_threshold"]
    abstains = "always abstains" if threshold is None else f"abstains below a probability of {threshold:.3f}"
    print(
        f"{path}: temperature {fitted['temperature']:.3f}; the model {abstains}, for a target error rate of "
        f"{fitted['target_risk']:.1%}; fitted on {fitted['images']:,} validation images"
        + ("; replaces an earlier calibration" if replaced else "")
        + "\nnote: the validation images also selected the model, so the error rate on new images may be higher"
    )


def compare(options: argparse.Namespace) -> None:
    """Compare two runs on the same images; runs without an evaluation are predicted here, and nothing is written."""
    from cxr_dist.evaluation.compare import check_same_images, compare as compare_predictions

    folders = (options.first, options.second)
    check_same_images(*(_images(folder) for folder in folders))  # predicting takes minutes
    for folder in folders:
        _warn_of_seen(folder)
    first, second = (_predictions(folder, options.devices) for folder in folders)
    result = compare_predictions(first, second)
    if options.json:
        print(json.dumps({"first": str(options.first), "second": str(options.second), **result}, allow_nan=False))
        return
    print_comparison(result)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The table of an evaluation, with its notes and warnings."""
    from cxr_dist.evaluation.page_text import missing_words, seen_warning, seen_words

    width = max(len(name) for name in [*metrics["per_class"], "class"])
    print(f"{'class':{width}} precision  recall      F1  images")
    for name, row in metrics["per_class"].items():
        precision, recall, f1 = (
            "-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1")
        )
        print(f"{name:{width}} {precision:>9} {recall:>7} {f1:>7} {row['support']:7,}")
    intervals, patients = metrics["uncertainty"]["intervals"], metrics["uncertainty"]["patients"]

    def shown(name: str) -> str:
        if metrics[name] is None:
            return "undefined"
        low, high = intervals[name]
        return f"{metrics[name]:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    print(
        f"accuracy {shown('accuracy')}, macro F1 {shown('f1_macro')}, AUC {shown('auc_macro_ovr')}, "
        f"cosine similarity {shown('cosine_similarity')}, {metrics['n']:,} images"
        + (f" of {patients:,} patients" if patients else "")
        + " (95% confidence intervals)"
    )
    unknown = seen_words(metrics) if metrics["seen"] is None else None
    for note in (missing_words(metrics), unknown, metrics["calibration_note"]):
        if note:
            print(f"note: {note}")
    if seen_warning(metrics):
        print(f"WARNING: {seen_warning(metrics)}")


def print_comparison(result: dict[str, Any]) -> None:
    """The table of a comparison."""
    print(f"{'':24} {'first':>8} {'second':>8} {'second - first':>15}   {result['level']:.0%} confidence interval")
    for name, row in result["metrics"].items():
        if row["difference"] is None:
            print(f"{name:24} undefined")
            continue
        print(
            f"{name:24} {row['first']:8.4f} {row['second']:8.4f} {row['difference']:+15.4f}   "
            f"[{row['low']:+.4f}, {row['high']:+.4f}]{'' if row['low'] <= 0 <= row['high'] else '  *'}"
        )
    table = result["mcnemar"]
    print(
        f"{result['n']:,} images in {result['units']:,} {result['unit']}s; * the interval excludes 0\n"
        f"{table['only_first_right']} images are correct in the first only, {table['only_second_right']} in the second "
        f"only (McNemar's exact test: p = {table['p_value']:.3g})"
    )


def _images(folder: Path) -> "Images":
    """Of an evaluation, or of the test split of a run or search."""
    from cxr_dist.evaluation.compare import Images
    from cxr_dist.evaluation.evaluate import images_of
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.tuning.experiment import best_run

    evaluated = _evaluated(folder)
    if evaluated is None:
        return images_of(EvaluationSpec(best_run(folder), folder))
    return Images(evaluated.paths, evaluated.labels, evaluated.class_names)


def _predictions(folder: Path, devices: int | None) -> "Predictions":
    """Of an evaluation's folder, or of a run or search, on the test split."""
    from cxr_dist.evaluation.evaluate import predict_run
    from cxr_dist.evaluation.evaluated_images import EvaluationSpec
    from cxr_dist.tuning.experiment import best_run

    evaluated = _evaluated(folder)
    if evaluated is not None:
        return evaluated
    with progress_bar(f"predict {folder.name}") as progress:
        return predict_run(EvaluationSpec(best_run(folder), folder), devices, progress)


def _evaluated(folder: Path) -> "Predictions | None":
    """What an evaluation's folder holds; None for another folder."""
    from cxr_dist.evaluation.predictions import read_predictions
    from cxr_dist.evaluation.report import METRICS, PREDICTIONS

    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give the folder of a run, a search or an evaluation")
    if not (folder / PREDICTIONS).is_file():
        return None
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: the evaluation is not complete; run cxr-dist evaluate again")
    return read_predictions(folder / PREDICTIONS)


def _warn_of_seen(folder: Path) -> None:
    """Warn where, by its evaluation, the model has seen some of the images."""
    from cxr_dist.evaluation.report import METRICS

    path = folder / METRICS
    if not path.is_file():
        return
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))["seen"]
        share = seen["share"] if seen else 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); run cxr-dist evaluate again") from None
    if share:
        print(f"warning: {folder}: its model has seen {share:.1%} of these images", file=sys.stderr)
