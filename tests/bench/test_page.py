"""A page from the JSON of benchmarks: what each line says, and that figures of two machines never share a page."""

import json
from pathlib import Path

import pytest

from cxr_dist.bench import growth
from cxr_dist.bench.page import MARKER, Measurement, write_page
from cxr_dist.cli.main import main
from tfrecords_builder.common.errors import UserError


def test_what_bench_prints_becomes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        growth, "measure", lambda sizes, *_: [growth.Size(size, size, 2.0, 3_000_000_000) for size in sizes]
    )
    main(["bench", "growth", "--sizes", "40", "--set", "features.folder=/home/somebody/cache", "--json"])
    printed = capsys.readouterr().out
    (tmp_path / "growth.json").write_text(printed, encoding="utf-8")
    page = tmp_path / "pages" / "page.md"
    main(["bench", "page", str(tmp_path / "growth.json"), "--out", str(page)])
    lines = page.read_text(encoding="utf-8").splitlines()
    measured = json.loads(printed)
    assert lines[0] == MARKER
    assert lines[1] == f"# {measured['machine']['processor']}, {measured['date']}"
    assert "## bench growth" in lines
    assert "cxr-dist bench growth --sizes 40 --set features.folder=cache" in lines, "no folder of the machine"
    assert set(measured["table"]) <= set(lines)
    assert f"| tensorflow | {measured['machine']['tensorflow']} |" in lines
    main(["bench", "page", str(tmp_path / "growth.json"), "--out", str(page)])  # replaces its own page


def test_one_page_is_about_one_machine(tmp_path: Path) -> None:
    results = [tmp_path / "first.json", tmp_path / "second.json"]
    for number, path in enumerate(results):
        measured = Measurement("cxr-dist bench step", "2026-11-26", {"processor": f"P{number}"}, {}, ["line"])
        path.write_text(json.dumps(measured.tree()), encoding="utf-8")
    with pytest.raises(UserError, match=r"second\.json: has another machine"):
        write_page(results, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("content", [None, "not JSON", '{"figures": []}'])
def test_what_is_no_result_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"result\.json: .*--json"):
        write_page([path], tmp_path / "page.md")


def test_a_file_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"page\.md: is not a page"):
        write_page([], page)
    assert page.read_text(encoding="utf-8") == "# Mine\n"
