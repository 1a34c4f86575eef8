"""The commands that judge: `evaluate` and `compare`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_dist.reporting import progress_bar
from tfrecords_builder.errors import UserError

if TYPE_CHECKING:
    from cxr_dist.metrics import Predictions


def evaluate(options: argparse.Namespace) -> None:
    from cxr_dist.evaluate import Request, evaluate_run
    from cxr_dist.search.record import best_run

    if not 0 < options.risk < 1:
        raise UserError(f"--risk {options.risk}: is a share of wrong answers; give a number between 0 and 1")
    request = Request(
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


def compare(options: argparse.Namespace) -> None:
    """Both on the same images; what is not evaluated yet is predicted here, and nothing is written."""
    from cxr_dist.compare import compare as compare_predictions

    first, second = (_predictions(folder, options.devices) for folder in (options.first, options.second))
    result = compare_predictions(first, second)
    if options.json:
        print(json.dumps({"first": str(options.first), "second": str(options.second), **result}, allow_nan=False))
        return
    print_comparison(result)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The table of an evaluation, for people."""
    width = max(len(name) for name in [*metrics["per_class"], "class"])
    print(f"{'class':{width}} precision  recall      F1  images")
    for name, row in metrics["per_class"].items():
        print(f"{name:{width}} {row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f} {row['support']:7,}")
    intervals = metrics["uncertainty"]["intervals"]

    def told(name: str) -> str:
        if metrics[name] is None:
            return "undefined"
        low, high = intervals[name]
        return f"{metrics[name]:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    print(
        f"accuracy {told('accuracy')}, macro F1 {told('f1_macro')}, AUC {told('auc_macro_ovr')}, "
        f"cosine similarity {told('cosine_similarity')}, {metrics['n']:,} images (95% intervals)"
    )


def print_comparison(result: dict[str, Any]) -> None:
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


def _predictions(folder: Path, devices: int | None) -> "Predictions":
    """Of an evaluation's folder, or of a run or search, on the test split."""
    from cxr_dist.metrics import read_predictions
    from cxr_dist.report import METRICS, PREDICTIONS

    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a run, a search, or an evaluation of one")
    if (folder / PREDICTIONS).is_file():
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder}: the evaluation is not complete; evaluate again")
        return read_predictions(folder / PREDICTIONS)
    from cxr_dist.evaluate import Request, predict_run
    from cxr_dist.search.record import best_run

    with progress_bar(f"predict {folder.name}") as progress:
        return predict_run(Request(best_run(folder), folder), devices, progress)
