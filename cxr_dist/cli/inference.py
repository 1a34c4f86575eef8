"""What the commands that use a trained model do: options in, one call into the packages, lines for people out."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def predict(options: argparse.Namespace) -> None:
    """A line for each image; exit status 1 when one of them could not be read."""
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
    """The model as a file for other programs, checked against the run."""
    from cxr_dist.inference.export import CHECKED_IMAGES, export_run
    from cxr_dist.tuning.experiment import best_run

    run = best_run(options.run)
    metadata = export_run(run, options.out, options.format)
    _warn_if_not_calibrated(run)
    print(
        f"{options.out / metadata['model']}: uint8 {metadata['input']['shape']} -> {len(metadata['class_names'])} "
        f"probabilities; differs from the run by {metadata['largest_difference']:.1g} at most, on "
        f"{CHECKED_IMAGES} images"
    )


def serve(options: argparse.Namespace) -> None:
    """Answers until Ctrl-C or SIGTERM."""
    from cxr_dist.serving.http_app import Limits
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
            f"warning: --host {options.host}: whoever reaches this machine may ask; nobody is asked who they are, and "
            "nothing is encrypted",
            file=sys.stderr,
        )
    run = best_run(options.run)
    _warn_if_not_calibrated(run)
    with (
        _handlers_restored(),
        serving(run, options.host, options.port, limits, verbose=options.verbose) as address,
    ):
        ended = _asked_to_end()  # now, as Ray has handlers of its own when it starts
        print(f"{address}: answers POST /predict; {address}/docs says more; Ctrl-C ends it", flush=True)
        ended.wait()
        print("ending", file=sys.stderr)


def _warn_if_not_calibrated(run: Path) -> None:
    from cxr_dist.runs.calibration_file import CALIBRATION

    if not (run / CALIBRATION).exists():
        print(
            f"warning: {run}: is not calibrated: the probabilities are the network's own, and it never abstains; "
            f"`cxr-dist calibrate {run}` changes that",
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
