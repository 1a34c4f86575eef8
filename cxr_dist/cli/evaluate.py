"""The commands that judge: `evaluate`, `calibrate` and `compare`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxr_dist import api
from cxr_dist.cli.options import DEVICES_HELP, RUN_HELP, Command, count, positive
from cxr_dist.runs.loggers import progress_bar
from tfrecords_builder.remote import parse_place

RISK_HELP = (
    "target share of wrong answers among those that are given; sets the probability below which the model abstains. "
    "That is chosen on the validation images, which chose the model too, so it is no guarantee "
)


def add_parsers(command: Command) -> None:
    parser = command(
        "evaluate",
        evaluate,
        "metrics with intervals, predictions, figures and report of a run, or of a search's best trial",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an earlier evaluation")
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        help="the images of this split of the dataset (default: test)",
    )
    images.add_argument("--images", type=Path, metavar="FOLDER", help="labelled images that are not in the dataset")
    parser.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="a dataset (default: the one that the run was trained on)",
    )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)
    parser.add_argument(
        "--risk",
        type=float,
        metavar="SHARE",
        help=RISK_HELP + "(for this report alone; default: that of the run's calibration, else 0.05)",
    )
    parser.add_argument(
        "--examine",
        type=count,
        default=api.EXAMINED,
        metavar="N",
        help="number of images to run the checks of attention, lungs and robustness on, about 30 forward passes each; "
        "0 for none (default: %(default)s)",
    )

    parser = command(
        "calibrate",
        calibrate,
        "fit on the validation images how sure a run is, and when it abstains; predict, serve and export obey",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument("--risk", type=float, default=0.05, metavar="SHARE", help=RISK_HELP + "(default: %(default)s)")
    parser.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="the new place of the dataset that the run was trained on (default: its place then)",
    )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)

    parser = command("compare", compare, "two runs on the same test images, with intervals")
    for name in ("first", "second"):
        parser.add_argument(
            name, type=Path, metavar="RUN", help="a run, a search, or an evaluation of one, which saves predicting"
        )
    parser.add_argument("--devices", type=positive, metavar="M", help=DEVICES_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


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
    from cxr_dist.tuning.experiment import best_run

    run = best_run(options.run)
    replaced = (run / CALIBRATION).exists()
    with progress_bar("calibrate") as progress:
        fitted = calibrate_run(run, options.risk, options.dataset, options.devices, progress)
    print_calibration(run / CALIBRATION, fitted, replaced)


def print_calibration(path: Path, fitted: Mapping[str, Any], replaced: bool = False) -> None:
    """What a calibration found, and how far it holds, for people."""
    threshold = fitted["abstain_threshold"]
    answers = "no answer is given" if threshold is None else f"answers are given from a probability of {threshold:.3f}"
    print(
        f"{path}: temperature {fitted['temperature']:.3f}; {answers}, for at most {fitted['target_risk']:.1%} wrong "
        f"answers; fitted on {fitted['images']:,} validation images"
        + ("; it replaces an earlier calibration" if replaced else "")
        + "\nthe validation images also chose the model: on new images more answers may be wrong"
    )


def compare(options: argparse.Namespace) -> None:
    """Both on the same images; what is not evaluated yet is predicted here, and nothing is written."""
    comparison = api.compare(options.first, options.second, devices=options.devices)
    for text in comparison.warnings:
        print(f"warning: {text}", file=sys.stderr)
    if options.json:
        print(json.dumps(comparison.result, allow_nan=False))
        return
    print_comparison(comparison.result)


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """The table of an evaluation, for people, and what must be known of it."""
    from cxr_dist.evaluation.page_text import missing_words, seen_warning, seen_words

    width = max(len(name) for name in [*metrics["per_class"], "class"])
    print(f"{'class':{width}} precision  recall      F1  images")
    for name, row in metrics["per_class"].items():
        precision, recall, f1 = (
            "-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1")
        )
        print(f"{name:{width}} {precision:>9} {recall:>7} {f1:>7} {row['support']:7,}")
    intervals, patients = metrics["uncertainty"]["intervals"], metrics["uncertainty"]["patients"]

    def told(name: str) -> str:
        if metrics[name] is None:
            return "undefined"
        low, high = intervals[name]
        return f"{metrics[name]:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    print(
        f"accuracy {told('accuracy')}, macro F1 {told('f1_macro')}, AUC {told('auc_macro_ovr')}, "
        f"cosine similarity {told('cosine_similarity')}, {metrics['n']:,} images"
        + (f" of {patients:,} patients" if patients else "")
        + " (95% intervals)"
    )
    unknown = seen_words(metrics) if metrics["seen"] is None else None
    for note in (missing_words(metrics), unknown, metrics["calibration_note"]):
        if note:
            print(f"note: {note}")
    if seen_warning(metrics):
        print(f"WARNING: {seen_warning(metrics)}")


def print_comparison(result: Mapping[str, Any]) -> None:
    """The table of a comparison, for people."""
    print(f"{'':24} {'first':>8} {'second':>8} {'second - first':>15}   {result['level']:.0%} interval")
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
        f"{result['n']:,} images in {result['units']:,} {result['unit']}s; * the interval leaves out 0\n"
        f"{table['only_first_right']} right by the first alone, {table['only_second_right']} by the second alone "
        f"(McNemar's exact test: p = {table['p_value']:.3g})"
    )
