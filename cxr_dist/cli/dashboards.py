"""The command `dashboards`."""

import argparse
import os
from pathlib import Path

from cxr_dist.cli.options import Command
from tfrecords_builder.common.errors import UserError

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"


def add_parsers(command: Command) -> None:
    parser = command(
        "dashboards", dashboards, "print the addresses of the dashboards of a cluster and of an experiment"
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"cluster's dashboard (default: $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS, else {DEFAULT_DASHBOARD})",
    )
    parser.add_argument("--experiment", type=Path, metavar="DIR", help="folder of a search or a run")


def dashboards(options: argparse.Namespace) -> None:
    """Print the addresses of the dashboards."""
    from cxr_dist.launch.dashboards import dashboard_lines
    from cxr_dist.launch.submit import ADDRESS_VARIABLES, LOCAL, dashboard_address

    given = options.address
    if given is None and not any(os.environ.get(name, "").startswith("http") for name in ADDRESS_VARIABLES):
        given = DEFAULT_DASHBOARD
    address = dashboard_address(given)
    if address == LOCAL:
        raise UserError("--address local: applies to submit only; give the address of a running cluster")
    if options.experiment is not None and not options.experiment.is_dir():
        raise UserError(f"--experiment {options.experiment}: no such folder")
    print("\n".join(dashboard_lines(address, options.experiment)))
