"""The quick decoder against Pillow, an implementation of its own."""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st
from PIL import Image, PngImagePlugin

from tfrecords_builder.images.png import SIGNATURE, decode_plain_gray

MANY = 1 << 20


def encoded(pixels: npt.NDArray[np.uint8], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(pixels: npt.NDArray[np.uint8], filters: list[int], pieces: int) -> bytes:
    """A PNG whose rows use the given filters (section 9.2), its stream cut into several chunks."""
    height, width = pixels.shape
    padded = np.zeros((height + 1, width + 1), np.int64)
    padded[1:, 1:] = pixels
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    slope = left + up - corner
    distances = np.stack([abs(slope - left), abs(slope - up), abs(slope - corner)])
    paeth = np.choose(distances.argmin(0), [left, up, corner])
    predicted = np.stack([np.zeros_like(left), left, up, (left + up) // 2, paeth])
    rows = [
        bytes([kind]) + ((pixels[row] - predicted[kind, row]) % 256).astype(np.uint8).tobytes()
        for row, kind in enumerate(filters)
    ]
    stream = zlib.compress(b"".join(rows))
    step = -(-len(stream) // pieces)
    parts = [chunk(b"IDAT", stream[start : start + step]) for start in range(0, len(stream), step)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return SIGNATURE + header + b"".join(parts) + chunk(b"IEND", b"")


@given(data=st.data())
def test_every_filter_and_shape_as_pillow_reads_them(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 2**32 - 1))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    filters = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    png = filtered(pixels, filters, data.draw(st.integers(1, 4)))
    decoded = decode_plain_gray(png, MANY)
    assert decoded is not None
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)


GRAY = np.random.default_rng(1).integers(0, 256, (9, 7), dtype=np.uint8)


def with_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "tiff:Orientation")
    return encoded(GRAY, pnginfo=text)


@pytest.mark.parametrize(
    "png",
    [
        encoded(np.stack([GRAY] * 3, axis=-1)),
        encoded(GRAY > 127),
        encoded(GRAY.astype(np.uint16) * 257),
        encoded(GRAY, transparency=3),
        encoded(GRAY, save_all=True, append_images=[Image.fromarray(255 - GRAY)]),
        with_text(),
        b"",
        SIGNATURE,
        b"\xff\xd8\xff" + bytes(40),
    ],
    ids=["colour", "one bit", "16 bit", "transparency", "animated", "text", "empty", "signature", "JPEG"],
)
def test_anything_else_is_left_to_others(png: bytes) -> None:
    assert decode_plain_gray(png, MANY) is None


def test_more_pixels_than_allowed_are_not_decoded() -> None:
    assert decode_plain_gray(encoded(GRAY), GRAY.size) is not None
    assert decode_plain_gray(encoded(GRAY), GRAY.size - 1) is None


@pytest.mark.parametrize("lines", [0, 4, 8])
def test_too_few_lines_behind_a_good_checksum(lines: int) -> None:
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in GRAY[:lines]))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 9, 8, 0, 0, 0, 0))
    assert decode_plain_gray(SIGNATURE + header + chunk(b"IDAT", stream) + chunk(b"IEND", b""), MANY) is None
