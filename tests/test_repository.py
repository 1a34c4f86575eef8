"""The files around the code: workflows, hooks, templates, citation, changelog, decision records, benchmark pages."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr_dist.evaluation.examination import findings
from cxr_dist.features import cache
from cxr_dist.runs import versions
from tfrecords_builder.eda import analysis
from tfrecords_builder.format import manifest

ROOT = Path(__file__).parents[1]
YAML_FILES = sorted(
    [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"],
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def commands(workflow: str) -> list[str]:
    jobs = read(f".github/workflows/{workflow}.yml")["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("workflow", "expected"),
    [("ci", ["make lint", "make test"]), ("nightly", ["make test-all", "make test-newest"])],
)
def test_workflows_call_the_makefile_alone(workflow: str, expected: list[str]) -> None:
    assert commands(workflow) == expected
    assert {command.removeprefix("make ") for command in expected} <= make_targets()


def test_ci_runs_on_every_python_that_the_makefile_takes() -> None:
    low, high = re.findall(r"\(3, (\d+)\)", (ROOT / "Makefile").read_text(encoding="utf-8"))[:2]
    pythons = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == [f"3.{minor}" for minor in range(int(low), int(high) + 1)]
    assert PROJECT["requires-python"].startswith(f">=3.{low}")


def test_nightly_jobs_run_at_their_own_time() -> None:
    workflow = read(".github/workflows/nightly.yml")
    times = [entry["cron"] for entry in workflow[True]["schedule"]]  # YAML 1.1 reads a bare `on` as true
    excluded = [re.findall("'(.*)'", job["if"])[0] for job in workflow["jobs"].values()]
    assert excluded == times[::-1], "each job leaves out the other's time"


def test_hooks_use_the_environment_of_the_makefile() -> None:
    local = next(repo for repo in read(".pre-commit-config.yaml")["repos"] if repo["repo"] == "local")
    lint = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in local["hooks"]:
        assert hook["entry"].replace(".venv/bin", "$(BIN)") in lint, "make lint runs what the hook runs"


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert (citation["title"], citation["version"], citation["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ("dataset", manifest.FORMAT_VERSION),
        ("run", versions.FORMAT),
        ("feature cache", cache.VERSION),
        ("analysis", analysis.FORMAT_VERSION),
        ("examination", findings.FORMAT_VERSION),
    ],
)
def test_the_changelog_has_the_formats_of_the_code(row: str, number: int) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {row}[^|]*\| {number} \|", changelog, re.MULTILINE)


@pytest.mark.parametrize("folder", ["docs/decisions", "docs/benchmarks", "docs/design"])
def test_every_page_is_listed(folder: str) -> None:
    pages = {path.name for path in (ROOT / folder).glob("*.md")} - {"index.md", "overview.md"}
    listing = ROOT / folder / "index.md"
    listing = listing if listing.exists() else ROOT / folder / "overview.md"
    named = {Path(link).name for link in re.findall(r"\]\(([^)#]+\.md)", listing.read_text(encoding="utf-8"))}
    assert pages <= named


def test_decision_records_say_when_and_where() -> None:
    records = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [path.name[:4] for path in records] == [f"{number:04d}" for number in range(1, len(records) + 1)]
    for path in records:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(path.name[:4])}. "), path.name
        for part in ("- **Recorded:** 20", "- **Machine:** ", "## Context", "## What was measured", "## Decision"):
            assert part in text, f"{path.name}: lacks {part}"


def test_no_file_has_marks_of_a_merge() -> None:
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [path.name for path in texts if marks.search(path.read_text(encoding="utf-8"))] == []
