"""Which images an evaluation is about: a split of a dataset, or a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cxr_dist.data.image_folder import FolderSource
from cxr_dist.data.shards import ShardSource
from cxr_dist.runs import corrupt_records, run_folder
from cxr_dist.runs.seen_images import read_seen
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.places import Place, parse_place
from tfrecords_builder.format.manifest import Manifest, check_shards, read_manifest
from tfrecords_builder.remote import local_copy

ImageSource = ShardSource | FolderSource


@dataclass(frozen=True)
class EvaluationSpec:
    """Which images of which run to evaluate, and where to write."""

    run: Path
    out: Path
    split: str = "test"
    images: Path | None = None
    dataset: Place | None = None
    """By default the one that the run was trained on."""
    risk: float | None = None
    """Share of wrong answers that the threshold allows; by default that of the run's calibration, else 0.05."""
    examine: int = 0
    """How many of the images to examine at most, each some thirty times; 0 leaves the examination out."""
    drawn: bool = False
    """The images are phantoms, of which the published result says nothing."""

    def __post_init__(self) -> None:
        """Raises UserError for a risk that is no share."""
        if self.risk is not None:
            check_risk(self.risk)


def check_risk(risk: float) -> None:
    """Raise `UserError` unless `risk` is a share of wrong answers, between 0 and 1."""
    if not 0 < risk < 1:
        raise UserError(f"--risk {risk}: expected an error rate between 0 and 1, such as 0.05")


@dataclass(frozen=True)
class EvaluatedImages:
    """The images of an evaluation."""

    source: ImageSource
    title: str
    """What the report calls them."""
    manifest: Manifest | None = None
    """Of the dataset that they are a split of."""
    as_trained: bool = False
    """Whether that is the dataset that the run was trained on."""


@contextmanager
def evaluated_images(
    spec: EvaluationSpec, info: run_folder.RunInfo, as_trained: bool = False
) -> Iterator[EvaluatedImages]:
    """The images that are asked for.

    Args:
        spec: Which.
        info: Of the run.
        as_trained: Whether a dataset that is given must be the one that the run was trained on, as without one.
    """
    if spec.images is not None:
        yield EvaluatedImages(FolderSource(spec.images, info.class_names, info.image_size), str(spec.images))
        return
    place = spec.dataset or parse_place(info.dataset)
    if spec.dataset is None and isinstance(place, Path) and not place.exists():
        raise UserError(
            f"{spec.run}: was trained on {place}, which does not exist; give its new location with --dataset"
        )
    with local_copy(place) as dataset:
        manifest = read_manifest(dataset)
        is_same = manifest.fingerprint == info.fingerprint
        if not is_same and (as_trained or spec.dataset is None):
            raise UserError(
                f"{place}: is not the dataset that the run was trained on ({_difference(spec.run, manifest)}); "
                "rebuild that one with the same images and options, give its location with --dataset, or train a new "
                "run on this one"
            )
        source = _split_source(spec, info, dataset, manifest, is_same)
        yield EvaluatedImages(source, f"{place}, split {spec.split}", manifest, is_same)


def _difference(run: Path, manifest: Manifest) -> str:
    """In what a dataset differs from the one that the run was trained on."""
    seen = read_seen(run)
    if seen is None:
        return "its fingerprint differs"
    now = asdict(manifest.settings)
    changed = [key for key in now if now[key] != seen.settings.get(key)]
    if not changed:
        return "its images differ"
    return ", ".join(f"{key} {now[key]}, not {seen.settings.get(key)}" for key in changed)


def _split_source(
    spec: EvaluationSpec, info: run_folder.RunInfo, dataset: Path, manifest: Manifest, is_same: bool
) -> ShardSource:
    if manifest.class_names != info.class_names or manifest.image_size != info.image_size:
        raise UserError(
            f"{dataset}: has classes {', '.join(manifest.class_names)} at {manifest.image_size} pixels, the run has "
            f"{', '.join(info.class_names)} at {info.image_size}; give a dataset with the same classes and image size"
        )
    check_shards(dataset, manifest)
    # The validation images of a run are those that it had; in any other evaluation a damaged record is an error.
    without = corrupt_records.load_excluded(spec.run).paths if is_same and spec.split == "validation" else ()
    return ShardSource(dataset, manifest, spec.split, without)
