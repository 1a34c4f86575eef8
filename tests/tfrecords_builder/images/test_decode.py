import contextlib
import io
import pickle
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decode import decode_gray, load_gray, quiet_decoding
from tfrecords_builder.images.decoded import ImageError, TooLargeError

SIZE = 24
GRAY = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_gray_png_is_exact_in_every_mode(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GRAY)
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
        assert image.mode == "P"
    else:
        image = image.convert(mode)
    loaded = load_gray(save(tmp_path / "x.png", image), SIZE)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, GRAY)


def test_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(GRAY)
    image.putpalette([255 - value for value in range(256) for _ in range(3)])
    np.testing.assert_array_equal(load_gray(save(tmp_path / "x.png", image), SIZE), 255 - GRAY)


def test_one_bit(tmp_path: Path) -> None:
    loaded = load_gray(save(tmp_path / "x.png", Image.fromarray(GRAY > 127)), SIZE)
    np.testing.assert_array_equal(loaded, np.where(GRAY > 127, 255, 0))


def test_colour_is_luma(tmp_path: Path) -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    loaded = load_gray(save(tmp_path / "x.png", Image.fromarray(rgb)), SIZE)
    np.testing.assert_allclose(loaded, rgb @ [0.299, 0.587, 0.114], atol=0.51)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_over_black(tmp_path: Path, mode: str) -> None:
    alpha = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    image = Image.fromarray(GRAY).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    loaded = load_gray(save(tmp_path / "x.png", image), SIZE)
    np.testing.assert_allclose(loaded, GRAY * (alpha / 255), atol=1)


def test_transparent_gray_level(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(GRAY), transparency=int(GRAY[0, 0]))
    np.testing.assert_array_equal(load_gray(path, SIZE), np.where(GRAY[0, 0] == GRAY, 0, GRAY))


def test_sixteen_bit_uses_the_full_range(tmp_path: Path) -> None:
    samples = np.random.default_rng(4).integers(0, 65_536, (SIZE, SIZE), dtype=np.uint16)
    samples[0, :2] = (0, 65_535)
    path = save(tmp_path / "x.png", Image.fromarray(samples))
    with Image.open(path) as image:
        assert image.mode.startswith("I")  # or the test tests nothing
    loaded = load_gray(path, SIZE)
    np.testing.assert_allclose(loaded, samples / 257, atol=0.5 + 1e-9)
    assert tuple(loaded[0, :2]) == (0, 255)
    # Not stretched to what the image happens to hold: a dark image stays dark.
    dark = load_gray(save(tmp_path / "dark.png", Image.fromarray(samples // 4)), SIZE)
    assert dark.max() <= 64


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    smooth = np.add.outer(np.arange(SIZE) * 5, np.arange(SIZE) * 5).astype(np.uint8)
    image = Image.fromarray(smooth).convert(mode)
    loaded = load_gray(save(tmp_path / "x.jpg", image, quality=98), SIZE)
    np.testing.assert_allclose(loaded.astype(int), smooth, atol=4)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = save(tmp_path / "x.png", Image.fromarray(GRAY), exif=exif)
    np.testing.assert_array_equal(load_gray(path, SIZE), GRAY[::-1, ::-1])


def box_mean(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.float64]:
    rows, columns = pixels.shape
    return pixels.reshape(rows // factor, factor, columns // factor, factor).mean((1, 3))


@pytest.mark.parametrize("shape", [(96, 96), (48, 144), (299, 299), (11, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_any_size(tmp_path: Path, shape: tuple[int, int], kind: str) -> None:
    rows, columns = np.indices(shape)
    ramp = (200 * rows / max(shape[0], 2) + 50 * columns / max(shape[1], 2)).astype(np.uint8)
    loaded = load_gray(save(tmp_path / f"x.{kind}", Image.fromarray(ramp)), SIZE)
    assert loaded.shape == (SIZE, SIZE)
    centres = (np.arange(SIZE) + 0.5) / SIZE
    expected = ramp[(centres * shape[0]).astype(int)][:, (centres * shape[1]).astype(int)]
    # Not transposed, not cropped, not wrapped: the ramp is still that ramp, within a source pixel's step.
    step = 250 / min(max(shape[0], 2), max(shape[1], 2)) + 6
    np.testing.assert_allclose(loaded.astype(float), expected, atol=step)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    """Stripes finer than the result's pixels become their mean; picking pixels would keep the stripes."""
    stripes = np.tile(np.array([0, 255], np.uint8), (96, 48))
    loaded = load_gray(save(tmp_path / "x.png", Image.fromarray(stripes)), SIZE)
    np.testing.assert_allclose(loaded[:, 1:-1].astype(float), box_mean(stripes, 4)[:, 1:-1], atol=3)


def test_same_size_is_not_resampled(tmp_path: Path) -> None:
    np.testing.assert_array_equal(load_gray(save(tmp_path / "x.png", Image.fromarray(GRAY)), SIZE), GRAY)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncation_is_found(tmp_path: Path, kind: str) -> None:
    data = encoded(Image.fromarray(GRAY), kind)
    path = tmp_path / "x"
    path.write_bytes(data)
    load_gray(path, SIZE)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=str(path)):
            load_gray(path, SIZE)


def test_every_damaged_png_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """Of an image that compresses well: there Pillow's decoder alone takes wrong pixels for good."""
    pixels = np.add.outer(np.arange(SIZE) // 3 * 20, np.arange(SIZE) // 5 * 3).astype(np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    path = tmp_path / "x"
    taken_by_decoder_alone = 0
    for position in range(len(data)):
        damaged = data[:position] + bytes([data[position] ^ 0x24]) + data[position + 1 :]
        path.write_bytes(damaged)
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            taken_by_decoder_alone += not np.array_equal(np.asarray(Image.open(path)), pixels)
        try:
            loaded = load_gray(path, SIZE)
        except ImageError:
            continue
        np.testing.assert_array_equal(loaded, pixels)
    assert taken_by_decoder_alone > 0  # or this says nothing about the check that we add


def test_damaged_jpeg_never_raises_anything_else(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(GRAY), "JPEG")
    path = tmp_path / "x"
    rng = np.random.default_rng(5)
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ImageError):
            load_gray(path, SIZE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image", "is not a PNG, JPEG, TIFF"),
        (encoded(Image.fromarray(GRAY), "GIF"), "is not a PNG, JPEG, TIFF"),
        (b"\x89PNG\r\n\x1a\n", "is not a PNG, JPEG, TIFF"),
    ],
)
def test_not_an_image(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        load_gray(path, SIZE)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert "replace or remove" in str(caught.value)


def test_unreadable_and_error_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_gray(tmp_path / "missing.png", SIZE)
    with pytest.raises(UserError, match="cannot be read"):
        load_gray(tmp_path, SIZE)


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a/b.png"), "is empty")))
    assert (error.path, error.reason) == (Path("a/b.png"), "is empty")
    assert str(error).startswith("a/b.png: is empty;")


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header, with a good checksum, says that it has so many pixels."""
    data = bytearray(encoded(Image.fromarray(GRAY), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (animated(), "is animated"),
        (claiming(9_500, 9_500), "has 9500 x 9500 pixels"),
        (claiming(60_000, 60_000), "more than 89,478,485 pixels"),
        (claiming(SIZE, 2**31 - 1), "not a PNG, JPEG, TIFF|pixels"),
    ],
)
def test_what_is_refused_with_its_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        load_gray(tmp_path / "x.png", SIZE)


def test_cmyk_and_a_wrong_extension_are_converted(tmp_path: Path) -> None:
    rgb = Image.fromarray(GRAY).convert("RGB")
    path = tmp_path / "x.png"
    path.write_bytes(encoded(rgb.convert("CMYK"), "JPEG"))
    np.testing.assert_allclose(load_gray(path, SIZE).astype(int), GRAY, atol=40)
    assert np.corrcoef(load_gray(path, SIZE).ravel(), GRAY.ravel())[0, 1] > 0.95


def test_a_thousand_malformed_files(tmp_path: Path) -> None:
    """No crash, no hang, and none taken for an image that it is not: a file gives its own pixels or an ImageError."""
    rng = np.random.default_rng(7)
    smooth = np.add.outer(np.arange(48) * 3, np.arange(48) * 2).astype(np.uint8)
    png, jpeg = (encoded(Image.fromarray(smooth), kind) for kind in ("PNG", "JPEG"))
    expected = load_gray(save(tmp_path / "good.png", Image.fromarray(smooth)), SIZE)
    refused = 0
    for number in range(1200):
        kind = number % 6
        data = bytearray(png)
        if kind == 0:  # bytes changed
            for position in rng.integers(8, len(data), rng.integers(1, 9)):
                data[position] ^= rng.integers(1, 256)
        elif kind == 1:  # a piece lost
            start, stop = sorted(rng.integers(0, len(data), 2))
            del data[start : stop + 1]
        elif kind == 2:  # a piece twice, or elsewhere
            start, stop, at = sorted(rng.integers(8, len(data), 3))
            data[at:at] = data[start:stop]
        elif kind == 3:
            data = bytearray(jpeg[: rng.integers(0, len(jpeg))])
        elif kind == 4:  # the right beginning, then anything
            data[rng.integers(4, 40) :] = rng.bytes(200)
        else:
            data = bytearray(rng.bytes(rng.integers(0, 300)))
        path = tmp_path / "x.png"
        path.write_bytes(data)
        try:
            loaded = load_gray(path, SIZE)
        except ImageError:
            refused += 1
            continue
        np.testing.assert_array_equal(loaded, expected, err_msg=f"{number}: taken for something else")
    assert refused > 1000


IMPORTS = """
import sys, warnings
import kornia_rs, numpy, pyarrow.fs, pyarrow.parquet, tqdm
from PIL import Image
before = list(warnings.filters)
import tfrecords_builder.build
sys.exit(list(warnings.filters) != before)
"""


def test_importing_the_builder_changes_nothing_of_the_process() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=Path(__file__).parents[3])


def test_decoding_is_quiet_and_leaves_no_filter() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught, quiet_decoding(), pytest.raises(TooLargeError):
        decode_gray(claiming(9_500, 9_500), Path("x.png"))
    assert not caught
    assert warnings.filters == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TooLargeError):
            decode_gray(claiming(9_500, 9_500), Path("x.png"))
