"""What the parsers of several commands share: types of options, and groups of options that are declared once."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cxr_dist import api
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import parse_place

Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""Adds a command: name, its function, and a sentence about it."""
ADDRESS_HELP = "address of a running Ray cluster (default: $RAY_ADDRESS, else a new cluster on this machine)"
RUN_HELP = "folder of a finished run, or of a search (its best trial is used)"
DEVICES_HELP = "number of GPUs, or of logical CPUs without one (default: all GPUs, or one CPU)"
SET_HELP = "value of one config key, such as stages.1.epochs=5; may be repeated"
JSON_HELP = "print JSON for scripts"


class Parser(argparse.ArgumentParser):
    """A mistyped option is a user's error like any other: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def commands_of(parser: argparse.ArgumentParser, metavar: str) -> Command:
    """Gives a parser commands of its own."""
    subparsers = parser.add_subparsers(dest=metavar.lower(), required=True, metavar=metavar)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text)
        added.set_defaults(action=run)
        added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    return command


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _worker_range(text: str) -> tuple[int, int]:
    """`N` or `MIN:MAX`."""
    least, _, most = text.partition(":")
    numbers = positive(least), positive(most or least)
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"invalid range {text!r}: expected MIN:MAX")
    return numbers


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset",
        type=parse_place,
        metavar="DATASET",
        help="folder of a dataset that build made, or its address (s3://... or gs://...)",
    )


def add_config_options(parser: argparse.ArgumentParser, config_help: str, default: Path | None = None) -> None:
    """--config and --set."""
    parser.add_argument("--config", type=Path, default=default, metavar="YAML", help=config_help)
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=SET_HELP,
    )


def add_launch_options(parser: argparse.ArgumentParser, what: str) -> None:
    """--launcher, --workers, --devices-per-worker and --address, of a command that trains.

    Args:
        what: What a number of workers belongs to, such as "the run".
    """
    parser.add_argument(
        "--launcher",
        choices=api.LAUNCHERS,
        default=api.LAUNCHER,
        help="launcher of the workers: Ray, or processes of this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_worker_range,
        metavar="N|MIN:MAX",
        help=f"number of workers of {what} (default: from the cluster); MIN:MAX adapts to lost workers",
    )
    parser.add_argument(
        "--devices-per-worker",
        type=positive,
        metavar="M",
        help="number of GPUs of each worker, or of logical CPUs of a single worker (default: from the cluster)",
    )
    parser.add_argument("--address", metavar="ADDRESS", help=ADDRESS_HELP)


def launch_keywords(options: argparse.Namespace) -> api.LaunchKeywords:
    """What `add_launch_options` has read, as `api.train` and `api.tune` take it."""
    return {
        "launcher": options.launcher,
        "workers": options.workers,
        "devices_per_worker": options.devices_per_worker,
        "address": options.address,
        "verbose": options.verbose,
    }
