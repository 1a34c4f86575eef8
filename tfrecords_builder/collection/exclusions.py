"""Images that the user leaves out of a build, by a table of their paths."""

import csv
import io
from collections import Counter
from collections.abc import Container
from dataclasses import replace
from pathlib import Path, PurePosixPath

from tfrecords_builder.collection.collect import Collection
from tfrecords_builder.collection.file_kinds import NotTaken, Reason, printable
from tfrecords_builder.collection.find import class_counts
from tfrecords_builder.common.errors import UserError


def without_excluded(listing: Collection, path: Path) -> Collection:
    """`listing` without the images that the CSV file `path` names, and without their masks; both are counted.

    Raises:
        UserError: As `read_excluded`, or a class would have no image left.
    """
    excluded = read_excluded(path, {image.path for image in listing.images})
    kept = tuple(image for image in listing.images if image.path not in excluded)
    if emptied := class_counts(listing.images).keys() - class_counts(kept).keys():
        raise UserError(
            f"{path}: names every image of class '{min(emptied)}'; remove lines, or remove the class from the source"
        )
    files = [file for image in listing.images if image.path in excluded for file in (image.path, image.mask) if file]
    kinds = Counter((file.partition("/")[0], PurePosixPath(file).suffix.lower()) for file in files)
    examples = {(file.partition("/")[0], PurePosixPath(file).suffix.lower()): file for file in reversed(files)}
    counted = [
        NotTaken(printable(folder), Reason.EXCLUDED, suffix, number, printable(examples[folder, suffix]))
        for (folder, suffix), number in sorted(kinds.items())
    ]
    return replace(listing, images=kept, not_taken=(*listing.not_taken, *counted))


def read_excluded(path: Path, known: Container[str]) -> set[str]:
    """The column path of a CSV file in UTF-8, such as the `suspects.csv` of an analysis; other columns are ignored.

    Raises:
        UserError: The file cannot be read, has no column path, or names a path that is not in `known`.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a CSV file as --exclude") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file in UTF-8 ({error}); fix it") from error
    excluded = set()
    for number, line in enumerate(lines, start=2):
        image = line.get("path")
        if image is None:
            raise UserError(f"{path}: needs the column path in its first line, and a path in line {number}")
        if image not in known:
            raise UserError(
                f"{path}: line {number}: '{printable(image)}' is not an image of the source; remove the line"
            )
        excluded.add(image)
    return excluded
