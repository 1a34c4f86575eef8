"""DICOM files to measure on, as detectors make them: uncompressed, 16 bits, 2,000 x 2,000 pixels."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

SIDE = 2000
_CLASSES = 4


def write_dicom_files(folder: Path, images: int, seed: int = 0, side: int = SIDE) -> Path:
    """So many in `folder`, one folder a class; waves with noise, of which no two are near-duplicates."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    noise = rng.normal(0, 800, (side, side)).astype(np.float32)
    for number in range(images):
        name = f"class_{number % _CLASSES}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        a, b, c, d = rng.uniform(2, 12, 4)
        values = 32_000 + 28_000 * np.sin(a * x + b * y) * np.cos(c * x - d * y) + noise
        _write(folder / name / f"{side}-{number:05d}.dcm", np.clip(values, 0, 65_535).astype(np.uint16), number)
    return folder


def _write(path: Path, values: npt.NDArray[np.uint16], number: int) -> None:
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
    file.PatientID = f"drawn {number}"
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 0
    file.PixelData = values.tobytes()
    file.save_as(path, enforce_file_format=True)
