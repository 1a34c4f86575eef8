"""Which versions of what decide a run's numbers, and the format of its files. Imports none of what it names.

The command line imports this module for its help: what reads versions is imported when it is needed.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "cxr-dist"
FORMAT = 1
"""Of what is written of a run and of a search: raised with every change after which the older files cannot be read."""
PACKAGES = ("numpy", "tensorflow", "keras")
"""Whose versions can change a run's numbers."""
NOT_INSTALLED = "not installed"


class FormatError(UserError):
    """A file of another format: whole, and readable by another version of this program."""


def check_format(path: Path, written: Any) -> None:
    """Raise unless a file's JSON is an object of this program's format.

    Raises:
        FormatError: it is of another.
        TypeError: it is no object.
    """
    if not isinstance(written, dict):
        raise TypeError("no JSON object")
    found = written.get("format")
    if found != FORMAT:
        raise FormatError(
            f"{path}: has format {found}, but this version of {DISTRIBUTION} reads format {FORMAT}; "
            "use the version that wrote it, or give a new --out"
        )


def version_of(distribution: str) -> str:
    """The installed version, or NOT_INSTALLED."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def declared() -> "dict[str, SpecifierSet]":
    """By package, the versions that this program's metadata ask for, without its extras; empty if not installed."""
    import importlib.metadata

    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in texts]
    return {found.name: found.specifier for found in requirements if found.marker is None}


def unsupported(distribution: str, reason: str) -> UserError:
    """The error where an installed package does not do what this program needs of it."""
    wanted = declared().get(distribution, "")
    return UserError(
        f"{distribution} {version_of(distribution)}: lacks a function that training needs ({reason}); "
        f"install {distribution}{wanted}, as in constraints.txt"
    )


def made_with(hardware: Mapping[str, str], launcher: str) -> dict[str, str]:
    """All that decides a run's numbers beside its configuration and its dataset, of this process.

    Args:
        hardware: What is known of the devices, by name (`devices.hardware`).
        launcher: Of the run; Ray counts where it is used.
    """
    packages = {name: version_of(name) for name in (*PACKAGES, *(["ray"] if launcher == "ray" else []))}
    commit = commit_of(Path(__file__).parents[2])
    program = {DISTRIBUTION: version_of(DISTRIBUTION)} | ({} if commit is None else {"commit": commit})
    return program | {"python": platform.python_version()} | packages | dict(hardware)


def commit_of(root: Path) -> str | None:
    """The commit that is checked out in `root`, with `-dirty` behind it if tracked files have changed.

    None if `root` is not the top of a git checkout, as where the program was installed from a wheel.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # A hook of git's sets variables that name another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command, env=environment, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or git does not trust the folder
    return done.stdout.strip()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What two of `made_with` have in another version, for people."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} {before[name]} -> {now[name]}" for name in names]
