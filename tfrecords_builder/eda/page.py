"""The folder of an exploratory analysis: numbers as JSON, figures, and one self-contained HTML page for people.

`eda.html` is written first, `eda.json` last: a folder with `eda.json` is complete and of one piece, and one that was
interrupted is known by its page.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfrecords_builder.common import files
from tfrecords_builder.common.figure import Figure
from tfrecords_builder.common.figure_style import display_name
from tfrecords_builder.common.files import sync, write_bytes
from tfrecords_builder.common.page import template_environment
from tfrecords_builder.eda import analysis as eda, figures, pixel_figures
from tfrecords_builder.eda.analysis import Analysis
from tfrecords_builder.eda.figures import percent
from tfrecords_builder.eda.odd_images import Suspect
from tfrecords_builder.writing.output_folder import explained

NUMBERS, PAGE, SUSPECTS = "eda.json", "eda.html", "suspects.csv"
LEFT_OUT_SHOWN = 50
SOURCES_SHOWN = 20
GENERATOR = "cxr-dist eda"
"""What a page names as its generator, by which it is known as ours."""

_FILE = re.compile(
    r"eda\.(json|html)|suspects\.csv|(counts|sizes|distributions|means|group_sizes|groups|shortcuts|sources|samples-\d+|odd-\d+)\.svg"
)


def write_analysis(dataset: Path, out: Path, progress: eda.Progress | None = None) -> dict[str, Any]:
    """Analyse a dataset; write eda.html, figures, suspects.csv and eda.json, in place of an earlier analysis in `out`.

    Everything is computed before the first file is touched. `progress` is called with (images read, images in all).

    Returns:
        The numbers, as they are in eda.json.

    Raises:
        UserError: `dataset` is none or damaged, or `out` holds something else or cannot be written.
    """
    check_output_folder(out)
    analysis = eda.analyse(dataset, progress)
    drawn = draw(analysis)
    contents = {figure.file: figure.content for figure in drawn} | {SUSPECTS: suspects_csv(analysis.suspects)}
    numbers = analysis.numbers | {
        "figures": {item.file: {"title": item.title, "caption": item.caption} for item in drawn}
    }
    page = render(analysis.numbers, drawn)
    content = json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / NUMBERS).unlink(missing_ok=True)
        sync(out)
        write_bytes(out / PAGE, page.encode())
        for path in list(out.iterdir()):
            if path.name != PAGE:
                path.unlink()  # only ours are left: figures of an earlier analysis, and what a stopped one was writing
        for name, data in contents.items():
            write_bytes(out / name, data)
        write_bytes(out / NUMBERS, content.encode())
    return numbers


def check_output_folder(out: Path) -> None:
    """Refuse, before any work, a place where an analysis must not be written.

    Good are: a path that does not exist, an empty folder, an analysis (whole, or one that was interrupted).

    Raises:
        UserError: `out` is a file, lies in one, or is a folder that holds something else.
    """
    mark = f'<meta name="generator" content="{GENERATOR}">'.encode()
    # A figure's name proves nothing: without numbers or a page of ours, somebody else drew it.
    files.check_output_folder(
        out,
        "an analysis",
        "--out",
        lambda name: bool(_FILE.fullmatch(name)) and not (out / name).is_dir(),
        lambda: (
            files.read_json_object(out / NUMBERS).get("kind") == eda.KIND or mark in files.head_of(out / PAGE, 4096)
        ),
    )


def draw(analysis: Analysis) -> list[Figure]:
    """All figures of an analysis, in the order of the page."""
    numbers = analysis.numbers
    names, pixels, duplicates = numbers["dataset"]["class_names"], numbers["pixels"], numbers["duplicates"]
    drawn = [
        figures.counts(numbers["counts"]),
        figures.sizes(numbers["source_sizes"]),
        pixel_figures.distributions(pixels),
        pixel_figures.means(names, pixels, analysis.means, analysis.deviations),
        figures.shortcuts(numbers["shortcuts"]),
    ]
    if numbers["sources"]:
        drawn.append(pixel_figures.sources(numbers["sources"], pixels))
    if duplicates["groups"]:
        pictures = [
            [analysis.pictures.get(image["path"]) for image in group[: eda.IMAGES_SHOWN_PER_GROUP]]
            for group in duplicates["largest"]
        ]
        drawn += [figures.group_sizes(duplicates), figures.groups(duplicates, pictures)]
    for label, name in enumerate(names):
        odd = numbers["odd_images"]["classes"][name]
        drawn.append(pixel_figures.odd(label, name, odd, [analysis.pictures[item["path"]] for item in odd]))
        samples = [analysis.pictures[path] for path in numbers["samples"][name]]
        drawn.append(pixel_figures.samples(label, name, samples, numbers["counts"]["splits"]["train"][name]["images"]))
    return drawn


def render(numbers: Mapping[str, Any], drawn: list[Figure]) -> str:
    """The analysis as one HTML page that loads nothing: style and figures are inside."""
    environment = template_environment("tfrecords_builder")
    environment.filters |= {"display": display_name, "percent": percent, "number": "{:,}".format}
    environment.filters |= {"points": _points, "level": "{:.1f}".format}
    return environment.get_template("eda.html.j2").render(
        **numbers,
        figure_of={item.file: item for item in drawn},
        odd_figures=[item for item in drawn if item.file.startswith("odd-")],
        sample_figures=[item for item in drawn if item.file.startswith("samples-")],
        features=eda.FEATURES,
        left_out_shown=LEFT_OUT_SHOWN,
        sources_shown=SOURCES_SHOWN,
        generator=GENERATOR,
    )


def suspects_csv(suspects: Sequence[Suspect]) -> bytes:
    """A table of suspects, of which `build --exclude` reads the column path."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "class", "rank", "score", "reason"])
    for item in suspects:
        table.writerow([item.path, item.class_name, item.rank, f"{item.score:.2f}", item.reason])
    return text.getvalue().encode()


def _points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign; nothing is -0.0."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"
