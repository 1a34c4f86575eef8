"""The commands that make and look at datasets: `synth`, `download`, `build`, `verify` and `eda`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_dist import api
from cxr_dist.cli.options import ADDRESS_HELP, Command, add_dataset, positive
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import parse_place

if TYPE_CHECKING:
    from tfrecords_builder.collection.file_kinds import Note, NotTaken
    from tfrecords_builder.format.manifest import Manifest
    from tfrecords_builder.format.manifest_rows import Row


def add_parsers(command: Command) -> None:
    synth_parser = command("synth", synth, "draw phantom X-rays of the four classes, with lung masks")
    synth_parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the images")
    synth_parser.add_argument(
        "--per-class", type=int, default=250, metavar="N", help="number of images per class (default: %(default)s)"
    )
    synth_parser.add_argument(
        "--size",
        type=int,
        default=299,
        metavar="PX",
        help="width and height of an image in pixels (default: %(default)s)",
    )
    synth_parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed of the phantoms (default: %(default)s)"
    )
    synth_parser.add_argument(
        "--workers", type=positive, metavar="N", help="number of processes (default: one per core)"
    )

    download_parser = command("download", download, "download the COVID-19 Radiography Database from Kaggle (0.8 GB)")
    download_parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the images")

    _add_build(command("build", build, "build a verified dataset of TFRecord shards from labelled images"))
    add_dataset(command("verify", verify, "check every record, checksum and count of a dataset"))
    eda_parser = command(
        "eda", eda, "analyse a dataset: counts, image statistics, near-duplicates and possible shortcuts"
    )
    add_dataset(eda_parser)
    eda_parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or that of an earlier analysis"
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of labelled images (PNG, JPEG, TIFF, BMP, WebP or DICOM), one folder per class",
    )
    parser.add_argument(
        "dataset",
        type=parse_place,
        nargs="?",
        metavar="DATASET",
        help="new folder of the dataset, or its address (s3://... or gs://...)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PX",
        help="width and height of a stored image in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--encoding",
        choices=["raw", "png", "jpeg"],
        default="raw",
        help="format of a stored image (default: %(default)s)",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="number of processes (default: one per core)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed of the split (default: %(default)s)"
    )
    _add_split_options(parser)
    parser.add_argument("--labels", type=Path, metavar="TABLE", help="table with the columns path and label")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be taken")
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="CSV",
        help="table of images to leave out, with the column path, such as suspects.csv of `eda`",
    )
    parser.add_argument(
        "--masks",
        choices=["read", "ignore"],
        default="read",
        help="treatment of lung masks in <Class>/masks: read stores them (default: %(default)s)",
    )
    parser.add_argument(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="where images are decoded: on this machine or a Ray cluster (default: %(default)s)",
    )
    parser.add_argument("--address", metavar="ADDRESS", help=ADDRESS_HELP)
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="reaction to corrupt files, or to a class that would lose over 1 %% of its images (default: %(default)s)",
    )


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--split",
        choices=["leak-free", "published"],
        help="rule of the 70/15/15 split; leak-free keeps near-duplicates and patients together "
        "(default: that of SOURCE, else leak-free)",
    )
    rule.add_argument(
        "--split-file",
        type=Path,
        metavar="CSV",
        help="table with the columns path and split",
    )
    parser.add_argument(
        "--conflicts",
        choices=["exclude", "keep"],
        help="treatment of near-duplicates in several classes (default: exclude; with --split published, keep)",
    )


def synth(options: argparse.Namespace) -> None:
    from cxr_dist.phantoms import write_phantoms
    from cxr_dist.runs.loggers import progress_bar

    with progress_bar("phantoms") as progress:
        counts = write_phantoms(
            options.folder,
            per_class=options.per_class,
            size=options.size,
            seed=options.seed,
            workers=options.workers,
            progress=progress,
        )
    print(f"{options.folder}: {sum(counts.values())} phantoms of {options.size} pixels in {len(counts)} classes")


def download(options: argparse.Namespace) -> None:
    from tfrecords_builder.collection.download import IMAGES, download_database

    fetched = download_database(options.folder)
    print(f"{options.folder}: {sum(IMAGES.values()):,} images" + ("" if fetched else " (downloaded earlier)"))


def build(options: argparse.Namespace) -> None:
    if options.dry_run:
        _print_preview(options)
        return
    if options.dataset is None:
        raise UserError("DATASET: is missing; give the folder of the new dataset, or --dry-run (cxr-dist build --help)")
    built = api.build(
        options.source,
        options.dataset,
        image_size=options.image_size,
        encoding=options.encoding,
        workers=options.workers,
        seed=options.seed,
        split=options.split,
        split_file=options.split_file,
        labels=options.labels,
        exclude=options.exclude,
        conflicts=options.conflicts,
        masks=options.masks,
        on_error=options.on_error,
        launcher=options.launcher,
        address=options.address,
        verbose=options.verbose,
    )
    summary = built.summary
    manifest = summary.manifest
    for change in summary.changes:
        print(f"rebuilt: {change}")
    for path, reason in [*manifest.rejected, *manifest.excluded]:
        print(f"left out: {path}: {reason}")
    masks = len({row.mask for row in manifest.rows if row.mask})
    _print_files(len(manifest.rows), masks, manifest.not_taken, (*manifest.notes, *manifest.image_notes))
    _print_counts(manifest.counts)
    print("\n".join([*_group_lines(manifest), *_count_lines(manifest.counts)]))
    left_out = len(manifest.rejected) + len(manifest.excluded)
    if summary.reused:
        print(f"{options.dataset}: is already complete")
        return
    print(
        f"{options.dataset}: {len(manifest.shards)} shards in {summary.seconds:.1f} s "
        f"({summary.images_per_second:,.0f} images/s)" + (f"; {left_out} file(s) left out" if left_out else "")
    )


def _print_preview(options: argparse.Namespace) -> None:
    from tfrecords_builder.build import BuildOptions
    from tfrecords_builder.preview import preview_build

    names = (
        *("image_size", "encoding", "workers", "seed", "split", "split_file", "labels", "conflicts", "masks"),
        "on_error",
    )
    found = preview_build(options.source, BuildOptions(**{name: getattr(options, name) for name in names}))
    _print_files(found.images, found.masks, found.not_taken, found.notes)
    _print_counts(found.counts)
    for line in _count_lines(found.counts):
        print(line)
    print(
        f"split: {found.split_rule.partition(':')[0]}; near-duplicates and damaged images are found by the build alone"
    )
    print("dry run: nothing was written")


def _print_files(images: int, masks: int, not_taken: "Sequence[NotTaken]", notes: "Sequence[Note]") -> None:
    """What became of every file of the source folder, where it holds more than images."""
    from tfrecords_builder.collection.file_kinds import not_taken_lines

    for line in not_taken_lines(not_taken):
        print(line)
    others = sum(item.files for item in not_taken)
    if masks or others:
        print(f"files: {images + masks + others:,} (images: {images:,}, masks: {masks:,}, not taken: {others:,})")
    for note in notes:
        print(f"{'warning' if note.warning else 'note'}: {note.text}")


def _print_counts(counts: Mapping[str, Mapping[str, int]]) -> None:
    """A table of images by class and split."""
    names = list(next(iter(counts.values())))
    width = max(len(name) for name in [*names, "class"])
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in counts))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{of[name]:12,}" for of in counts.values()))
    print(f"{'all':{width}}" + "".join(f"{sum(of.values()):12,}" for of in counts.values()))


def _count_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    from tfrecords_builder.splitting.splits import count_warnings

    return [f"warning: {text}" for text in count_warnings(counts)]


def _group_lines(manifest: "Manifest") -> list[str]:
    """Near-duplicates and patients with several images, and whether each group is in one split."""
    copies, patients = manifest.near_duplicates, manifest.patients
    lines = ["no image is a near-duplicate of another"]
    if copies:
        lines = [
            f"{sum(map(len, copies.values())):,} images are near-duplicates of others, in {len(copies):,} groups "
            f"(the largest has {max(map(len, copies.values()))}); {_split_words(copies, 'group')}"
        ]
    if patients:
        several = "1 patient has" if len(patients) == 1 else f"{len(patients):,} patients have"
        lines.append(f"{several} several images; {_split_words(patients, 'patient')}")
    return lines


def _split_words(groups: "Mapping[str, Sequence[Row]]", noun: str) -> str:
    straddling = sum(len({row.split for row in rows} - {None}) > 1 for rows in groups.values())
    if not straddling:
        return f"each {noun} is in one split"
    return f"warning: {straddling:,} {noun}{' is' if straddling == 1 else 's are'} in more than one split"


def verify(options: argparse.Namespace) -> None:
    from cxr_dist.launch.train import local_dataset
    from cxr_dist.runs.loggers import progress_bar
    from tfrecords_builder.verify import verify_dataset

    with local_dataset(options.dataset) as dataset, progress_bar("verify") as progress:
        summary = verify_dataset(dataset, progress)
    print(
        f"{options.dataset}: {summary.records:,} records in {summary.shards} shards, {summary.bytes:,} bytes, "
        "no damage found"
    )


def eda(options: argparse.Namespace) -> None:
    from cxr_dist.launch.train import local_dataset
    from cxr_dist.runs.loggers import progress_bar
    from tfrecords_builder.eda.page import PAGE, SUSPECTS, write_analysis

    with local_dataset(options.dataset) as dataset, progress_bar("eda") as progress:
        numbers = write_analysis(dataset, options.out, progress)
    counts, duplicates = numbers["counts"], numbers["duplicates"]
    width = max(len(name) for name in [*counts["classes"], "class"])
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in counts["splits"]) + f"{'all':>12}")
    for name, total in counts["classes"].items():
        of_split = "".join(f"{of[name]['images']:12,}" for of in counts["splits"].values())
        print(f"{name:{width}}{of_split}{total:12,}")
    print(
        f"the largest class, {counts['largest']}, is {counts['imbalance']:.2f} times the smallest, {counts['smallest']}"
    )
    print(
        f"{duplicates['pairs']:,} pairs of near-duplicates: {duplicates['images']:,} images in "
        f"{duplicates['groups']:,} groups, {duplicates['straddling_splits']:,} of them in more than one split"
    )
    left_out = numbers["left_out"]
    rejected, excluded = (left_out[status]["images"] for status in ("rejected", "excluded"))
    print(f"{rejected:,} files were rejected and {excluded:,} excluded")
    folder = numbers["source_folder"]
    others = folder["files"] - folder["images"] - folder["masks"]
    print(f"{others:,} of {folder['files']:,} files of the source folder are neither image nor mask")
    for text in numbers["warnings"]:
        print(f"warning: {text}")
    print(
        f"odd images, the oddest of each class first: {numbers['odd_images']['listed']:,} in {options.out / SUSPECTS}"
    )
    print(f"report: {options.out / PAGE}")
