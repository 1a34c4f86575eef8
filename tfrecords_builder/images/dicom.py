"""Decode a DICOM file to a gray picture: what is refused, and how stored values are found; see `dicom_levels`.

Pixel spacing plays no part. Colour becomes gray by ITU-R 601 luma. A file may lack the preamble and the group 0002
before its data set; it is then uncompressed.

Of what says who the patient is, `patient_id` alone reads one element, for a builder that stores none of it in clear.
No error repeats what a file says.
"""

import functools
import io
import logging
import re
import struct
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.common.installation import install_command
from tfrecords_builder.images.decoded import MAX_PIXELS, Decoded, ImageError, TooLargeError
from tfrecords_builder.images.dicom_levels import Values, shown
from tfrecords_builder.images.gray_levels import declared_range

_MAGIC_AT = 128
MAGIC = b"DICM"
HEAD = _MAGIC_AT + len(MAGIC)
"""Bytes at a file's start that tell whether it is DICOM (PS3.10, section 7.1)."""
_BARE = re.compile(rb"[\x02\x08]\0[\x00-\x20]\0(?:(?:UL|UI|CS|OB)..|..\0\0)", re.DOTALL)
"""The first element of a file that lacks the preamble: group 0002 or 0008, with or without its kind of value."""

_NEEDED = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PresentationLUTShape",
    "PixelData",
)
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_NATIVE = (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN)
_RLE = "1.2.840.10008.1.2.5"
_UID_LIMIT = 64
_PIXEL_DATA = b"\xe0\x7f\x10\0"
_UNDEFINED_LENGTH = 0xFFFFFFFF


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM; `HEAD` bytes are enough."""
    return head[_MAGIC_AT:HEAD] == MAGIC or _BARE.match(head) is not None


def version() -> str:
    """Of pydicom. Raises UserError where it is not installed."""
    return str(_pydicom().__version__)


def patient_id(data: bytes | IO[bytes]) -> str:
    """The element Patient ID of a file; "" where it has none, or cannot be read. Raises UserError as `decode_dicom`."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        dataset = _pydicom().dcmread(stream, specific_tags=["PatientID"], stop_before_pixels=True, force=True)
        return str(dataset.get("PatientID") or "")
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - decoding it says what is wrong
        return ""


def decode_dicom(data: bytes, path: Path) -> Decoded:
    """Decode the bytes of a DICOM file with one picture; `path` is for messages.

    Raises:
        ImageError: It is no DICOM file, damaged, truncated, of several frames, of a kind that is no picture, or
            compressed in a way that needs a decoder which is not installed.
        TooLargeError: It has more than `decode.MAX_PIXELS` pixels.
        UserError: pydicom is not installed.
    """
    pydicom = _pydicom()
    if not is_dicom(data[:HEAD]):
        raise ImageError(path, "is not a DICOM file")
    syntax = _transfer_syntax(data, path)
    try:
        dataset = _elements(data)
        _check_picture(dataset, path)
        syntax = syntax or _assumed_syntax(dataset, path)
        _check_pixel_data(dataset, syntax, path)
        small_range = None
        if dataset.SamplesPerPixel == 3:
            values = pydicom.pixels.pixel_array(dataset, raw=False)
            gray = np.asarray(Image.fromarray(values.astype(np.uint8)).convert("L"))
        else:
            gray, small_range = shown(_stored(dataset, syntax), dataset)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - of damage pydicom raises anything, in words that may name a patient
        raise ImageError(path, f"is a damaged or truncated DICOM file ({type(error).__name__})") from None
    if gray.shape != (dataset.Rows, dataset.Columns):
        raise ImageError(path, "is a damaged DICOM file (its picture has another size than it says)")
    return Decoded(gray, dataset.Columns, dataset.Rows, small_range)


def _elements(data: bytes) -> Any:
    """A data set of the elements that make the picture; plain gray pixels lie where they are in `data`."""
    read = functools.partial(_pydicom().dcmread, specific_tags=list(_NEEDED), force=True)
    stream = io.BytesIO(data)
    dataset = read(stream, stop_before_pixels=True)
    implicit, at = dataset.original_encoding[0], stream.tell()
    start = at + (8 if implicit else 12)
    if data[at : at + 4] != _PIXEL_DATA or dataset.get("SamplesPerPixel", 1) != 1 or len(data) < start:
        return read(io.BytesIO(data))
    (length,) = struct.unpack_from("<I", data, start - 4)
    if length == _UNDEFINED_LENGTH:
        return read(io.BytesIO(data))
    # To read them would copy them: a tenth of the time of everything.
    dataset.add_new("PixelData", "OW", memoryview(data)[start : start + length])
    return dataset


@functools.cache
def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise UserError(
            f"DICOM files need pydicom; install it: {install_command('dicom')}, or give PNG or JPEG"
        ) from None
    # Both would repeat what a file says, names among it.
    warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def _transfer_syntax(data: bytes, path: Path) -> str | None:
    """Its UID, from the group of file meta elements; None in a file without them.

    Before anything else is read: a deflated file could be a bomb.
    """
    at, uid = HEAD if data[_MAGIC_AT:HEAD] == MAGIC else 0, ""
    if data[at : at + 2] != b"\x02\x00":
        return None
    while data[at : at + 2] == b"\x02\x00" and len(data) >= at + 12:
        element, kind = data[at + 2 : at + 4], data[at + 4 : at + 6]
        if kind in (b"OB", b"OW", b"UN", b"SQ", b"UT"):
            (length,), at = struct.unpack_from("<I", data, at + 8), at + 12
        else:
            (length,), at = struct.unpack_from("<H", data, at + 6), at + 8
        if element == b"\x10\x00" and length <= _UID_LIMIT:
            uid = data[at : at + length].decode("ascii", "replace").rstrip("\0 ")
        at += length
    if not uid.replace(".", "").isdigit():
        raise ImageError(path, "is a damaged or truncated DICOM file (it names no transfer syntax)")
    if uid == _DEFLATED:
        raise ImageError(path, "is a deflated DICOM file, whose size is not known before; save it uncompressed")
    return uid


def _assumed_syntax(dataset: Any, path: Path) -> str:
    """Of a file without group 0002, which `dataset` gets: how its elements are written tells, if it is uncompressed."""
    implicit, little = dataset.original_encoding
    if dataset["PixelData"].is_undefined_length:
        raise ImageError(path, "is compressed and lacks group 0002, which names the compression; save it with that")
    syntax = _IMPLICIT if implicit else _EXPLICIT if little else _BIG_ENDIAN
    dataset.file_meta.TransferSyntaxUID = syntax
    return syntax


def _stored(dataset: Any, syntax: str) -> Values:
    """The stored values [H, W] of a gray picture."""
    import pydicom

    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if syntax not in (_IMPLICIT, _EXPLICIT):
        return pydicom.pixels.pixel_array(dataset, raw=False)
    kind = f"<{'i' if dataset.get('PixelRepresentation') else 'u'}{allocated // 8}"
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    values = np.frombuffer(dataset.PixelData, kind, rows * columns).reshape(rows, columns)
    low, high = declared_range(stored, kind[1] == "i")
    if stored < allocated and (values.min() < low or values.max() > high):  # the bits above hold an overlay
        values = (values << (allocated - stored)) >> (allocated - stored)
    return values


def _check_picture(dataset: Any, path: Path) -> None:
    for name in ("Rows", "Columns", "PixelData", "BitsAllocated", "BitsStored", "PhotometricInterpretation"):
        if name not in dataset:
            raise ImageError(path, f"is a DICOM file without a picture, or truncated (no {name})")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise TooLargeError(path, f"has {columns} x {rows} pixels, more than {MAX_PIXELS:,} in all")
    if not rows or not columns:
        raise ImageError(path, "is a DICOM file with an empty picture")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(path, f"has {frames} frames, and which is meant is not known; save one frame as a file")
    samples, photometric = int(dataset.get("SamplesPerPixel") or 1), str(dataset.PhotometricInterpretation)
    dataset.SamplesPerPixel = samples
    if (
        (samples == 1 and photometric not in _GRAY)
        or (samples == 3 and photometric not in _COLOURS)
        or samples not in (1, 3)
    ):
        raise ImageError(path, "is neither MONOCHROME1, MONOCHROME2 nor RGB; save it as one of these")
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (8, 16) or not 1 <= stored <= allocated or (samples == 3 and allocated != 8):
        raise ImageError(path, f"has {stored} of {allocated} bits a sample; save it with 8, or gray with up to 16")


def _check_pixel_data(dataset: Any, syntax: str, path: Path) -> None:
    """That the pixels are there, can be decoded, and come to no more than the file says they are."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    count = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel)
    expected = count * (int(dataset.BitsAllocated) // 8)
    if syntax in _NATIVE:
        subsampled = 2 / 3 if str(dataset.PhotometricInterpretation) == "YBR_FULL_422" else 1
        if len(dataset.PixelData) < expected * subsampled:
            raise ImageError(path, "is a truncated DICOM file (pixels are missing)")
        return
    name = UID(syntax).name
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        raise ImageError(
            path, f"has the transfer syntax {name}, which is not supported; save it uncompressed"
        ) from None
    if not decoder.is_available:
        missing = "; ".join(text.partition(" - ")[0] for text in decoder.missing_dependencies)
        raise ImageError(
            path,
            f"is compressed as {name}, whose decoder is missing ({missing}); install "
            '"pylibjpeg[all]", or save the file uncompressed',
        )
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == _RLE:
        # A run of one byte takes two, and other codes nothing: far more than the picture is padding, or worse.
        if len(frame) > 2 * expected + 1024 or _run_length_bytes(frame) > expected + 64:
            raise TooLargeError(path, "unpacks to more than the picture that it says it is")
    elif _coded_size(frame) != (int(dataset.Columns), int(dataset.Rows)):
        raise ImageError(path, "is a damaged DICOM file (its picture has another size than it says)")


def _run_length_bytes(frame: bytes) -> int:
    """What PackBits would make of a frame (PS3.5, annex G), without making it; all segments as one."""
    (segments,) = struct.unpack_from("<I", frame)
    starts = struct.unpack_from("<15I", frame, 4)[: min(segments, 15)]
    total = 0
    for at, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        while at < end - 1:
            code = frame[at]
            total += code + 1 if code < 128 else 257 - code if code > 128 else 0
            at += code + 2 if code < 128 else 2 if code > 128 else 1
    return total


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG, JPEG-LS or JPEG 2000 stream; None where there is none."""
    codestream = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= codestream < 256 and not frame.startswith(b"\xff\xd8"):
        right, bottom, left, top = struct.unpack_from(">4I", frame, codestream + 8)
        return right - left, bottom - top
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">2H", frame, at + 5)
            return width, height
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None
