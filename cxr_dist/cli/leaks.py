"""The command `leaks`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_dist.cli.options import JSON_HELP, Command
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.files import write_bytes
from tfrecords_builder.common.places import parse_place

if TYPE_CHECKING:
    from cxr_dist.evaluation.leaks import ComparedCollection, Leaks

SHOWN = 10
"""Matches that are printed."""


def add_parsers(command: Command) -> None:
    parser = command("leaks", leaks, "find copies, near-duplicates and shared patients between two collections")
    where = "dataset, run (its training and validation images), or folder of images"
    parser.add_argument("first", type=parse_place, metavar="A", help=f"{where}, such as what a model was trained on")
    parser.add_argument("second", type=parse_place, metavar="B", help=f"{where}, such as what it is tested on")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help="new file for a row per match, with the columns path (in B), kind, match (in A) and score; "
        "`build --exclude` reads it",
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def leaks(options: argparse.Namespace) -> None:
    """Compare, write nothing but the table that is asked for, and print."""
    from cxr_dist.evaluation.leaks import find_leaks
    from cxr_dist.runs.loggers import progress_bar

    if options.out is not None and options.out.is_dir():
        raise UserError(f"{options.out}: is a folder; give a file as --out")
    found = find_leaks(options.first, options.second, progress_bar)
    if options.out is not None:
        try:
            write_bytes(options.out, found.table())
        except OSError as error:
            raise UserError(
                f"{options.out}: cannot be written ({error.strerror or error}); give another --out"
            ) from error
    if options.json:
        print(json.dumps(found.numbers(), allow_nan=False))
        return
    _print(found)
    if options.out is not None:
        print(f"table: {options.out}")


def _print(found: "Leaks") -> None:
    from tfrecords_builder.splitting.overlap import Kind

    for letter, collection in (("A", found.first), ("B", found.second)):
        print(f"{letter}: {_description(collection)}")
        for path, reason in collection.damaged:
            print(f"warning: {collection.name}: {path}: {reason}; it was not compared")
    print(f"images of B that are identical to one of A: {found.count(Kind.IDENTICAL):,}")
    print(f"images of B that are a near-duplicate of one of A: {found.count(Kind.NEAR_DUPLICATE):,}")
    print(f"images of B of a patient of A: {found.count(Kind.PATIENT):,}, of {found.patients:,} patients")
    if not found.patients_comparable:
        print("warning: the patients of A and B are coded by different keys, so they cannot be compared")
    for row in found.rows()[:SHOWN]:
        score = "" if row["score"] is None else f" {row['score']:.3f}"
        print(f"  {row['path']}: {row['kind']}{score}: {row['match']}")
    if len(found.matches) > SHOWN:
        print(f"  and {len(found.matches) - SHOWN:,} more")
    share = found.leaked / max(len(found.second.paths), 1)
    print(f"{found.leaked:,} of {len(found.second.paths):,} images of B leak ({share:.1%})")


def _description(collection: "ComparedCollection") -> str:
    patients = f", {collection.patients:,} patients" if collection.patients else ", no patient is known"
    damaged = f", {len(collection.damaged):,} damaged" if collection.damaged else ""
    return f"{collection.name} ({collection.kind}): {len(collection.paths):,} images{patients}{damaged}"
