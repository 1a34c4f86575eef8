"""One picture in any format gives one record, and samples of more than 8 bits become gray by one rule."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_dist.data.image_files import decode_square
from tests.tfrecords_builder.images.test_dicom import dicom_bytes, lut
from tfrecords_builder.images import decode as images
from tfrecords_builder.images.decode import decode_gray, decode_mask
from tfrecords_builder.images.decoded import Decoded, ImageError, SmallRange
from tfrecords_builder.images.gray_levels import declared_range, scaled_to, shown_range

PATH = Path("x")
SIDE = 48


def png16(samples: np.ndarray, significant: int | None = None, colour: int = 0) -> bytes:
    """A 16-bit PNG, with the chunk sBIT where `significant` is given."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    bits = chunk(b"sBIT", bytes([significant])) if significant else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + bits + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(samples: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(top: int, low: float = 0.0) -> np.ndarray:
    """Samples from `low` * `top` to `top`: slopes, an edge and noise."""
    y, x = np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE] / (2 * SIDE)
    shape = 0.5 + 0.25 * np.sin(9 * x) + 0.25 * y - 0.4 * ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.05)
    shape = shape + np.random.default_rng(0).normal(0, 0.03, shape.shape)
    shape = (shape - shape.min()) / (shape.max() - shape.min())
    return np.round((low + (1 - low) * shape) * top).astype(np.uint8 if top < 256 else np.uint16)


def export(study: bytes, kind: str, bits: int) -> bytes:
    """What a workstation exports: the shown gray levels, of 8 bits, or of 16 with all of them used."""
    shown = decode_gray(study, PATH).gray
    if bits == 8:
        return saved(shown, kind)
    wide = shown.astype(np.uint16) * 257
    return png16(wide) if kind == "PNG" else saved(wide, kind)


WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"WindowCenter": 0.55, "WindowWidth": 0.5},
    "two windows": {"WindowCenter": [0.25, 0.5], "WindowWidth": [0.4, 1]},
    "sigmoid": {"WindowCenter": 0.5, "WindowWidth": 0.7, "VOILUTFunction": "SIGMOID"},
    "rescale": {"RescaleSlope": 0.5, "RescaleIntercept": -100},
    "negative slope": {"RescaleSlope": -2, "RescaleIntercept": 30},
    "inverse": {"PresentationLUTShape": "INVERSE"},
}


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_dicom_and_its_exports_give_one_record(bits: int, photometric: str, window: str) -> None:
    top = (1 << bits) - 1
    elements = dict(WINDOWS[window])
    for name in ("WindowCenter", "WindowWidth"):
        if name in elements:
            elements[name] = (np.array(elements[name]) * top).tolist()
    study = dicom_bytes(picture(top), photometric, bits, **elements)
    record = decode_square(study, SIDE, PATH).astype(int)
    assert record.std() > 20
    for kind in ("PNG", "TIFF"):
        for depth in (8, 16):
            exported = decode_square(export(study, kind, depth), SIDE, PATH).astype(int)
            assert np.abs(exported - record).max() <= 1, (kind, depth)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_samples_of_a_dicom_give_one_record_in_every_format(bits: int) -> None:
    """Not what is shown, but what is stored, in files that say as much of it as their format can."""
    top = (1 << bits) - 1
    samples = picture(top)
    record = decode_square(dicom_bytes(samples, bits=bits), SIDE, PATH).astype(int)
    files = {"TIFF": saved(samples, "TIFF"), "LZW": saved(samples, "TIFF", compression="tiff_lzw")}
    if bits == 8:
        files |= {"PNG": saved(samples, "PNG"), "BMP": saved(samples, "BMP")}
        files["WEBP"] = saved(samples, "WEBP", lossless=True)
    else:
        files |= {"PNG": png16(samples), "sBIT": png16(samples, bits)}
        files["big endian"] = saved(samples.astype(">u2"), "TIFF")
    for kind, data in files.items():
        assert np.abs(decode_square(data, SIDE, PATH).astype(int) - record).max() <= 1, kind


def test_16_bits_become_gray_as_before_where_the_range_is_used() -> None:
    samples = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    expected = (samples.astype(np.int64) * 255 + 32_767) // 65_535
    np.testing.assert_array_equal(decode_gray(png16(samples), PATH).gray, expected)
    np.testing.assert_array_equal(decode_gray(saved(samples, "TIFF"), PATH).gray, expected)
    for bits in (9, 10, 12, 14):
        some = samples[: 1 << (bits - 8)]
        exact = (some.astype(np.int64) * 255 * 2 + (1 << bits) - 1) // (2 * (1 << bits) - 2)
        np.testing.assert_array_equal(scaled_to(some, declared_range(bits)), exact)


@pytest.mark.parametrize(
    ("least", "most", "bits", "signed", "ends"),
    [
        (0, 65_535, 16, False, (0, 65_535)),
        (0, 4_096, 16, False, (0, 65_535)),
        (0, 4_095, 16, False, (0, 4_095)),
        (0, 256, 16, False, (0, 4_095)),
        (0, 255, 16, False, (0, 255)),
        (0, 3, 16, False, (0, 255)),
        (0, 256, 12, False, (0, 4_095)),
        (0, 255, 12, False, (0, 255)),
        (0, 9, 11, False, (0, 2_047)),
        (0, 1_023, 14, False, (0, 1_023)),
        (0, 9, 8, False, (0, 255)),
        (-2_049, 2_047, 16, True, (-32_768, 32_767)),
        (-2_048, 2_047, 16, True, (-2_048, 2_047)),
        (0, 4_095, 16, True, (0, 4_095)),
        (-128, 127, 16, True, (-128, 127)),
        (0, 255, 16, True, (0, 255)),
    ],
)
def test_the_rule(least: int, most: int, bits: int, signed: bool, ends: tuple[int, int]) -> None:
    assert shown_range(np.array([[least, most]]), bits, signed) == ends


def small_range(data: bytes) -> tuple[Decoded, SmallRange | None]:
    decoded = decode_gray(data, PATH)
    return decoded, decoded.small_range


def test_12_bits_in_16() -> None:
    """The case t5: near black, in 12 gray levels, before there was a rule."""
    samples = picture(4095)
    expected = decode_gray(saved(picture(255), "PNG"), PATH).gray.astype(int)
    for data, stretched in (
        (png16(samples), SmallRange.STRETCHED),
        (png16(samples, 12), None),
        (png16(samples << 4 | samples >> 8, 12), None),  # as the PNG specification asks
        (png16(picture(65_535)), None),
        (saved(samples, "TIFF"), SmallRange.STRETCHED),
        (dicom_bytes(samples, bits=16), SmallRange.STRETCHED),
        (dicom_bytes(samples, bits=12), None),
        (dicom_bytes(samples.astype(np.int16), bits=16), SmallRange.STRETCHED),
    ):
        decoded, found = small_range(data)
        assert found == stretched
        assert np.abs(decoded.gray.astype(int) - expected).max() <= 1
        assert len(np.unique(decoded.gray)) > 200
    windowed = dicom_bytes(samples, bits=16, WindowCenter=2048, WindowWidth=4096)
    assert small_range(windowed)[1] is None, "the file says how to show it"
    assert small_range(dicom_bytes(samples, bits=16, ModalityLUTSequence=[lut([0, 4095], 0, 12)]))[1] is None


def test_a_wide_colour_picture_of_a_small_range_is_reported() -> None:
    colour = np.repeat(picture(4095)[..., None], 3, axis=2)
    assert small_range(png16(colour, colour=2))[1] is SmallRange.KEPT
    assert small_range(png16(np.minimum(colour, 4095) * 16, colour=2))[1] is None
    black = saved(np.zeros((8, 8, 3), np.uint8), "PNG")
    assert small_range(black)[1] is None, "8 bits are as they are"


def test_significant_bits_say_nothing_of_8_bits() -> None:
    data = saved(picture(255), "PNG")
    at = data.index(b"IDAT") - 4
    chunk = b"sBIT" + bytes([7])
    with_bits = data[:at] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    np.testing.assert_array_equal(decode_gray(with_bits, PATH).gray, decode_gray(data, PATH).gray)


def test_a_mask_of_16_bits_with_values_of_8() -> None:
    inside = np.eye(16, dtype=np.uint16)
    np.testing.assert_array_equal(decode_mask(png16(inside * 255), 16, PATH), inside.astype(bool))


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_tiff_with_white_as_zero(kind: str) -> None:
    samples = picture(255).astype(kind) * (257 if kind == "uint16" else 1)
    data = bytearray(saved(samples, "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8] = 0
    np.testing.assert_array_equal(decode_gray(bytes(data), PATH).gray, 255 - picture(255))


def test_tiff_colour_orientation_and_what_is_refused() -> None:
    colour = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_gray(saved(colour, "TIFF"), PATH).gray, Image.fromarray(colour).convert("L"))
    turned = decode_gray(saved(picture(255), "TIFF", tiffinfo={274: 3}), PATH).gray
    np.testing.assert_array_equal(turned, picture(255)[::-1, ::-1])
    pages = [Image.fromarray(picture(255)) for _ in range(3)]
    for kind, word in (("TIFF", "several pages, and which of the 3 is meant"), ("WEBP", "animated")):
        buffer = io.BytesIO()
        pages[0].save(buffer, kind, save_all=True, append_images=[Image.fromarray(picture(250)), pages[2]])
        with pytest.raises(ImageError, match=word):
            decode_gray(buffer.getvalue(), PATH)
    for wide in (picture(255).astype(np.float32), picture(255).astype(np.int32)):
        with pytest.raises(ImageError, match="8 to 16 bits"):
            decode_gray(saved(wide, "TIFF"), PATH)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {}),
    ],
)
def test_truncated_and_damaged_files_raise_image_errors(kind: str, options: dict[str, Any]) -> None:
    data = saved(picture(255)[:24, :24], kind, **options)
    whole = decode_gray(data, PATH).gray
    rng = np.random.default_rng(2)
    with images.quiet_decoding():
        for length in range(len(data)):
            try:
                np.testing.assert_array_equal(decode_gray(data[:length], PATH).gray, whole)
            except ImageError:
                continue
        for _ in range(200):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 2):
                damaged[position] ^= int(rng.integers(1, 256))
            try:
                decode_gray(bytes(damaged), PATH)
            except ImageError:
                continue
