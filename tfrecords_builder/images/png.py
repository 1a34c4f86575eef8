"""PNG files: whether one is whole, and the plain gray ones decoded quickly.

X-rays come as 8-bit gray PNG with nothing but pixels in it. For those the Rust decoder behind `kornia_rs` takes a
third of Pillow's time and gives the same pixels (the format is lossless). Whatever else a PNG may hold is for Pillow.
"""

import struct
import zlib

import kornia_rs
import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# The chunks that say nothing of how the pixels lie. Text is not among them: it may hold an orientation.
_PLAIN = frozenset((b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD"))
_IHDR = struct.Struct(">II5s")
_EIGHT_BIT_GRAY = bytes((8, 0, 0, 0, 0))
"""Bit depth, colour type, compression, filter and interlace method (PNG specification, section 11.2.1)."""


def check_chunks(data: bytes) -> set[bytes]:
    """The kinds of chunk in a PNG, when each has its CRC, up to the end that must be there (section 5.3).

    Pillow's decoder checks no CRC of the pixel data, and does without the end of the file. Its `verify` checks the
    former, for ten times the time, and leaves an object that must be opened again.

    Raises:
        EOFError, ValueError: What is wrong.
    """
    position = len(SIGNATURE)
    view = memoryview(data)
    kinds: set[bytes] = set()
    kind = b""
    while kind != b"IEND":
        if len(data) < position + 8:
            raise EOFError("the end is missing")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if len(data) < end + 4:
            raise EOFError("the end is missing")
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[position + 4 : end]) != crc:
            raise ValueError(f"broken checksum in {kind!a}")
        kinds.add(kind)
        position = end + 4
    return kinds


def decode_plain_gray(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """The pixels, uint8 [height, width], of a whole 8-bit gray PNG with nothing beside them; None for anything else.

    None is no verdict: another decoder may read the file, or say what is wrong with it. The Adler-32 inside the
    compressed stream is not compared; the CRCs around it, which are, cover the same bytes.
    """
    if not data.startswith(SIGNATURE) or len(data) < 33:
        return None
    width, height, rest = _IHDR.unpack_from(data, 16)
    if data[12:16] != b"IHDR" or rest != _EIGHT_BIT_GRAY or not 0 < width * height <= max_pixels:
        return None
    try:
        if not check_chunks(data) <= _PLAIN:
            return None
        pixels: npt.NDArray[np.uint8] = kornia_rs.io.decode_image_png_u8(data, (height, width), "mono")
    except Exception:  # noqa: BLE001 - the decoder raises nothing more specific
        return None
    return pixels[..., 0]


def significant_bits(data: bytes) -> int | None:
    """What the chunk sBIT of a whole gray PNG says (section 11.3.3.4), from 8 bits on; None where it says nothing."""
    position = len(SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (b"IDAT", b"IEND"):
            return None
        if kind == b"sBIT":
            bits = data[position + 8] if length else 0
            return bits if 8 <= bits < data[24] else None
        position += 12 + length
