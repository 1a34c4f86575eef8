"""The folder of an exploratory analysis: numbers as JSON, figures, and one self-contained HTML page for people.

`eda.html` is written first, `eda.json` last: a folder with `eda.json` is complete and of one piece, and one that was
interrupted is known by its page.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfrecords_builder.common import figure_style
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.figure_style import display_name
from tfrecords_builder.common.files import intended_name, sync, write_bytes
from tfrecords_builder.common.page import template_environment
from tfrecords_builder.eda import analysis as eda, figures as eda_figures
from tfrecords_builder.eda.analysis import Analysis
from tfrecords_builder.writing.output_folder import explained

NUMBERS, PAGE = "eda.json", "eda.html"
LEFT_OUT_SHOWN = 50
SOURCES_SHOWN = 20
SOURCES_DRAWN = 6
GENERATOR = "cxr-dist eda"
"""What a page names as its generator, by which it is known as ours."""

_FIGURE = re.compile(r"(counts|sizes|distributions|means|group_sizes|groups|shortcuts|sources|samples-\d+)\.svg")


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure as it is shown."""

    file: str
    title: str
    caption: str
    """A sentence that says what it shows, computed from the numbers."""
    svg: bytes

    @property
    def alt(self) -> str:
        return f"{self.title}. {self.caption}"

    @property
    def data(self) -> str:
        return base64.b64encode(self.svg).decode()


def write_analysis(dataset: Path, out: Path, progress: eda.Progress | None = None) -> dict[str, Any]:
    """Analyse a dataset and write eda.html, the figures and eda.json.

    Everything is computed before the first file is touched. An earlier analysis in `out` is replaced.

    Args:
        dataset: A folder that `build.build_dataset` made.
        out: Created if need be; see `check_output_folder`.
        progress: Called with (images read, images in all).

    Returns:
        The numbers, as they are in eda.json.

    Raises:
        UserError: `dataset` is none or damaged, or `out` holds something else or cannot be written.
    """
    check_output_folder(out)
    analysis = eda.analyse(dataset, progress)
    figures = draw(analysis)
    numbers = analysis.numbers | {
        "figures": {item.file: {"title": item.title, "caption": item.caption} for item in figures}
    }
    page = render(analysis.numbers, figures)
    content = json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / NUMBERS).unlink(missing_ok=True)
        sync(out)
        write_bytes(out / PAGE, page.encode())
        for path in list(out.iterdir()):
            if path.name != PAGE:
                path.unlink()  # only ours are left: figures of an earlier analysis, and what a stopped one was writing
        for item in figures:
            write_bytes(out / item.file, item.svg)
        write_bytes(out / NUMBERS, content.encode())
    return numbers


def check_output_folder(out: Path) -> None:
    """Refuse, before any work, a place where an analysis must not be written.

    Good are: a path that does not exist, an empty folder, an analysis (whole, or one that was interrupted).

    Raises:
        UserError: `out` is a file, lies in one, or is a folder that holds something else.
    """
    if not out.exists():
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{out}: {above} is a file; give a folder for the analysis")
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for the analysis")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not (_is_ours(name) and (out / name).is_file())]
    # A figure's name proves nothing: without numbers or a page of ours, somebody else drew it.
    written = [name for name in names if intended_name(name) is None]
    if written and not foreign and not (_is_numbers(out / NUMBERS) or _is_page(out / PAGE)):
        foreign = written
    if foreign:
        raise UserError(
            f"{out}: holds something other than an analysis ('{foreign[0]}'); give an empty or new folder with --out"
        )


def draw(analysis: Analysis) -> list[Shown]:
    """All figures of an analysis with their captions, in the order of the page."""
    numbers = analysis.numbers
    names = numbers["dataset"]["class_names"]
    duplicates = numbers["duplicates"]
    figures = [
        ("counts.svg", "Images by class", counts_caption(numbers["counts"]),
         eda_figures.counts_figure(numbers["counts"])),
        ("sizes.svg", "Size of the source images", sizes_caption(numbers["source_sizes"]),
         eda_figures.sizes_figure(numbers["source_sizes"]["classes"])),
        ("distributions.svg", "Brightness and contrast", distributions_caption(numbers["pixels"]),
         eda_figures.distributions_figure(numbers["pixels"])),
        ("means.svg", "Mean and deviation images", means_caption(numbers["pixels"]),
         eda_figures.means_figure(names, analysis.means, analysis.deviations)),
        ("shortcuts.svg", "What trivial features tell of the class", shortcuts_caption(numbers["shortcuts"]),
         eda_figures.shortcuts_figure(numbers["shortcuts"], eda.FEATURES)),
    ]  # fmt: skip
    if numbers["sources"]:
        drawn = dict(list(numbers["sources"].items())[:SOURCES_DRAWN])
        levels = {"histogram_step": numbers["pixels"]["histogram_step"], "classes": drawn}
        figures.append(
            ("sources.svg", "Brightness and contrast by source", sources_caption(numbers["sources"]),
             eda_figures.distributions_figure(levels, "source"))
        )  # fmt: skip
    if duplicates["groups"]:
        pictures = [
            [analysis.pictures.get(image["path"]) for image in group[: eda.IMAGES_SHOWN_PER_GROUP]]
            for group in duplicates["largest"]
        ]
        figures += [
            ("group_sizes.svg", "Sizes of the groups of duplicates", group_sizes_caption(duplicates),
             eda_figures.group_sizes_figure(duplicates["sizes"])),
            ("groups.svg", "The largest groups of duplicates", groups_caption(duplicates, pictures),
             eda_figures.groups_figure(pictures)),
        ]  # fmt: skip
    for label, name in enumerate(names):
        paths = numbers["samples"][name]
        figures.append(
            (f"samples-{label}.svg", f"Samples of {display_name(name)}",
             samples_caption(name, paths, numbers["counts"]["splits"]["train"][name]["images"]),
             eda_figures.samples_figure([analysis.pictures[path] for path in paths]))
        )  # fmt: skip
    return [Shown(file, title, caption, figure_style.svg_bytes(figure)) for file, title, caption, figure in figures]


def render(numbers: Mapping[str, Any], figures: list[Shown]) -> str:
    """The analysis as one HTML page that loads nothing: style and figures are inside."""
    environment = template_environment("tfrecords_builder")
    environment.filters |= {"display": display_name, "percent": _percent, "number": "{:,}".format}
    environment.filters |= {"points": _points, "level": "{:.1f}".format}
    return environment.get_template("eda.html.j2").render(
        **numbers,
        figure_of={item.file: item for item in figures},
        sample_figures=[item for item in figures if item.file.startswith("samples-")],
        features=eda.FEATURES,
        left_out_shown=LEFT_OUT_SHOWN,
        sources_shown=SOURCES_SHOWN,
        generator=GENERATOR,
    )


def counts_caption(counts: Mapping[str, Any]) -> str:
    """Largest and smallest class, and the greatest distance from 70/15/15."""
    classes = counts["classes"]
    largest, smallest = counts["largest"], counts["smallest"]
    if classes[largest] == classes[smallest]:
        text = f"Every class has {classes[largest]:,} images"
    else:
        text = (
            f"{display_name(largest)} has the most images ({classes[largest]:,}), {counts['imbalance']:.2f} times as "
            f"many as {display_name(smallest)}, which has the fewest ({classes[smallest]:,})"
        )
    far = max(
        ((abs(item["deviation"]), name, split) for split, of in counts["splits"].items() for name, item in of.items()),
        key=lambda item: item[0],
    )
    return (
        f"{text}; no share of a class in a split is further than {100 * far[0]:.1f} percentage points from 70/15/15 "
        f"({display_name(far[1])}, {far[2]})."
    )


def sizes_caption(sizes: Mapping[str, Any]) -> str:
    """One size, or how far the medians of the classes are apart."""
    if not sizes["commonest"]:
        return "No size of a source image is known."
    first = sizes["commonest"][0]
    if sizes["distinct"] == 1:
        return f"Every source image has {first['width']:,} x {first['height']:,} pixels, so size tells no class."
    medians = {name: item["width"]["median"] for name, item in sizes["classes"].items() if item["width"]}
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    share = sum(first["images"].values())
    text = (
        f"{sizes['distinct']:,} different sizes, the commonest {first['width']:,} x {first['height']:,} pixels "
        f"({_count(share)})"
    )
    if medians[low] == medians[high]:
        return f"{text}; the median width is {medians[low]:,} pixels in every class."
    return (
        f"{text}; the median width goes from {medians[low]:,} pixels ({display_name(low)}) to {medians[high]:,} "
        f"({display_name(high)})."
    )


def sources_caption(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """How many are drawn, and how far apart they are."""
    drawn = dict(list(sources.items())[:SOURCES_DRAWN])
    images = sum(item["images"] for item in drawn.values())
    everything = sum(item["images"] for item in sources.values())
    what = f"All {_count(len(drawn), 'source')}" if len(drawn) == len(sources) else f"The {len(drawn)} largest sources"
    text = f"{what}, {images:,} of {_count(everything)} whose source is known"
    if len(drawn) < 2:
        return f"{text}."
    means = {name: item["brightness"]["mean"] for name, item in drawn.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return f"{text}; the darkest on average is {low} ({means[low]:.1f}), the brightest {high} ({means[high]:.1f})."


def distributions_caption(pixels: Mapping[str, Any]) -> str:
    """Which class is darkest and brightest, and which has least and most contrast, on average."""
    parts = []
    for key, low_words, high_words in (
        ("brightness", "are the darkest", "the brightest"),
        ("contrast", "have the least contrast", "the most"),
    ):
        means = {name: item[key]["mean"] for name, item in pixels["classes"].items()}
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        within = sum(item[key]["deviation"] for item in pixels["classes"].values()) / len(means)
        parts.append(
            f"images of {display_name(low)} {low_words} on average ({means[low]:.1f}), those of {display_name(high)} "
            f"{high_words} ({means[high]:.1f}), {means[high] - means[low]:.1f} levels apart where images of one class "
            f"vary by {within:.1f}"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def means_caption(pixels: Mapping[str, Any]) -> str:
    """Which mean images differ most and least, and where single images vary most."""
    differences = pixels["mean_image_differences"]
    most = max(differences, key=lambda item: item["difference"])
    least = min(differences, key=lambda item: item["difference"])

    def words(item: Mapping[str, Any]) -> str:
        return f"{' and '.join(map(display_name, item['classes']))} ({item['difference']:.1f} gray levels a pixel)"

    text = f"The mean images of {words(most)} differ most"
    if len(differences) > 1:
        text += f" and those of {words(least)} least"
    deviations = {name: item["pixel_deviation"] for name, item in pixels["classes"].items()}
    varied = max(deviations, key=deviations.__getitem__)
    return f"{text}; from image to image, pixels vary most in {display_name(varied)} (by {deviations[varied]:.1f})."


def samples_caption(class_name: str, paths: list[str], images: int) -> str:
    """How many of how many, and how they were chosen."""
    if len(paths) == images:
        return f"All {images:,} training images of {display_name(class_name)}."
    return (
        f"{len(paths)} of {images:,} training images of {display_name(class_name)}, chosen by a hash of their paths: "
        "not picked by anyone, and the same each time."
    )


def group_sizes_caption(duplicates: Mapping[str, Any]) -> str:
    """Pairs, groups, and how many straddle splits or classes."""
    straddling = duplicates["straddling_splits"]
    text = (
        f"{_count(duplicates['pairs'], 'pair')} of near-duplicates join {_count(duplicates['images'])} into "
        f"{_count(duplicates['groups'], 'group')}, the largest of {max(map(int, duplicates['sizes']))}; "
    )
    if straddling:
        text += f"{_count(straddling, 'group')} {'lies' if straddling == 1 else 'lie'} in more than one split"
    else:
        text += "no group lies in more than one split"
    across = duplicates["straddling_classes"]
    return f"{text}, and {across:,} in more than one class." if across else f"{text} or class."


def groups_caption(duplicates: Mapping[str, Any], pictures: list[list[Any]]) -> str:
    """How many groups are shown, and of what there is no picture."""
    shown, everything = len(duplicates["largest"]), duplicates["groups"]
    text = f"All {_count(shown, 'group')}" if shown == everything else f"The {shown} largest of {everything:,} groups"
    text += f", {_count(sum(map(len, pictures)))} in all"
    cut = sum(map(len, duplicates["largest"])) - sum(map(len, pictures))
    if cut:
        text += f" (of large groups the first {eda.IMAGES_SHOWN_PER_GROUP}; {cut:,} more are in the table)"
    without = sum(picture is None for row in pictures for picture in row)
    if without:
        text += f"; {without:,} of them {'was' if without == 1 else 'were'} left out of the dataset, so not shown"
    return f"{text}."


def shortcuts_caption(shortcuts: Mapping[str, Mapping[str, Any]]) -> str:
    """The feature that tells most, and how many tell more than chance."""
    best = max(shortcuts, key=lambda name: shortcuts[name]["accuracy"])
    item = shortcuts[best]
    suspicious = sum(entry["suspicious"] for entry in shortcuts.values())
    text = (
        f"Always guessing the largest class is right on {_percent(item['guess'])} of "
        f"{_count(item['validation_images'], 'validation image')}; "
    )
    if item["accuracy"] > item["guess"]:
        text += f"the most that one feature reaches is {_percent(item['accuracy'])} ({eda.FEATURES[best]})"
    else:
        text += "no feature alone does better"
    return f"{text}, and {suspicious} of {len(shortcuts)} features tell more of the class than chance explains."


def _is_ours(name: str) -> bool:
    name = intended_name(name) or name
    return name in (NUMBERS, PAGE) or _FIGURE.fullmatch(name) is not None


def _is_numbers(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == eda.KIND


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(4096)
    except OSError:
        return False


def _count(number: int, noun: str = "image") -> str:
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign; nothing is -0.0."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"
