"""`cxr-dist`: the command line. TensorFlow, Ray and matplotlib are imported by the commands that need them.

Exit status: 0 done; 2 something the user can mend, said in one line that begins with `error: `; 130 interrupted by
Ctrl-C; 141 nobody reads the output; 143 stopped on request; 1 anything else.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from cxr_dist.cli import (
    bench as bench_commands,
    dataset as dataset_commands,
    doctor as doctor_command,
    evaluate as evaluate_commands,
    inference as inference_commands,
    job_options,
    terminal,
    train as train_commands,
    tune as tune_commands,
)
from cxr_dist.distributed.devices import QUIET, check_backend
from cxr_dist.runs.stop_request import StoppedError
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import disk_error
from tfrecords_builder.remote import parse_place

DATASET_HELP = "a folder that build made, or its address (s3://bucket/name, gs://...)"
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""Adds a command: name, what it runs, and a sentence about it."""


def _workers(text: str) -> tuple[int, int]:
    """`N` or `MIN:MAX`."""
    least, _, most = text.partition(":")
    found = _positive(least), _positive(most or least)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; give the smaller number first")
    return found


class _Parser(argparse.ArgumentParser):
    """Mistyped options are the user's to mend, like any other input: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="cxr-dist", description="Train and evaluate chest X-ray classifiers, on a laptop or a cluster."
    )
    parser.add_argument("--verbose", action="store_true", help="show TensorFlow's and Ray's own messages")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text)
        added.set_defaults(action=run)
        added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    _add_phantoms(command)
    _add_datasets(command)
    _add_training(command)
    _add_search(command)
    _add_evaluation(command)
    _add_use(command)
    _add_bench(command)
    _add_jobs(command, subparsers.choices)
    return parser


def _add_phantoms(command: Command) -> None:
    demo = command(
        "demo", train_commands.demo, "phantom X-rays -> dataset -> both stages -> evaluation, in a few minutes"
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="a new folder (default: %(default)s)")
    demo.add_argument(
        "--launcher",
        choices=["ray", "local"],
        default="local",
        help="Ray Train, or this process (default: %(default)s)",
    )

    synth = command("synth", dataset_commands.synth, "draw phantom X-rays of the four classes, with lung masks")
    synth.add_argument("folder", type=Path, metavar="DIR")
    synth.add_argument("--per-class", type=int, default=250, metavar="N", help="images (default: %(default)s)")
    synth.add_argument("--size", type=int, default=299, metavar="PX", help="pixels (default: %(default)s)")
    synth.add_argument("--seed", type=int, default=0, metavar="S")
    synth.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")


def _add_datasets(command: Command) -> None:
    download = command("download", dataset_commands.download, "the COVID-19 Radiography Database from Kaggle, 0.8 GB")
    download.add_argument("folder", type=Path, metavar="DIR", help="a new folder")

    build = command("build", dataset_commands.build, "labelled image files -> a verified dataset of TFRecord shards")
    build.add_argument("source", type=Path, metavar="SOURCE", help="<Class>/images/*.png or <Class>/*.png (or .jpg)")
    build.add_argument(
        "dataset", type=parse_place, metavar="DATASET", help="a new folder, or an address: s3://bucket/name, gs://..."
    )
    build.add_argument("--image-size", type=int, default=224, metavar="PX", help="stored size (default: %(default)s)")
    build.add_argument("--encoding", choices=["raw", "png", "jpeg"], default="raw", help="(default: %(default)s)")
    build.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")
    build.add_argument("--seed", type=int, default=0, metavar="S", help="of the split (default: %(default)s)")
    rule = build.add_mutually_exclusive_group()
    rule.add_argument(
        "--split",
        choices=["leak-free", "published"],
        default="leak-free",
        help="70/15/15 of each class; leak-free keeps near-duplicates and patients together (default: %(default)s)",
    )
    rule.add_argument("--split-file", type=Path, metavar="CSV", help="columns path and split, instead of a rule")
    build.add_argument(
        "--conflicts",
        choices=["exclude", "keep"],
        help="near-duplicates in several classes (default: exclude; keep with --split published)",
    )
    build.add_argument(
        "--masks",
        choices=["read", "ignore"],
        default="read",
        help="lung masks, where <Class>/masks has them (default: %(default)s)",
    )
    build.add_argument(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="processes of this machine, or tasks on a Ray cluster (default: %(default)s)",
    )
    build.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster (default: $RAY_ADDRESS, or one of its own)"
    )
    build.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="what a damaged file does, and a class that would lose over 1 %% of its pictures (default: %(default)s)",
    )

    verify = command("verify", dataset_commands.verify, "read a dataset back: every record, checksum and count")
    verify.add_argument("dataset", type=parse_place, metavar="DATASET", help=DATASET_HELP)

    eda = command(
        "eda", dataset_commands.eda, "explore a dataset: counts, pictures, duplicates, and what could mislead a network"
    )
    eda.add_argument("dataset", type=parse_place, metavar="DATASET", help=DATASET_HELP)
    eda.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an earlier analysis")


def _add_training(command: Command) -> None:
    train = command("train", train_commands.train, "train both stages; started again with the same --out it resumes")
    train.add_argument("dataset", type=parse_place, metavar="DATASET", help=DATASET_HELP)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    train.add_argument(
        "--config", type=Path, metavar="YAML", help="a file, or the name of a preset (published, cpu, smoke)"
    )
    train.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="e.g. stages.1.epochs=5"
    )
    train.add_argument(
        "--launcher", choices=["ray", "local"], default="ray", help="Ray Train, or this process (default: %(default)s)"
    )
    train.add_argument(
        "--workers",
        type=_workers,
        metavar="N|MIN:MAX",
        help="worker processes (default: from the cluster); with MIN:MAX as many as there is room for, again whenever "
        "some are lost: the global batch, and so the learning rate, stay the same",
    )
    train.add_argument(
        "--devices-per-worker", type=_positive, metavar="M", help="GPUs of a worker, or logical CPUs of the only one"
    )
    train.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster (default: $RAY_ADDRESS, or one of its own)"
    )


def _add_search(command: Command) -> None:
    tune = command("tune", tune_commands.tune, "search settings; started again with the same --out it resumes")
    tune.add_argument("dataset", type=parse_place, metavar="DATASET", help=DATASET_HELP)
    tune.add_argument("--out", type=Path, required=True, metavar="EXPERIMENT", help="the search's folder")
    tune.add_argument(
        "--config",
        type=Path,
        default=Path("search_cpu"),
        metavar="YAML",
        help="a search space: a file, or the name of a preset (search, search_cpu; default: %(default)s)",
    )
    tune.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the search or of all trials, e.g. search.trials=8, stages.1.epochs=5",
    )
    tune.add_argument(
        "--launcher",
        choices=["ray", "local"],
        default="ray",
        help="Ray Tune, or processes of this machine (default: %(default)s)",
    )
    tune.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster (default: $RAY_ADDRESS, or one of its own)"
    )
    tune.add_argument(
        "--no-evaluation",
        dest="evaluation",
        action="store_false",
        help="leave that of the best trial to another job",
    )


def _add_evaluation(command: Command) -> None:
    evaluate = command(
        "evaluate",
        evaluate_commands.evaluate,
        "metrics with intervals, predictions, figures and report of a run, or of a search's best trial",
    )
    evaluate.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument(
        "--split", choices=["train", "validation", "test"], default="test", help="(default: %(default)s)"
    )
    which.add_argument("--images", type=Path, metavar="FOLDER", help="labelled images that are not in the dataset")
    evaluate.add_argument(
        "--dataset", type=parse_place, metavar="DATASET", help="(default: the one the run was trained on)"
    )
    evaluate.add_argument("--devices", type=_positive, metavar="M", help="GPUs, or logical CPUs")
    evaluate.add_argument(
        "--risk",
        type=float,
        metavar="SHARE",
        help="of wrong answers to allow, for this report alone: the model abstains below a probability that is chosen "
        "on the validation images, which chose the model too, so that it is no guarantee (default: that of the run's "
        "calibration, else 0.05)",
    )
    evaluate.add_argument(
        "--examine",
        type=_count,
        default=128,
        metavar="N",
        help="images to look at closely, each some thirty times: attention, lungs, robustness; 0 for none "
        "(default: %(default)s)",
    )

    calibrate = command(
        "calibrate",
        evaluate_commands.calibrate,
        "fit on the validation images how sure a run is, and when it abstains; predict, serve and export obey",
    )
    calibrate.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT")
    calibrate.add_argument(
        "--risk",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of wrong answers to allow; the validation images chose the model too, so that it is no guarantee "
        "(default: %(default)s)",
    )
    calibrate.add_argument(
        "--dataset",
        type=parse_place,
        metavar="DATASET",
        help="the one the run was trained on, where it was moved (default: where it was then)",
    )
    calibrate.add_argument("--devices", type=_positive, metavar="M", help="GPUs, or logical CPUs")

    compare = command("compare", evaluate_commands.compare, "two runs on the same test images, with intervals")
    for name in ("first", "second"):
        compare.add_argument(
            name, type=Path, metavar="RUN", help="a run, a search, or an evaluation of one, which saves predicting"
        )
    compare.add_argument("--devices", type=_positive, metavar="M", help="GPUs, or logical CPUs")
    compare.add_argument("--json", action="store_true", help="for scripts")

    doctor = command("doctor", doctor_command.doctor, "what this machine or a cluster can run, and what is missing")
    doctor.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster to look at, in place of this machine")
    doctor.add_argument("--json", action="store_true", help="for scripts")

    config = command("config", train_commands.show_config, "print the resolved configuration as YAML")
    config.add_argument("--config", type=Path, metavar="YAML")
    config.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")


def _add_use(command: Command) -> None:
    predict = command("predict", inference_commands.predict, "what a model sees in images that nobody has labelled")
    predict.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT")
    predict.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG or DICOM files, or folders that hold such"
    )
    predict.add_argument("--json", action="store_true", help="for scripts: a JSON object on each line")
    predict.add_argument(
        "--overlay", type=Path, metavar="FOLDER", help="write each image there with the network's attention over it"
    )
    predict.add_argument("--workers", type=_positive, metavar="N", help="threads that decode (default: one per core)")

    export = command(
        "export", inference_commands.export, "a model as a file for other programs: pixels in, probabilities out"
    )
    export.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT")
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder, or an earlier export")
    export.add_argument("--format", choices=["savedmodel", "onnx"], default="savedmodel", help="(default: %(default)s)")

    serve = command(
        "serve", inference_commands.serve, "a model behind HTTP: an image in, a class and probabilities out"
    )
    serve.add_argument("run", type=Path, metavar="RUN_OR_EXPERIMENT")
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s, this machine alone)")
    serve.add_argument("--port", type=_positive, default=8000, metavar="N", help="(default: %(default)s)")
    serve.add_argument(
        "--max-batch", type=_positive, default=16, metavar="B", help="images in a step (default: %(default)s)"
    )
    serve.add_argument(
        "--batch-wait-ms",
        type=_positive,
        default=10,
        metavar="MS",
        help="how long the first image of a batch waits for others while the model is idle (default: %(default)s)",
    )
    serve.add_argument(
        "--max-body-mb", type=_positive, default=64, metavar="MB", help="of an image; 413 beyond (default: %(default)s)"
    )
    serve.add_argument(
        "--max-waiting",
        type=_positive,
        default=64,
        metavar="N",
        help="requests at a time; 503 beyond (default: %(default)s)",
    )
    serve.add_argument(
        "--timeout", type=_positive, default=60, metavar="S", help="for an answer; 504 beyond (default: %(default)s)"
    )


def _add_bench(command: Command) -> None:
    bench = command("bench", bench_commands.bench, "measure this machine, each figure beside its baseline")
    bench.add_argument(
        "what",
        choices=["build", "input", "step", "features", "accuracy", "growth", "tune", "scaling", "serve"],
        help="build: images/s of build, of bare decoding and of TensorFlow Datasets; "
        "input: images/s that reach the step, beside Keras's image_dataset_from_directory; "
        "step: images/s of train against a bare compiled step; "
        "features: both stages beside plain Keras; "
        "accuracy: how soon plain Keras's best validation accuracy is there, an hour and more; "
        "growth: time and memory by the number of images; "
        "tune: a search of the head beside one trial that shares nothing; "
        "scaling: images/s of several workers, and what a cluster would do; "
        "serve: images/s of the service beside the bare model",
    )
    bench.add_argument(
        "dataset",
        type=Path,
        nargs="?",
        metavar="INPUT",
        help="images (build, input, features, accuracy), a dataset (step, scaling) or a run (serve); default: phantoms",
    )
    bench.add_argument(
        "--images",
        type=_positive,
        default=21_165,
        metavar="N",
        help="phantoms to build or read, or in an epoch of scaling (default: %(default)s)",
    )
    bench.add_argument("--config", type=Path, default=Path("cpu"), metavar="YAML", help="(default: %(default)s)")
    bench.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    bench.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="medians are over (default: %(default)s)"
    )
    bench.add_argument(
        "--steps", type=_positive, default=6, metavar="N", help="a round, on phantoms (default: %(default)s)"
    )
    bench.add_argument(
        "--workers", type=_positive, nargs="+", default=[1, 2], metavar="N", help="of scaling (default: 1 2)"
    )
    bench.add_argument(
        "--batch-sizes", type=_positive, nargs="+", default=[32, 64], metavar="B", help="of scaling (default: 32 64)"
    )
    bench.add_argument("--max-batch", type=_positive, default=16, metavar="B", help="of serve (default: %(default)s)")
    bench.add_argument("--seeds", type=_count, nargs="+", default=[0], metavar="S", help="of accuracy (default: 0)")
    bench.add_argument(
        "--sizes",
        type=_positive,
        nargs="+",
        default=[1_000, 5_000, 20_000],
        metavar="N",
        help="images of growth (default: 1000 5000 20000)",
    )
    bench.add_argument("--trials", type=_positive, default=16, metavar="N", help="of tune (default: %(default)s)")
    bench.add_argument(
        "--launcher", choices=["local", "ray"], default="local", help="of tune's search (default: %(default)s)"
    )
    bench.add_argument(
        "--cluster", type=Path, metavar="YAML", help="of scaling: the machines to foretell for (cluster/example.yaml)"
    )
    bench.add_argument("--json", action="store_true", help="for scripts: every round, and the medians")


def _add_jobs(command: Command, commands: Mapping[str, argparse.ArgumentParser]) -> None:
    job_options.add_submit(command, commands)
    job_options.add_jobs(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: with the status of this module's docstring, unless it is 0.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with terminal.manners(given):
        try:
            try:
                _run(given)
            except SystemExit:
                terminal.flush()  # of --help
                raise
            terminal.flush()
        except UserError as error:
            _fail(error)
        except OSError as error:
            explained = disk_error(error)
            if explained is None:
                raise
            _fail(explained)
        except StoppedError as error:
            print(error, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None


def _run(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    check_backend()
    if not options.verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    options.action(options)


def _fail(error: UserError) -> NoReturn:
    for note in getattr(error, "__notes__", ()):
        print(f"note: {note}", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
