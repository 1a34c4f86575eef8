"""The commands that use a trained model: `predict`, `export` and `serve`."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cxr_dist.cli.options import RUN_HELP, Command, positive

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_parsers(command: Command) -> None:
    parser = command("predict", predict, "classify images that have no label")
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="files of images (PNG, JPEG, TIFF, BMP, WebP or DICOM), or folders of them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line for scripts")
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FOLDER",
        help="write each image with a Grad-CAM heat map over it into this folder",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="number of decoding threads (default: one per core)"
    )

    parser = command("export", export, "write the model as a file for other programs: pixels in, probabilities out")
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or that of an earlier export")
    parser.add_argument(
        "--format",
        choices=["savedmodel", "onnx"],
        default="savedmodel",
        help="file format of the model (default: %(default)s)",
    )

    parser = command("serve", serve, "serve the model over HTTP: an image in, a class and probabilities out")
    parser.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT", help=RUN_HELP)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    parser.add_argument(
        "--port", type=positive, default=8000, metavar="N", help="port to listen on (default: %(default)s)"
    )
    for option, default, metavar, text in (
        ("--max-batch", 16, "B", "largest number of images in a batch"),
        ("--batch-wait-ms", 10, "MS", "longest wait of a batch's first image for others, in milliseconds"),
        ("--max-body-mb", 64, "MB", "largest request body in mebibytes; beyond it, status 413"),
        ("--max-waiting", 64, "N", "largest number of concurrent requests; beyond it, status 503"),
        ("--timeout", 60, "S", "time limit of a request in seconds; beyond it, status 504"),
    ):
        parser.add_argument(
            option, type=positive, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )


def predict(options: argparse.Namespace) -> None:
    """Print a line for each image; exit status 1 when one of them could not be read."""
    from cxr_dist.data.image_files import find_inputs
    from cxr_dist.inference.classifier import load_classifier
    from cxr_dist.inference.predict import Overlays, predict_files, table_head, table_line
    from cxr_dist.tuning.experiment import best_run
    from tfrecords_builder.common.pool import default_workers

    paths = find_inputs(options.images)  # before the model, which takes seconds
    run = best_run(options.run)
    classifier = load_classifier(run)
    _warn_if_not_calibrated(run)
    overlays = Overlays(options.overlay, classifier) if options.overlay else None
    if not options.json:
        print(table_head(classifier.class_names))
    unreadable = 0
    for outcome in predict_files(classifier, paths, options.workers or default_workers(), overlays=overlays):
        unreadable += outcome.prediction is None
        print(outcome.to_json() if options.json else table_line(outcome, classifier.class_names), flush=True)
    if unreadable:
        print(f"{unreadable:,} of {len(paths):,} files could not be read", file=sys.stderr)
        raise SystemExit(1)


def export(options: argparse.Namespace) -> None:
    """Write the model for other programs, checked against the run."""
    from cxr_dist.inference.export import CHECKED_IMAGES, export_run
    from cxr_dist.tuning.experiment import best_run

    run = best_run(options.run)
    metadata = export_run(run, options.out, options.format)
    _warn_if_not_calibrated(run)
    print(
        f"{options.out / metadata['model']}: uint8 {metadata['input']['shape']} -> {len(metadata['class_names'])} "
        f"probabilities; they differ from the run's by at most {metadata['largest_difference']:.1g} on "
        f"{CHECKED_IMAGES} images"
    )


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from cxr_dist.serving.limits import Limits
    from cxr_dist.serving.service import serving
    from cxr_dist.tuning.experiment import best_run

    limits = Limits(
        max_batch=options.max_batch,
        batch_wait_s=options.batch_wait_ms / 1000,
        max_body_bytes=options.max_body_mb << 20,
        max_waiting=options.max_waiting,
        answer_timeout_s=options.timeout,
    )
    if options.host not in LOOPBACK:
        print(
            f"warning: --host {options.host}: anyone who can reach this machine can send requests; there is no "
            "authentication and no encryption",
            file=sys.stderr,
        )
    run = best_run(options.run)
    _warn_if_not_calibrated(run)
    with (
        _handlers_restored(),
        serving(run, options.host, options.port, limits, verbose=options.verbose) as address,
    ):
        ended = _asked_to_end()  # now, as Ray has handlers of its own when it starts
        print(f"{address}: serves POST /predict; see {address}/docs; Ctrl-C stops it", flush=True)
        ended.wait()
        print("stopping", file=sys.stderr)


def _warn_if_not_calibrated(run: Path) -> None:
    from cxr_dist.runs.calibration_file import CALIBRATION

    if not (run / CALIBRATION).exists():
        print(
            f"warning: {run}: is not calibrated, so the probabilities are uncalibrated and there is no threshold; "
            f"run cxr-dist calibrate {run}",
            file=sys.stderr,
        )


_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_end() -> threading.Event:
    """Set by SIGINT and SIGTERM, which do nothing else from now on."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in _ENDING:
        signal.signal(number, end)
    return ended
