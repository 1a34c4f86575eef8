"""What each command of the command line does: options in, one call into the packages, lines for people out."""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_dist import run_folder
from cxr_dist.config import Config, load_config, resolve_preset
from cxr_dist.reporting import ConsoleReporter
from tfrecords_builder.errors import UserError

if TYPE_CHECKING:
    from tfrecords_builder.build import Workers
    from tfrecords_builder.manifest import Manifest


def synth(options: argparse.Namespace) -> None:
    from cxr_dist.phantoms import write_phantoms

    with _progress("phantoms") as progress:
        counts = write_phantoms(
            options.folder,
            per_class=options.per_class,
            size=options.size,
            seed=options.seed,
            workers=options.workers,
            progress=progress,
        )
    print(f"{options.folder}: {sum(counts.values())} phantoms of {options.size} pixels in {len(counts)} classes")


def build(options: argparse.Namespace) -> None:
    from tfrecords_builder.build import build_dataset

    with _builders(options) as pool, _progress("build") as progress:
        summary = build_dataset(
            options.source,
            options.dataset,
            image_size=options.image_size,
            encoding=options.encoding,
            workers=options.workers,
            seed=options.seed,
            split=options.split,
            split_file=options.split_file,
            conflicts=options.conflicts,
            on_error=options.on_error,
            progress=progress,
            pool=pool,
        )
    manifest = summary.manifest
    for change in summary.changes:
        print(f"built anew: {change}")
    for path, reason in [*manifest.rejected, *manifest.excluded]:
        print(f"left out: {path}: {reason}")
    width = max(len(name) for name in [*manifest.class_names, "class"])
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in manifest.counts))
    for name in manifest.class_names:
        print(f"{name:{width}}" + "".join(f"{counts[name]:12,}" for counts in manifest.counts.values()))
    print(f"{'all':{width}}" + "".join(f"{sum(counts.values()):12,}" for counts in manifest.counts.values()))
    print(_duplicates_words(manifest))
    left_out = len(manifest.rejected) + len(manifest.excluded)
    if summary.reused:
        print(f"{options.dataset}: was complete already")
        return
    print(
        f"{options.dataset}: {len(manifest.shards)} shards in {summary.seconds:.1f} s "
        f"({summary.images_per_second:,.0f} images/s)" + (f"; {left_out} file(s) left out" if left_out else "")
    )


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
    from cxr_dist.orchestration.ray_pool import RayPool
    from cxr_dist.orchestration.train_job import connected

    with connected(options.address, options.verbose):
        yield RayPool()


def _duplicates_words(manifest: "Manifest") -> str:
    groups = manifest.groups
    if not groups:
        return "no image shows the same as another"
    straddling = sum(len({row.split for row in rows} - {None}) > 1 for rows in groups.values())
    where = f"{straddling} of the groups are in more than one split" if straddling else "each group is in one split"
    return (
        f"{sum(map(len, groups.values())):,} images show the same as another, in {len(groups):,} groups "
        f"(the largest has {max(map(len, groups.values()))}); {where}"
    )


def verify(options: argparse.Namespace) -> None:
    from tfrecords_builder.verify import verify_dataset

    with _progress("verify") as progress:
        summary = verify_dataset(options.dataset, progress)
    print(
        f"{options.dataset}: {summary.records:,} records in {summary.shards} shards, {summary.bytes:,} bytes: all whole"
    )


def eda(options: argparse.Namespace) -> None:
    from tfrecords_builder.eda_page import PAGE, write_analysis

    with _progress("eda") as progress:
        numbers = write_analysis(options.dataset, options.out, progress)
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
        f"{duplicates['pairs']:,} pairs show the same: {duplicates['images']:,} images in {duplicates['groups']:,} "
        f"groups, {duplicates['straddling_splits']:,} of them in more than one split"
    )
    left_out = numbers["left_out"]
    print(f"{left_out['rejected']['images']:,} files rejected, {left_out['excluded']['images']:,} excluded")
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
    dataset: Path,
    run: Path,
    *,
    launcher: str,
    workers: int | None = None,
    devices_per_worker: int | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Check all that can be checked, prepare the run's folder, and train through the launcher."""
    from cxr_dist.data import TrainingPlan
    from cxr_dist.model import check_weights
    from cxr_dist.orchestration.train_job import train_locally, train_with_ray
    from tfrecords_builder.manifest import check_shards, read_manifest

    if launcher == "local" and ((workers or 1) > 1 or address):
        raise UserError("--launcher local: is one process; leave --workers and --address out, or use --launcher ray")
    manifest = read_manifest(dataset)
    check_shards(dataset, manifest)
    config = run_folder.resolve_config(config, manifest)
    check_weights(config.model.weights)
    reporter = ConsoleReporter()
    with ExitStack() as held:

        def prepare(replicas: int) -> bool:
            TrainingPlan(len(manifest.split("train")), config.global_batch_size, replicas, config.seed)
            held.enter_context(run_folder.locked(run))
            run_folder.prepare(run, config, dataset, manifest)
            return _finished(run) is None

        if launcher == "local":
            return train_locally(config, dataset, run, reporter, prepare=prepare, devices_per_worker=devices_per_worker)
        return train_with_ray(
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


def _finished(run: Path) -> dict[str, Any] | None:
    result = run_folder.read_result(run)
    if result is not None:
        print(f"{run}: was finished already", file=sys.stderr)
    return result


def evaluate(options: argparse.Namespace) -> None:
    from cxr_dist.evaluate import Request, evaluate_run

    request = Request(options.run, options.out, options.split, options.images, options.dataset)
    with _progress("evaluate") as progress:
        metrics = evaluate_run(request, options.devices, progress)
    print_metrics(metrics)
    print(f"report: {options.out / 'report.html'}")


def print_metrics(metrics: dict[str, Any]) -> None:
    """The table of an evaluation, for people."""
    width = max(len(name) for name in [*metrics["per_class"], "class"])
    print(f"{'class':{width}} precision  recall      F1  images")
    for name, row in metrics["per_class"].items():
        print(f"{name:{width}} {row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f} {row['support']:7,}")
    auc = metrics["auc_macro_ovr"]
    print(
        f"accuracy {metrics['accuracy']:.4f}, macro F1 {metrics['f1_macro']:.4f}, "
        f"AUC {'undefined' if auc is None else f'{auc:.4f}'}, cosine similarity {metrics['cosine_similarity']:.4f}, "
        f"{metrics['n']:,} images"
    )


def show_config(options: argparse.Namespace) -> None:
    print(load_config(resolve_preset(options.config), options.overrides).to_yaml(), end="")


def bench(options: argparse.Namespace) -> None:
    """The benchmark that was named."""
    {"build": bench_build, "step": bench_step}[options.what](options)


def bench_build(options: argparse.Namespace) -> None:
    """On labelled images, or on phantoms of the database's size."""
    from cxr_dist.bench import build
    from cxr_dist.phantoms import CLASS_FOLDERS, write_phantoms

    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work, source = Path(folder), options.dataset
        if source is None:
            source = work / "phantoms"
            with _progress("phantoms") as progress:
                per_class = math.ceil(options.images / len(CLASS_FOLDERS))
                write_phantoms(source, per_class=per_class, size=DATABASE_IMAGE_SIZE, progress=progress)
        (work / "built").mkdir()
        timings = build.measure(source, work / "built", BENCH_IMAGE_SIZE, (1, 2), options.rounds, tfds=True)
    if options.json:
        print(json.dumps([vars(timing) | {"images_per_second": timing.images_per_second} for timing in timings]))
        return
    print(f"{timings[0].images:,} images to {BENCH_IMAGE_SIZE} pixels, median of {options.rounds}")
    print("\n".join(build.table(timings)))


def bench_step(options: argparse.Namespace) -> None:
    """Phantoms of the network's own size, just enough of them for the steps of an epoch, unless a dataset is given."""
    from cxr_dist.bench import step
    from cxr_dist.phantoms import CLASS_FOLDERS, write_phantoms
    from tfrecords_builder.build import build_dataset
    from tfrecords_builder.splits import TRAIN_PERCENT

    config = load_config(resolve_preset(options.config), [*options.overrides, *step.overrides(options.rounds)])
    with tempfile.TemporaryDirectory(prefix="cxr-dist-bench-") as folder:
        work, dataset = Path(folder), options.dataset
        if dataset is None:
            dataset = work / "dataset"
            images = options.steps * config.global_batch_size
            per_class = math.ceil(images / len(CLASS_FOLDERS) * 100 / TRAIN_PERCENT)
            write_phantoms(work / "phantoms", per_class=per_class, size=BENCH_IMAGE_SIZE)
            build_dataset(work / "phantoms", dataset, image_size=BENCH_IMAGE_SIZE)
        rounds = step.measure(config, dataset, work / "run", ConsoleReporter())
    summaries = step.summarize(rounds)
    if options.json:
        print(json.dumps({"rounds": [vars(row) for row in rounds], "summary": [vars(row) for row in summaries]}))
        return
    print("stage  train img/s  bare step img/s  ratio (median of rounds)")
    for row in summaries:
        print(f"{row.stage:5} {row.train:12.2f} {row.bare:16.2f}  {row.ratio:.3f} ({row.rounds})")


def demo(options: argparse.Namespace) -> None:
    """The whole pipeline on phantoms, at a size that a laptop does in minutes; goes on where it was stopped."""
    from cxr_dist.evaluate import Request, evaluate_run
    from cxr_dist.phantoms import write_phantoms
    from tfrecords_builder.build import build_dataset

    out: Path = options.out
    if out.exists() and not (out.is_dir() and all(DEMO_NAMES.fullmatch(entry.name) for entry in out.iterdir())):
        raise UserError(f"{out}: holds something other than a demo; give a new folder with --out")
    started = time.perf_counter()
    if not (out / "phantoms").exists():
        with _progress("1/4 phantom X-rays") as progress:
            write_phantoms(out / "phantoms", per_class=DEMO_PER_CLASS, size=DEMO_SIZE, progress=progress)
    with _progress("2/4 build") as progress:
        build_dataset(out / "phantoms", out / "dataset", image_size=DEMO_IMAGE_SIZE, progress=progress)
    print("3/4 train", file=sys.stderr)
    config = load_config(resolve_preset(Path("demo")))
    run_training(config, out / "dataset", out / "run", launcher=options.launcher, verbose=options.verbose)
    with _progress("4/4 evaluate") as progress:
        metrics = evaluate_run(Request(out / "run", out / "evaluation"), progress=progress)
    print_metrics(metrics)
    print(f"report: {out / 'evaluation' / 'report.html'} ({time.perf_counter() - started:.0f} s in all)")


BENCH_IMAGE_SIZE = 224
DATABASE_IMAGE_SIZE = 299
DEMO_NAMES = re.compile(r"phantoms|\.phantoms\.unfinished-\w+|dataset|run|evaluation")
DEMO_PER_CLASS = 400
DEMO_SIZE = 128
DEMO_IMAGE_SIZE = 64


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal; otherwise a line now and then, for a log."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    with tqdm(desc=title, unit="img", file=sys.stderr, disable=not live, leave=False) as bar:
        spoken = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal spoken
            if live:
                bar.total = total
                bar.update(done - bar.n)
            elif time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                print(f"{title}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

        yield update


SECONDS_BETWEEN_LINES = 15.0
