"""DICOM files, made here, give the picture that the standard says, or one line that names no patient."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images import dicom
from tfrecords_builder.images.decoded import ImageError, TooLargeError

PATIENT = "Doe^Jane"
PATH = Path("a.dcm")


def dicom_bytes(
    values: np.ndarray,
    photometric: str = "MONOCHROME2",
    bits: int | None = None,
    syntax: str = ExplicitVRLittleEndian,
    pixel_data: bytes | None = None,
    **elements: Any,
) -> bytes:
    """A DICOM file with `values` as its stored values."""
    coding = {"is_implicit_VR": syntax == ImplicitVRLittleEndian, "is_little_endian": syntax != ExplicitVRBigEndian}
    dataset = FileDataset(PATH, Dataset(), preamble=b"\0" * 128, file_meta=FileMetaDataset(), **coding)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = PATIENT, "4711"
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel = 3 if values.ndim == 3 else 1
    if values.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * values.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = raw if pixel_data is None else pixel_data
    dataset["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    if pixel_data is not None:
        dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return dicom.decode_dicom(data, PATH).gray


def noise(dtype: str, low: int, high: int, shape: tuple[int, ...] = (37, 52)) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape, dtype=dtype)


def to_gray(fraction: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(fraction, 0, 1) * 255 + 0.5)


def close(picture: np.ndarray, expected: np.ndarray) -> bool:
    """Within a gray level: float32 here, float64 there."""
    return picture.dtype == np.uint8 and bool(np.abs(picture.astype(int) - expected).max() <= 1)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_plain_8_bit_gray_comes_as_it_is(syntax: str) -> None:
    values = noise("uint8", 0, 256)
    data = dicom_bytes(values, syntax=syntax)
    assert dicom.is_dicom(data[: dicom.HEAD])
    found = dicom.decode_dicom(data, PATH)
    np.testing.assert_array_equal(found.gray, values)
    assert (found.width, found.height) == (52, 37)


def test_monochrome1_and_2_show_the_same() -> None:
    values = noise("uint16", 0, 4096)
    second = decode(dicom_bytes(values, bits=12, WindowCenter=1500, WindowWidth=1800))
    first = decode(dicom_bytes(4095 - values, "MONOCHROME1", 12, WindowCenter=4095 - 1500 + 1, WindowWidth=1800))
    assert close(first, second)
    assert second.min() == 0
    assert second.max() == 255
    plain = noise("uint8", 0, 256)
    np.testing.assert_array_equal(decode(dicom_bytes(255 - plain, "MONOCHROME1")), plain)


@pytest.mark.parametrize("center", [1000, -200.5, [1000, 40]])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_12_bit_signed_values_with_rescale_and_the_first_window(center: Any, function: str | None) -> None:
    values = noise("int16", -2048, 2048)
    widths = [700, 80] if isinstance(center, list) else 700
    elements = {"WindowCenter": center, "WindowWidth": widths, "RescaleSlope": 1.5, "RescaleIntercept": -24}
    found = decode(dicom_bytes(values, bits=12, **elements, **({"VOILUTFunction": function} if function else {})))
    x = values.astype(np.float64) * 1.5 - 24
    c, w = (center[0] if isinstance(center, list) else center), 700
    if function == "SIGMOID":
        expected = 1 / (1 + np.exp(-4 * (x - c) / w))
    elif function == "LINEAR_EXACT":
        expected = np.where(x <= c - w / 2, 0, np.where(x > c + w / 2, 1, (x - c) / w + 0.5))
    else:
        ramp = (x - (c - 0.5)) / (w - 1) + 0.5
        expected = np.where(x <= c - 0.5 - (w - 1) / 2, 0, np.where(x > c - 0.5 + (w - 1) / 2, 1, ramp))
    assert close(found, to_gray(expected))
    assert len(np.unique(found)) > 20


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint16", 0, 4096), ("int16", -2048, 2048)])
@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_without_a_window_the_declared_range_is_shown(dtype: str, low: int, high: int, slope: float) -> None:
    """Not that of the pixels: half the values give half the brightness."""
    values = noise(dtype, low, (low + high) // 2)
    found = decode(dicom_bytes(values, bits=12, RescaleSlope=slope, RescaleIntercept=7))
    fraction = (values.astype(np.float64) - low) / (high - 1 - low)
    assert close(found, to_gray(fraction if slope > 0 else 1 - fraction))


def lut(table: list[int], first: int, depth: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(table), first, depth]
    item.LUTData = table
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    return item


def test_lookup_tables() -> None:
    values = noise("uint16", 0, 4096)
    table = [int(4095 * (index / 2047) ** 2) for index in range(2048)]
    fraction = np.array(table)[np.clip(values.astype(int) - 1000, 0, 2047)] / 4095
    voi = decode(dicom_bytes(values, bits=12, VOILUTSequence=[lut(table, 1000, 12)], WindowCenter=5, WindowWidth=9))
    assert close(voi, to_gray(fraction)), "a table goes before a window"
    assert close(decode(dicom_bytes(values, bits=12, ModalityLUTSequence=[lut(table, 1000, 12)])), to_gray(fraction))


def test_colour_becomes_luma() -> None:
    values = noise("uint8", 0, 256, (37, 52, 3))
    np.testing.assert_array_equal(decode(dicom_bytes(values, "RGB")), np.asarray(Image.fromarray(values).convert("L")))
    full = np.asarray(Image.fromarray(values).convert("YCbCr"))
    assert np.abs(decode(dicom_bytes(full, "YBR_FULL")).astype(int) - full[..., 0]).max() <= 2


def compressed(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return encapsulate([buffer.getvalue()])


def test_compressed_pixels() -> None:
    values = np.asarray(Image.fromarray(noise("uint8", 0, 256)).resize((64, 40)))
    image = Image.fromarray(values)
    jpeg = compressed(image, "JPEG", quality=95)
    assert np.abs(decode(dicom_bytes(values, syntax=JPEGBaseline8Bit, pixel_data=jpeg)).astype(int) - values).max() < 20
    lossless = compressed(image, "JPEG2000", no_jp2=True)
    np.testing.assert_array_equal(decode(dicom_bytes(values, syntax=JPEG2000Lossless, pixel_data=lossless)), values)
    for array in (values, noise("uint16", 0, 65536)):
        import pydicom

        plain = pydicom.dcmread(io.BytesIO(dicom_bytes(array)))
        plain.compress(RLELossless)
        buffer = io.BytesIO()
        plain.save_as(buffer)
        np.testing.assert_array_equal(decode(buffer.getvalue()), decode(dicom_bytes(array)))


def small() -> np.ndarray:
    return noise("uint8", 0, 256, (8, 8))


def test_what_is_refused() -> None:
    bomb = compressed(Image.new("L", (5000, 4000)), "JPEG")
    # One segment of runs: 2 bytes become 128.
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 400
    # Codes that make nothing: nothing when unpacked, and slow to walk through.
    padding = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x80" * 5000
    cases = {
        "2 frames": dicom_bytes(small(), NumberOfFrames=2),
        "MONOCHROME1, MONOCHROME2 nor RGB": dicom_bytes(small(), "PALETTE COLOR"),
        "bits a sample": dicom_bytes(noise("uint32", 0, 9, (8, 8))),
        r"pylibjpeg.*install": dicom_bytes(small(), syntax=JPEGLosslessSV1, pixel_data=encapsulate([b"\xff\xd8" * 9])),
        "MPEG2.*not supported": dicom_bytes(small(), syntax=MPEG2MPML, pixel_data=encapsulate([b"12"])),
        "deflated": dicom_bytes(small(), syntax=DeflatedExplicitVRLittleEndian),
        "pixels are missing": dicom_bytes(small(), Rows=9),
        "an empty picture": dicom_bytes(small(), Rows=0),
        "another size": dicom_bytes(small(), syntax=JPEGBaseline8Bit, pixel_data=bomb),
        "unpacks to more": dicom_bytes(small(), syntax=RLELossless, pixel_data=encapsulate([runs])),
        "unpacks to more than": dicom_bytes(small(), syntax=RLELossless, pixel_data=encapsulate([padding])),
        "more than 89,478,485": dicom_bytes(small(), Rows=65535, Columns=65535),
        "not a DICOM": b"\0" * 300,
        "damaged": dicom_bytes(small(), WindowCenter=5, WindowWidth=-3),
        "truncated": dicom_bytes(small(), RescaleSlope=0, RescaleIntercept=0),
    }
    for words, data in cases.items():
        with pytest.raises(ImageError, match=words) as caught:
            decode(data)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, TooLargeError) == words.startswith(("more", "unpacks")), words


def test_truncated_and_flipped_files_are_the_users_to_mend_and_name_no_patient(capfd: Any) -> None:
    data = dicom_bytes(small(), WindowCenter=100, WindowWidth=90, StudyDate="no date " + PATIENT)
    for length in range(0, len(data) - 1, 3):
        with pytest.raises(ImageError) as caught:
            decode(data[:length])
        assert "Doe" not in str(caught.value)
    rng = np.random.default_rng(1)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[int(rng.integers(128, len(data) - 70))] ^= 1 << int(rng.integers(8))
        try:
            said = str(decode(bytes(flipped)).shape)
        except ImageError as error:
            said = str(error)
        assert "Doe" not in said
    captured = capfd.readouterr()
    assert "Doe" not in captured.out + captured.err


def test_without_pydicom_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    with pytest.raises(UserError, match=r"\[dicom\]") as caught:
        decode(dicom_bytes(small()))
    assert not isinstance(caught.value, ImageError)
    monkeypatch.undo()
    decode(dicom_bytes(small()))


RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
def test_a_picture_is_inverted_once(photometric: str, shape: str | None) -> None:
    """MONOCHROME1 with INVERSE is the usual pair: not twice."""
    elements = {"PresentationLUTShape": shape} if shape else {}
    inverted = photometric == "MONOCHROME1" or shape == "INVERSE"
    np.testing.assert_array_equal(decode(dicom_bytes(RAMP, photometric, **elements)), 255 - RAMP if inverted else RAMP)


def bare(data: bytes, syntax: str, preamble: bool = False, group2: bool = False) -> bytes:
    """A file without what comes before its data set, or without some of it."""
    end = HEAD_BYTES + 12 + struct.unpack_from("<I", data, HEAD_BYTES + 8)[0]
    return (data[:HEAD_BYTES] if preamble else b"") + (data[HEAD_BYTES:end] if group2 else b"") + data[end:]


HEAD_BYTES = dicom.HEAD


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize(("preamble", "group2"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_files_without_preamble_or_group_0002(syntax: str, preamble: bool, group2: bool, dtype: str) -> None:
    data = dicom_bytes(noise(dtype, 0, 256), syntax=syntax, SOPClassUID=SecondaryCaptureImageStorage)
    less = bare(data, syntax, preamble, group2)
    assert dicom.is_dicom(less[: dicom.HEAD])
    np.testing.assert_array_equal(decode(less), decode(data))
    assert dicom.patient_id(less) == "4711"


def test_compressed_pixels_need_group_0002() -> None:
    jpeg = compressed(Image.fromarray(small()), "JPEG")
    data = dicom_bytes(small(), syntax=JPEGBaseline8Bit, pixel_data=jpeg, SOPClassUID=SecondaryCaptureImageStorage)
    with pytest.raises(ImageError, match="lacks group 0002, which names the compression; save it with that"):
        decode(bare(data, JPEGBaseline8Bit))


def test_bits_above_those_stored_are_left_out() -> None:
    for dtype, low, high in (("uint16", 0, 4096), ("int16", -2048, 2048)):
        values = noise(dtype, low, high)
        overlaid = (values.view(np.uint16) & 0x0FFF) | np.uint16(0x9000)
        data = dicom_bytes(overlaid.view(dtype), bits=12)
        np.testing.assert_array_equal(decode(data), decode(dicom_bytes(values, bits=12)))


def test_patient_id() -> None:
    assert dicom.patient_id(dicom_bytes(small())) == "4711"
    assert dicom.patient_id(dicom_bytes(small(), PatientID="")) == ""
    assert dicom.patient_id(b"\0" * 500) == ""
