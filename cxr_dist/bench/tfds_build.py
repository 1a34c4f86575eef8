"""The baseline of `bench build`: TensorFlow Datasets' own builder, writing the records that ours writes."""

import logging
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds
from PIL import Image

from tfrecords_builder.collection.download import FOLDER
from tfrecords_builder.images.resizing import RESAMPLING
from tfrecords_builder.tfds_builder import Covid19Radiography, SizeConfig


class PlainlyDecoded(Covid19Radiography):
    """As its users would write it: each image decoded by Pillow."""

    @staticmethod
    def _image(path: Path, size: int) -> npt.NDArray[np.uint8]:
        return np.asarray(Image.open(path).convert("L").resize((size, size), RESAMPLING))


def build(source: Path, work: Path, image_size: int, class_names: tuple[str, ...]) -> float:
    """Seconds that `download_and_prepare` takes for the images of `source`."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    manual = work / "manual"
    manual.mkdir(parents=True)
    (manual / FOLDER).symlink_to(source.resolve())
    config = SizeConfig(name="bench", image_size=image_size, class_names=class_names)
    builder = PlainlyDecoded(data_dir=str(work / "data"), config=config)
    begun = time.perf_counter()
    with redirect_stdout(sys.stderr):  # it tells people what it does, and stdout may be read by a script
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual)))
    return time.perf_counter() - begun
