"""What the commands that use a trained model do: options in, one call into the packages, lines for people out."""

import argparse
import sys


def predict(options: argparse.Namespace) -> None:
    """A line for each image; exit status 1 when one of them could not be read."""
    from cxr_dist.classifier import load_classifier
    from cxr_dist.inputs import find_inputs
    from cxr_dist.predict import predict_files, table_head, table_line
    from cxr_dist.search.record import best_run
    from tfrecords_builder.pool import default_workers

    paths = find_inputs(options.images)  # before the model, which takes seconds
    classifier = load_classifier(best_run(options.run))
    if not options.json:
        print(table_head(classifier.class_names))
    unreadable = 0
    for outcome in predict_files(classifier, paths, options.workers or default_workers()):
        unreadable += outcome.answer is None
        print(outcome.to_json() if options.json else table_line(outcome, classifier.class_names), flush=True)
    if unreadable:
        print(f"{unreadable:,} of {len(paths):,} files could not be read", file=sys.stderr)
        raise SystemExit(1)


def export(options: argparse.Namespace) -> None:
    """The model as a file for other programs, checked against the run."""
    from cxr_dist.export import CHECKED_IMAGES, export_run
    from cxr_dist.search.record import best_run

    metadata = export_run(best_run(options.run), options.out, options.format)
    print(
        f"{options.out / metadata['model']}: uint8 {metadata['input']['shape']} -> {len(metadata['class_names'])} "
        f"probabilities; differs from the run by {metadata['largest_difference']:.1g} at most, on "
        f"{CHECKED_IMAGES} images"
    )
