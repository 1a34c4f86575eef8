"""A folder's images: what belongs together is resampled together."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cxr_dist.data.image_folder import FolderSource
from cxr_dist.evaluation import bootstrap, page_text
from cxr_dist.evaluation.predictions import Predictions

NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")


@pytest.fixture
def folder(phantom_source: Path, tmp_path: Path) -> Path:
    """Ten images of each class, without masks."""
    for path in sorted(phantom_source.glob("*/images/*.png")):
        target = tmp_path / "images" / path.parts[-3]
        target.mkdir(parents=True, exist_ok=True)
        if len(list(target.iterdir())) < 10:
            shutil.copy(path, target)
    return tmp_path / "images"


def paths_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))


def write_patients(folder: Path, names: list[str]) -> None:
    lines = [f"{path},{name}" for path, name in zip(paths_of(folder), names, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["path,patient", *lines]) + "\n", encoding="utf-8")


def test_without_metadata_identical_files_are_a_group(folder: Path) -> None:
    first = paths_of(folder)[0]
    copy = folder / "Normal" / "another name.png"
    shutil.copy(folder / first, copy)
    source = FolderSource(folder, NAMES, 32)
    groups = dict(zip(source.paths, source.groups, strict=True))
    assert groups.pop(copy.relative_to(folder).as_posix()) == first
    assert all(group == path for path, group in groups.items())
    assert len(set(source.patient_names) - {None}) == 0


def test_patients_are_groups_in_whatever_way_they_are_written(folder: Path) -> None:
    spellings = ["P{} ", " p{}", "P{}", "\uff30{}"]  # the last is a full-width P
    write_patients(folder, [spellings[row % 4].format(row // 4) for row in range(40)])
    source = FolderSource(folder, NAMES, 32)
    paths = paths_of(folder)
    assert source.paths == paths
    assert source.groups == [paths[row // 4 * 4] for row in range(40)]
    assert len(set(source.patient_names) - {None}) == 10


def test_patients_and_identical_files_connect(folder: Path) -> None:
    """A patient's two images, and a copy of the second that has another name for the patient."""
    write_patients(folder, ["" if row > 1 else "a" for row in range(40)])
    paths = paths_of(folder)
    shutil.copy(folder / paths[1], folder / paths[5])
    source = FolderSource(folder, NAMES, 32)
    groups = source.groups
    assert groups[0] == groups[1] == groups[5] == paths[0]
    assert len(set(groups)) == 38
    assert len(set(source.patient_names) - {None}) == 1
    assert source.origins(np.array([5, 7]))[1] == [paths[0], paths[7]]


def test_intervals_resample_patients(folder: Path) -> None:
    """Errors of one patient come together: the interval by patients is that computed by hand, and wider."""
    patients = [row // 5 for row in range(40)]
    write_patients(folder, [f"P{patient}" for patient in patients])
    source = FolderSource(folder, NAMES, 32)
    wrong = np.isin(patients, (2, 5))
    named = np.where(wrong, (source.labels + 1) % 4, source.labels)
    predictions = Predictions(source.paths, source.labels, np.eye(4)[named] * 0.6 + 0.1, NAMES, source.groups)
    result = bootstrap.bootstrap(predictions)
    assert (result["unit"], result["units"]) == ("group", 8)
    low, high = result["intervals"]["accuracy"]
    # By hand: the share of right patients in resamples of eight, on the scale of the logit with Student's t.
    drawn = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=bootstrap.RESAMPLES)
    shares = drawn @ ~np.isin(np.arange(8), (2, 5)) / 8
    reach = 2.364624 * np.sqrt(np.var(shares) * 8 / 7) / (0.75 * 0.25)
    ends = 1 / (1 + np.exp(-(np.log(3) + np.array([-reach, reach]))))
    assert (low, high) == pytest.approx(tuple(ends), abs=1e-5)
    alone = bootstrap.bootstrap(Predictions(source.paths, source.labels, predictions.probabilities, NAMES))
    narrow = alone["intervals"]["accuracy"]
    assert high - low > 1.5 * (narrow[1] - narrow[0])
    assert "8 known patients" in page_text.uncertainty_words(
        result | {"patients": len(set(source.patient_names) - {None})}
    )
