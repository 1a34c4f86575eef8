"""Pictures that are no frontal chest X-ray are noticed, and few X-rays with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from cxr_dist.cli import main
from cxr_dist.phantoms import CLASS_FOLDERS, draw_phantom, phantom_rng
from cxr_dist.runs.typical_images import TYPICAL, TypicalImages, read_typical, write_typical
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decode import load_gray

Gray = np.ndarray
SIDE = 128


def uniform(xray: Image.Image) -> Image.Image:
    return Image.new("L", xray.size, 128)


def noise(xray: Image.Image) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, xray.size, dtype=np.uint8))


def screenshot(xray: Image.Image) -> Image.Image:
    page = Image.new("RGB", (xray.width * 2, xray.height), "white")
    pen = ImageDraw.Draw(page)
    for line in range(0, xray.height, 14):
        pen.text((5, line), "error: The quick brown fox jumps over the lazy dog 0123456789", fill="black")
    return page


def photograph(xray: Image.Image) -> Image.Image:
    y, x = np.mgrid[0 : xray.height, 0 : xray.width] / xray.height
    sky = np.stack([120 + 80 * y, 160 + 40 * y, 255 - 100 * y], -1)
    sky[y > 0.6 + 0.05 * np.sin(x * 20)] = (60, 120, 40)
    sky[(x - 0.7) ** 2 + (y - 0.2) ** 2 < 0.01] = (255, 240, 120)
    return Image.fromarray(np.clip(sky + np.random.default_rng(0).normal(0, 5, sky.shape), 0, 255).astype(np.uint8))


def rotated(xray: Image.Image) -> Image.Image:
    return xray.rotate(90)


def lower_half(xray: Image.Image) -> Image.Image:
    return xray.crop((0, xray.height // 2, xray.width, xray.height))


def squeezed(xray: Image.Image) -> Image.Image:
    lateral = Image.new("L", xray.size)
    lateral.paste(xray.resize((xray.width // 3, xray.height)), (xray.width // 3, 0))
    return lateral


FOREIGN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "uniform": uniform,
    "noise": noise,
    "screenshot": screenshot,
    "photograph": photograph,
    "rotated": rotated,
    "inverted": ImageOps.invert,
    "lower half": lower_half,
    "squeezed": squeezed,
}


def square(image: Image.Image, side: int) -> Gray:
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))


def phantoms(first: int, count: int, side: int = SIDE) -> list[Gray]:
    return [
        draw_phantom(name, side, phantom_rng(name, number, 0))[0]
        for name in CLASS_FOLDERS
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def fitted() -> TypicalImages:
    return TypicalImages.fit(np.stack(phantoms(0, 60)))


def test_foreign_pictures_are_noticed_and_phantoms_are_not(fitted: TypicalImages) -> None:
    others = phantoms(60, 40)
    assert sum(reason is not None for reason in fitted.unlike(np.stack(others))) <= 0.05 * len(others)
    for name, make in FOREIGN.items():
        changed = np.stack([square(make(Image.fromarray(xray)), SIDE) for xray in others[::8]])
        reasons = fitted.unlike(changed)
        assert all(reasons), f"{name}: {reasons}"
    assert fitted.unlike(np.zeros((0, SIDE, SIDE), np.uint8)) == []


def test_real_xrays(xrays: Path) -> None:
    """Fitted on a thousand, judged on the others: 5 % at most are taken for foreign."""
    files = sorted(xrays.glob("*/images/*.png"))[::2]
    images = np.stack([load_gray(path, 64) for path in files])
    order = np.random.default_rng(0).permutation(len(images))
    found = TypicalImages.fit(images[order[:1000]])
    others = images[order[1000:]]
    assert sum(reason is not None for reason in found.unlike(others)) <= 0.05 * len(others)
    shares = {}
    for name, make in FOREIGN.items():
        changed = np.stack([square(make(Image.open(files[row]).convert("L")), 64) for row in order[1000:1040]])
        shares[name] = np.mean([reason is not None for reason in found.unlike(changed)])
    print(shares)
    assert min(share for name, share in shares.items() if name not in ("rotated", "lower half")) == 1.0
    assert shares["rotated"] >= 0.7
    assert shares["lower half"] >= 0.6


def test_the_file_is_whole_or_an_error(fitted: TypicalImages, tmp_path: Path) -> None:
    assert read_typical(tmp_path) is None
    images = np.stack(phantoms(0, 60))
    write_typical(tmp_path, images)
    read = read_typical(tmp_path)
    assert read is not None
    assert read.threshold == fitted.threshold
    for name in ("thumbnail", "weights", "centers", "spreads"):
        np.testing.assert_array_equal(getattr(read.typical, name), getattr(fitted.typical, name))
    content = (tmp_path / TYPICAL).read_bytes()
    assert len(content) < 20_000
    for place in range(0, len(content), 499):
        (tmp_path / TYPICAL).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=rf"{TYPICAL}: damaged"):
            read_typical(tmp_path)


@pytest.mark.usefixtures("small_network")
def test_predict_abstains_and_says_why(
    finished_run: Path, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xray = Image.open(next(phantom_source.glob("Normal/images/*.png"))).convert("L")
    for name, make in FOREIGN.items():
        make(xray).save(tmp_path / f"{name}.png")
    xray.save(tmp_path / "xray.png")
    main.main(["predict", str(finished_run), str(tmp_path), "--json"])
    rows = {Path(row["path"]).stem: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["xray"]["reason"] is None
    assert not rows["xray"]["abstained"]
    noticed = {name for name in FOREIGN if rows[name]["abstained"]}
    assert noticed == set(FOREIGN)
    assert all(rows[name]["reason"].startswith("unlike the training images: ") for name in noticed)
    main.main(["predict", str(finished_run), str(tmp_path / "inverted.png")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("abstains")
    assert f"inverted.png: {rows['inverted']['reason']}" in line
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / TYPICAL).unlink()
    main.main(["predict", str(run), str(tmp_path / "inverted.png")])
    assert "unlike" not in capsys.readouterr().out
