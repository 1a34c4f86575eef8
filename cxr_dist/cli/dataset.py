"""What each command of the command line does: options in, one call into the packages, lines for people out."""

import argparse
import json
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_dist.cli.evaluate import print_metrics
from cxr_dist.config.schema import Config, load_config, resolve_preset
from cxr_dist.runs import run_folder
from cxr_dist.runs.loggers import ConsoleReporter, progress_bar
from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    from tfrecords_builder.build import Workers
    from tfrecords_builder.format.manifest import Manifest, Row
    from tfrecords_builder.remote import Place


def synth(options: argparse.Namespace) -> None:
    from cxr_dist.phantoms import write_phantoms

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
    print(f"{options.folder}: {sum(IMAGES.values()):,} images" + ("" if fetched else "; they were there already"))


def build(options: argparse.Namespace) -> None:
    from tfrecords_builder.build import build_dataset
    from tfrecords_builder.collection.file_kinds import not_taken_lines

    with _builders(options) as pool, _output_folder(options) as dataset, progress_bar("build") as progress:
        summary = build_dataset(
            options.source,
            dataset,
            image_size=options.image_size,
            encoding=options.encoding,
            workers=options.workers,
            seed=options.seed,
            split=options.split,
            split_file=options.split_file,
            conflicts=options.conflicts,
            masks=options.masks,
            on_error=options.on_error,
            progress=progress,
            pool=pool,
        )
    manifest = summary.manifest
    for change in summary.changes:
        print(f"built anew: {change}")
    for path, reason in [*manifest.rejected, *manifest.excluded]:
        print(f"left out: {path}: {reason}")
    for line in not_taken_lines(manifest.not_taken):
        print(line)
    for note in manifest.notes:
        print(f"{'warning' if note.warning else 'note'}: {note.text}")
    width = max(len(name) for name in [*manifest.class_names, "class"])
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in manifest.counts))
    for name in manifest.class_names:
        print(f"{name:{width}}" + "".join(f"{counts[name]:12,}" for counts in manifest.counts.values()))
    print(f"{'all':{width}}" + "".join(f"{sum(counts.values()):12,}" for counts in manifest.counts.values()))
    print("\n".join(_group_lines(manifest)))
    left_out = len(manifest.rejected) + len(manifest.excluded)
    if summary.reused:
        print(f"{options.dataset}: was complete already")
        return
    print(
        f"{options.dataset}: {len(manifest.shards)} shards in {summary.seconds:.1f} s "
        f"({summary.images_per_second:,.0f} images/s)" + (f"; {left_out} file(s) left out" if left_out else "")
    )


@contextmanager
def _output_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where a build writes: the folder that was given, or a local one that goes up at the end."""
    from tfrecords_builder.collection.find import list_source
    from tfrecords_builder.remote import staged_output

    if isinstance(options.dataset, Path):
        yield options.dataset
        return
    # For a while the disk holds the images twice; raw is the largest encoding.
    needed = 2 * len(list_source(options.source, options.on_error).images) * options.image_size**2
    with progress_bar("upload") as progress, staged_output(options.dataset, needed, progress=progress) as folder:
        yield folder


@contextmanager
def local_dataset(place: "Place") -> Iterator[Path]:
    """A dataset's folder on this machine, wherever it is."""
    from tfrecords_builder.remote import local_copy

    with progress_bar("fetch") as progress, local_copy(place, progress=progress) as dataset:
        yield dataset


@contextmanager
def _builders(options: argparse.Namespace) -> "Iterator[Workers | None]":
    """Where a build's work is done; None for processes of this machine."""
    if options.launcher == "local":
        if options.address:
            raise UserError("--address: is for --launcher ray; leave one out")
        yield None
        return
    if options.workers is not None:
        raise UserError("--workers: with --launcher ray the cluster decides; leave it out")
    from cxr_dist.launch.ray_connection import connected
    from cxr_dist.launch.ray_pool import RayPool

    with connected(options.address, options.verbose):
        yield RayPool()


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
    from tfrecords_builder.verify import verify_dataset

    with local_dataset(options.dataset) as dataset, progress_bar("verify") as progress:
        summary = verify_dataset(dataset, progress)
    print(
        f"{options.dataset}: {summary.records:,} records in {summary.shards} shards, {summary.bytes:,} bytes: all whole"
    )


def eda(options: argparse.Namespace) -> None:
    from tfrecords_builder.eda.page import PAGE, write_analysis

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
    print(f"{left_out['rejected']['images']:,} files rejected, {left_out['excluded']['images']:,} excluded")
    folder = numbers["source_folder"]
    others = folder["files"] - folder["images"] - folder["masks"]
    print(f"{others:,} of {folder['files']:,} files of the source folder are neither image nor mask")
    for text in numbers["warnings"]:
        print(f"warning: {text}")
    print(f"page: {options.out / PAGE}")


def train(options: argparse.Namespace) -> None:
    config = load_config(resolve_preset(options.config), options.overrides)
    result = run_training(
        config,
        options.dataset,
        options.out,
        launcher=options.launcher,
        workers=options.workers,
        devices_per_worker=options.devices_per_worker,
        address=options.address,
        verbose=options.verbose,
    )
    best = result["best"]
    print(
        f"{options.out}: validation accuracy {best['val_accuracy']:.4f} "
        f"(stage {best['stage']}, epoch {best['epoch']}), {result['seconds']['total']:.0f} s"
    )


def run_training(
    config: Config,
    dataset: "Place",
    run: Path,
    *,
    launcher: str,
    workers: tuple[int, int] | None = None,
    devices_per_worker: int | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Check all that can be checked, prepare the run's folder, and train through the launcher."""
    from cxr_dist.data.batch_sampler import TrainingPlan
    from cxr_dist.launch.ray_train import train_locally, train_with_ray
    from cxr_dist.model.resnet import check_weights
    from cxr_dist.runs.corrupt_records import leave_out
    from cxr_dist.runs.disk_space import check_space, needed_by_run
    from tfrecords_builder.format.manifest import check_shards, read_manifest

    if launcher == "local" and ((workers or (1, 1))[1] > 1 or address):
        raise UserError("--launcher local: is one process; leave --workers and --address out, or use --launcher ray")
    with ExitStack() as held:
        folder = held.enter_context(local_dataset(dataset))
        manifest = read_manifest(folder)
        check_shards(folder, manifest)
        config = run_folder.resolve_config(config, manifest)
        check_weights(config.model.weights)
        reporter = ConsoleReporter()

        def prepare(replicas: int) -> bool:
            check_plan(replicas, ())
            held.enter_context(run_folder.locked(run))
            if run_folder.read_result(run) is None:
                images = len(manifest.split("train")) + len(manifest.split("validation"))
                check_space(run, run_folder.feature_cache(config, run), needed_by_run(config, images))
            run_folder.prepare(run, config, dataset, manifest)
            if _finished(run) is not None:
                return False
            check_plan(replicas, leave_out(run, folder, manifest, config.input.max_damaged).paths)
            return True

        def check_plan(replicas: int, without: Collection[str]) -> None:
            count, parts = len(manifest.split("train", without)), config.accumulation_steps
            TrainingPlan(count, config.global_batch_size, replicas, config.seed, parts=parts)

        if launcher == "local":
            result = train_locally(
                config, folder, run, reporter, prepare=prepare, devices_per_worker=devices_per_worker
            )
        else:
            result = train_with_ray(
                config,
                dataset,
                run,
                reporter,
                prepare=prepare,
                workers=workers,
                devices_per_worker=devices_per_worker,
                address=address,
                verbose=verbose,
            )
        remove_checkpoints(run)
        return result


def remove_checkpoints(run: Path) -> None:
    """Of a finished run that has its model, which is all that other commands read."""
    from cxr_dist.runs.checkpoints import CheckpointFolder

    if run_folder.read_result(run) is not None and (run / run_folder.MODEL).is_file():
        CheckpointFolder(run / run_folder.CHECKPOINTS).remove_all()


def _finished(run: Path) -> dict[str, Any] | None:
    result = run_folder.read_result(run)
    if result is not None:
        print(f"{run}: was finished already", file=sys.stderr)
    return result


def doctor(options: argparse.Namespace) -> None:
    """What this machine can run, or a cluster; exit status 1 when something that training needs is missing."""
    from cxr_dist.cli import doctor as findings_of

    if options.address:
        from cxr_dist.launch.placement import cluster_nodes
        from cxr_dist.launch.ray_connection import connected

        with connected(options.address, options.verbose):
            findings = findings_of.examine_cluster(cluster_nodes())
    else:
        findings = findings_of.examine_machine()
    if options.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        print("\n".join(findings_of.table(findings)))
    if any(finding.state == "missing" for finding in findings):
        raise SystemExit(1)


def show_config(options: argparse.Namespace) -> None:
    print(load_config(resolve_preset(options.config), options.overrides).to_yaml(), end="")


def bench(options: argparse.Namespace) -> None:
    """The benchmark that was named."""
    from cxr_dist.cli import bench as benchmarks

    measure = {
        "accuracy": benchmarks.bench_accuracy,
        "build": benchmarks.bench_build,
        "growth": benchmarks.bench_growth,
        "input": benchmarks.bench_input,
        "step": benchmarks.bench_step,
        "features": benchmarks.bench_features,
        "scaling": benchmarks.bench_scaling,
        "serve": benchmarks.bench_serve,
        "tune": benchmarks.bench_tune,
    }
    measure[options.what](options)


def demo(options: argparse.Namespace) -> None:
    """The whole pipeline on phantoms, at a size that a laptop does in minutes; goes on where it was stopped."""
    from cxr_dist.evaluation.evaluate import Request, calibrate_run, evaluate_run
    from cxr_dist.phantoms import write_phantoms
    from tfrecords_builder.build import build_dataset

    out: Path = options.out
    if out.exists() and not (out.is_dir() and all(DEMO_NAMES.fullmatch(entry.name) for entry in out.iterdir())):
        raise UserError(f"{out}: holds something other than a demo; give a new folder with --out")
    started = time.perf_counter()
    if not (out / "phantoms").exists():
        with progress_bar("1/5 phantom X-rays") as progress:
            write_phantoms(out / "phantoms", per_class=DEMO_PER_CLASS, size=DEMO_SIZE, progress=progress)
    with progress_bar("2/5 build") as progress:
        build_dataset(out / "phantoms", out / "dataset", image_size=DEMO_IMAGE_SIZE, progress=progress)
    print("3/5 train", file=sys.stderr)
    config = load_config(resolve_preset(Path("demo")))
    run_training(config, out / "dataset", out / "run", launcher=options.launcher, verbose=options.verbose)
    with progress_bar("4/5 calibrate") as progress:
        calibrate_run(out / "run", progress=progress)
    with progress_bar("5/5 evaluate") as progress:
        metrics = evaluate_run(
            Request(out / "run", out / "evaluation", examine=DEMO_EXAMINED, drawn=True), progress=progress
        )
    print_metrics(metrics)
    print(f"report: {out / 'evaluation' / 'report.html'} ({time.perf_counter() - started:.0f} s in all)")


DEMO_NAMES = re.compile(r"phantoms|\.phantoms\.unfinished-\w+|dataset|run|evaluation|feature-cache")
DEMO_PER_CLASS = 400
DEMO_SIZE = 128
DEMO_IMAGE_SIZE = 56
DEMO_EXAMINED = 64
