"""The COVID-19 Radiography Database as a builder of TensorFlow Datasets, for those who use nothing else of ours.

    import tensorflow_datasets as tfds
    import tfrecords_builder.tfds_builder  # registers it

    tfds.load("covid19_radiography", data_dir=..., split="train", download_and_prepare_kwargs=...)

The same records and the published split (70/15/15 of each class). It is slower than `cxr-dist build`, and looks for no
images that show the same: for both, build with that and read with `tfds.builder_from_directory`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds

from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.collection.download import FOLDER
from tfrecords_builder.collection.find import SourceImage, class_counts
from tfrecords_builder.format.record import IMAGE, INDEX, LABEL, MASK, PATH
from tfrecords_builder.format.tfds_files import CITATION, VERSION
from tfrecords_builder.images.decode import decode_mask, load_gray, read_bytes
from tfrecords_builder.splitting.splits import SPLITS, assign_splits

CLASS_NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")


class SizeConfig(tfds.core.BuilderConfig):
    """The side of the stored images, whether lung masks are stored, and the classes, if not the database's."""

    def __init__(
        self, *, image_size: int, masks: bool = False, class_names: tuple[str, ...] = CLASS_NAMES, **named: Any
    ) -> None:
        super().__init__(**named)
        self.image_size, self.masks, self.class_names = image_size, masks, class_names


class Covid19Radiography(tfds.core.GeneratorBasedBuilder):
    """Chest X-rays of four classes, as gray squares."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [  # noqa: RUF012
        SizeConfig(name="px224", description="224 x 224 pixels", image_size=224),
        SizeConfig(name="px224_masks", description="224 x 224 pixels, with lung masks", image_size=224, masks=True),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download the COVID-19 Radiography Database from Kaggle (cxr-dist download does) and put its folder "
        f"{FOLDER}, which holds one folder per class, into the manual directory."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.builder_config.image_size, self.builder_config.image_size, 1)
        masks = {MASK: tfds.features.Image(shape=shape, encoding_format="png")} if self.builder_config.masks else {}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    IMAGE: tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES),
                    LABEL: tfds.features.ClassLabel(names=list(self.builder_config.class_names)),
                    PATH: tfds.features.Text(),
                    INDEX: np.int64,
                    **masks,
                }
            ),
            supervised_keys=(IMAGE, LABEL),
            citation=CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        source = Path(dl_manager.manual_dir) / FOLDER
        found = find_images(source)
        if tuple(class_counts(found)) != self.builder_config.class_names:
            raise ValueError(f"{source}: has the classes {list(class_counts(found))}")
        split_of = assign_splits({image.path: image.class_name for image in found}, seed=0)
        numbered = list(enumerate(found))
        return {
            split: self._generate_examples(
                source, [(number, image) for number, image in numbered if split_of[image.path] == split]
            )
            for split in SPLITS
        }

    def _generate_examples(
        self, source: Path, images: list[tuple[int, SourceImage]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        size = self.builder_config.image_size
        for number, image in images:
            pixels = self._image(source / image.path, size)
            record = {IMAGE: pixels[..., None], LABEL: image.class_name, PATH: image.path, INDEX: number}
            if self.builder_config.masks:
                record[MASK] = self._mask(source, image, size)[..., None]
            yield image.path, record

    @staticmethod
    def _image(path: Path, size: int) -> npt.NDArray[np.uint8]:
        return load_gray(path, size)

    @staticmethod
    def _mask(source: Path, image: SourceImage, size: int) -> npt.NDArray[np.uint8]:
        """0 and 255; all 0 for an image without a mask."""
        if image.mask is None:
            return np.zeros((size, size), np.uint8)
        path = source / image.mask
        return np.where(decode_mask(read_bytes(path), size, path), np.uint8(255), np.uint8(0))
