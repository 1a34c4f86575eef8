"""`cxr-dist`: the command line. TensorFlow, Ray and matplotlib are imported by the commands that need them.

Exit status: 0 done; 2 something the user can fix, said in one line that begins with `error: `; 130 interrupted by
Ctrl-C; 141 nobody reads the output; 143 stopped on request; 1 anything else.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from cxr_dist.cli import bench, dashboards, dataset, doctor, evaluate, inference, jobs, leaks, terminal, train, tune
from cxr_dist.cli.options import Parser, commands_of
from cxr_dist.distributed.devices import prepare_environment
from cxr_dist.runs.stop_request import StoppedError
from cxr_dist.runs.versions import DISTRIBUTION, version_of
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import disk_error


def build_parser() -> Parser:
    """The whole command line: each module declares its commands beside the functions that they run."""
    parser = Parser(prog="cxr-dist", description="Train and evaluate chest X-ray classifiers on a laptop or a cluster.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print the version and exit"
    )
    parser.add_argument("--verbose", action="store_true", help="show messages of TensorFlow and Ray")
    parser.set_defaults(check_command=parser.parse_args)  # for commands that run commands
    command = commands_of(parser, "COMMAND")
    for module in (train, dataset, leaks, tune, evaluate, doctor, inference, bench, jobs, dashboards):
        module.add_parsers(command)
    return parser


class _Version(argparse.Action):
    """As argparse's own, but looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.prog} {version_of(DISTRIBUTION)}")
        parser.exit()


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
    options.given = list(arguments)
    prepare_environment(options.verbose)
    options.action(options)


def _fail(error: UserError) -> NoReturn:
    for note in getattr(error, "__notes__", ()):
        print(f"note: {note}", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
