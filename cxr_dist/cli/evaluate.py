"""The commands `evaluate`, `calibrate` and `compare`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxr_dist import api
from cxr_dist.cli.options import DEVICES_HELP, JSON_HELP, RUN_HELP, Command, count, positive
from tfrecords_builder.common.places import parse_place

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
        help="split of the dataset to evaluate (default: test)",
    )
    images.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of labelled images to evaluate instead of a split"
    )
    parser.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="dataset to evaluate (default: the run's); with --images, where the run's dataset is now",
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
        default=api.EXAMINED,
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
    evaluation = api.evaluate(
        options.run,
        options.out,
        split=options.split,
        images=options.images,
        dataset=options.dataset,
        devices=options.devices,
        risk=options.risk,
        examine=options.examine,
    )
    print_metrics(evaluation.metrics)
    for alarm in evaluation.alarms:
        print(f"ALARM: {alarm}")
    print(f"report: {evaluation.report}")


def calibrate(options: argparse.Namespace) -> None:
    """Fit temperature and threshold on the run's validation images, and keep them with the run."""
    from cxr_dist.evaluation.evaluate import calibrate_run
    from cxr_dist.runs.calibration_file import CALIBRATION
    from cxr_dist.runs.loggers import progress_bar
    from cxr_dist.tuning.experiment import best_run

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
    comparison = api.compare(options.first, options.second, devices=options.devices)
    for text in comparison.warnings:
        print(f"warning: {text}", file=sys.stderr)
    if options.json:
        print(json.dumps(comparison.result, allow_nan=False))
        return
    print_comparison(comparison.result)


def print_metrics(metrics: Mapping[str, Any]) -> None:
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


def print_comparison(result: Mapping[str, Any]) -> None:
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
