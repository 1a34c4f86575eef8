"""What is installed: pins of all that is asked for, and a wheel that works where this checkout is not."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tfrecords_builder.common import installation

ROOT = Path(__file__).parents[1]
PACKAGES = ("cxr_dist", "tfrecords_builder", "tune_configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = sorted(PROJECT["optional-dependencies"])
PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
}


def asked_for(extra: str) -> Iterator[Requirement]:
    """What the project or its extra asks for, and what of those the extras of installed packages do (CUDA of a GPU)."""
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, texts):
        if requirement.name == "cxr-dist":
            for name in requirement.extras:
                yield from asked_for(name)
            continue
        yield requirement
        for name in requirement.extras:
            for text in importlib.metadata.requires(requirement.name) or []:
                further = Requirement(text)
                if further.marker is not None and further.marker.evaluate({"extra": name}):
                    yield further


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_all_that_is_asked_for_is_pinned(extra: str) -> None:
    for requirement in asked_for(extra):
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), str(requirement)


def test_pins_are_versions_alone() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(line.startswith("#") or line.count("==") == 1 for line in text.splitlines())
    assert "://" not in text
    names = [line.lower() for line in text.splitlines() if not line.startswith("#")]
    assert names == sorted(names)


def test_hints_fit_how_it_was_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert installation.install_command() == 'pip install -c constraints.txt -e "."'
    assert installation.install_command("dicom") == 'pip install -c constraints.txt -e ".[dicom]"'
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    assert installation.install_command() == 'pip install "cxr-dist"'
    assert installation.install_command("dicom") == 'pip install "cxr-dist[dicom]"'


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", ".", "./source"]
    # The Makefile's constraints are a path relative to the checkout.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CONSTRAINT")}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    shutil.rmtree(folder / "source")
    return folder / "installed"


def run(installed: Path, *arguments: str, timeout_s: float = 600) -> str:
    """What Python prints, which finds the wheel's packages before those of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env=environment | {"PYTHONPATH": str(installed)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout_s,
    )
    return done.stdout


def test_a_wheel_has_all_that_is_no_python(installed: Path) -> None:
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
        assert (installed / name / "py.typed").is_file()


def test_a_wheel_works_without_the_checkout(installed: Path) -> None:
    code = (
        "import cxr_dist\n"
        "from tfrecords_builder.common.installation import install_command\n"
        "print(cxr_dist.__file__)\n"
        "print(cxr_dist.__version__)\n"
        "print(cxr_dist.load_config('smoke').stages[1].epochs > 0)\n"
        "print(install_command('dicom'))\n"
    )
    expected = [
        str(installed / "cxr_dist" / "__init__.py"),
        PROJECT["version"],
        "True",
        'pip install "cxr-dist[dicom]"',
    ]
    assert run(installed, "-c", code).splitlines() == expected
    assert run(installed, "-m", "cxr_dist", "--version") == f"cxr-dist {PROJECT['version']}\n"


@pytest.mark.nightly
def test_the_demo_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    said = run(installed, "-m", "cxr_dist", "demo", "--out", str(tmp_path / "demo"), timeout_s=580)
    assert (tmp_path / "demo" / "evaluation" / "report.html").is_file()
    assert str(tmp_path / "demo" / "evaluation" / "report.html") in said
