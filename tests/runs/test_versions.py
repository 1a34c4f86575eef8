"""What a run says it was made with, and what becomes of files of another format."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_dist.runs import versions
from tfrecords_builder.common.errors import UserError


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_every_version_that_decides_a_run_is_named() -> None:
    hardware = {"processor": "one", "device": "CPU"}
    found = versions.made_with(hardware, "local")
    assert found.pop("commit", None) == versions.commit_of(Path(versions.__file__).parents[2])
    packages = {name: importlib.metadata.version(name) for name in ("cxr-dist", "numpy", "tensorflow", "keras")}
    assert found == {"python": platform.python_version(), **packages, **hardware}
    assert versions.made_with(hardware, "ray")["ray"] == importlib.metadata.version("ray")


def test_versions_are_read_without_importing_what_they_are_of() -> None:
    code = (
        "import sys; from cxr_dist.runs import run_folder, versions;"
        "versions.made_with({}, 'ray'); versions.declared();"
        "print({'tensorflow', 'keras', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked.txt").write_text("")
    assert versions.commit_of(tmp_path) == commit
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert versions.commit_of(tmp_path) == commit
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "code.py").write_text("b")
    assert versions.commit_of(tmp_path) == f"{commit}-dirty"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert versions.commit_of(inside) is None, "installed from a wheel, within the checkout of something else"
    (inside / ".git").write_text("gitdir: /nowhere")
    assert versions.commit_of(inside) is None
    monkeypatch.setenv("PATH", "")
    assert versions.commit_of(tmp_path) is None, "no git"


def test_differences_are_named_with_both_versions() -> None:
    before = {"keras": "3.15.1", "numpy": "2.4.6", "ray": "2.60.0"}
    now = {"keras": "3.16.0", "numpy": "2.4.6", "cuda": "12.5"}
    assert versions.differences(before, now) == ["keras 3.15.1 -> 3.16.0"], "what only one of them has is no difference"
    assert versions.differences(before, before) == []


@pytest.mark.parametrize("written", [{}, {"format": 0}, {"format": versions.FORMAT + 1}, {"format": "1"}])
def test_another_format_is_one_line_that_names_the_file(written: dict[str, object]) -> None:
    versions.check_format(Path("file"), {"format": versions.FORMAT})
    with pytest.raises(
        UserError, match=r"^a/file: has format .*reads format 1; use the version that wrote it"
    ) as caught:
        versions.check_format(Path("a/file"), written)
    assert "\n" not in str(caught.value)


def test_without_metadata_nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "nothing-of-the-kind")
    assert versions.declared() == {}
    assert versions.version_of("nothing-of-the-kind") == versions.NOT_INSTALLED
    assert "install keras" in str(versions.unsupported("keras", "it does not"))
