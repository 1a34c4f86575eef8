"""The report in a real browser: nothing in its console, no request to anywhere, on the screen and in print."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.evaluation import report
from tests.evaluation.test_report import CALIBRATED, make_history, make_predictions

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome on the PATH")


def visit(page: Path, folder: Path, *options: str) -> tuple[str, list[str]]:
    """Load `page` in the browser: what it said on its console, and the addresses that it asked for."""
    log = folder / "net.json"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=600, check=True, cwd=folder
    )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What the browser asks for on its own has no origin.
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return console, [address for address in asked if not address.startswith(("data:", "chrome"))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "evaluation"
    info = {"split": "test", "images": "phantoms, split test"}
    report.write_evaluation(out, report.Evaluation(make_predictions(), make_history(), info, calibrated=CALIBRATED))
    return out / "report.html"


@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_asks_for_nothing_and_complains_of_nothing(page: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    console, addresses = visit(page, tmp_path, f"--window-size={width},4000", f"--screenshot={picture}")
    assert console == ""
    assert addresses == []
    with Image.open(picture) as image:
        assert image.width == width
        pixels = np.asarray(image.convert("L"))
    # Something is drawn all along the page.
    assert all(band.std() > 5 for band in np.array_split(pixels[:3000], 6))


def test_it_prints(page: Path, tmp_path: Path) -> None:
    printed = tmp_path / "page.pdf"
    console, _ = visit(page, tmp_path, f"--print-to-pdf={printed}")
    assert console == ""
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 20_000


def test_this_test_would_see_a_request_and_a_complaint(page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    loads = '<img src="http://127.0.0.1:9/x.png" alt="">'
    other.write_text(page.read_text().replace("<main>", f"<main>{loads}"))
    console, _ = visit(other, tmp_path, "--dump-dom")
    assert "Content Security Policy" in console
    other.write_text(f"<!doctype html><title>x</title>{loads}")
    assert "http://127.0.0.1:9/x.png" in visit(other, tmp_path, "--dump-dom")[1]
