"""Labelled image files of a folder, read by position as the shards of a dataset are."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_dist.data.arrays import weak_numpy_function
from cxr_dist.data.batch_sampler import Positions
from cxr_dist.runs.seen_images import Digests, digests_of
from tfrecords_builder.collection.collect import read_collection
from tfrecords_builder.collection.file_kinds import may_be_dicom
from tfrecords_builder.collection.metadata import Metadata, normalized_patient
from tfrecords_builder.collection.patient_codes import patient_key
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.images.decode import decode_mask, load_gray, read_bytes
from tfrecords_builder.images.dicom import patient_id
from tfrecords_builder.splitting.near_duplicates import equal_pairs, group_of


class FolderSource:
    """Labelled image files, decoded when they are read: uint8 [B, S, S, 1]."""

    def __init__(self, folder: Path, class_names: tuple[str, ...], image_size: int) -> None:
        """Raises UserError for a class that `class_names` lacks, and for metadata that cannot be read."""
        collection = read_collection(folder)
        images = list(collection.images)
        unknown = sorted({image.class_name for image in images} - set(class_names))
        if unknown:
            raise UserError(
                f"{folder}: class {unknown[0]} is not one of the run's ({', '.join(class_names)}); rename or remove it"
            )
        self._found, self.paths = images, [image.path for image in images]
        self._folder, self._image_size = folder, image_size
        self._labels = np.array([class_names.index(image.class_name) for image in images], dtype=np.int32)
        self._metadata = collection.metadata
        self.failure: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels

    @property
    def groups(self) -> list[str]:
        """Of each image, the path of the first image of its group: identical files, or images of one patient."""
        pairs = [*equal_pairs(self._sha256), *equal_pairs(self.patient_names)]
        return [self.paths[first] for first in group_of(self.count, pairs)]

    @property
    def digests(self) -> Digests:
        """As `ShardSource.digests`."""
        return digests_of(self._sha256)

    @cached_property
    def _sha256(self) -> list[str]:
        return [hashlib.sha256(read_bytes(self._folder / path)).hexdigest() for path in self.paths]

    @cached_property
    def patient_names(self) -> list[str | None]:
        """As `ShardSource.patient_names`."""
        known = [self._metadata.get(path, Metadata()).patient for path in self.paths]
        names = [None if name is None else normalized_patient(name) for name in known]
        unknown = [n for n, path in enumerate(self.paths) if names[n] is None and may_be_dicom(Path(path).name)]
        key = patient_key() if unknown else None
        for number in unknown:
            with (self._folder / self.paths[number]).open("rb") as file:
                names[number] = key.code(patient_id(file)) if key else None
        return names

    def batches(self, positions: Any) -> Any:
        import tensorflow as tf

        images = weak_numpy_function(self._read, [positions], tf.uint8)
        images.set_shape([positions.shape[0], self._image_size, self._image_size, 1])
        return images

    def pixels(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """As `ShardSource.pixels`."""
        return self._read(positions)[..., 0]

    def masks(self, positions: Positions) -> npt.NDArray[np.bool_] | None:
        """As `ShardSource.masks`."""
        if not any(image.mask for image in self._found):
            return None
        masks = np.zeros((len(positions), self._image_size, self._image_size), np.bool_)
        for mask, position in zip(masks, positions, strict=True):
            name = self._found[position].mask
            if name is not None:
                path = self._folder / name
                mask[:] = decode_mask(read_bytes(path), self._image_size, path)
        return masks

    def origins(self, positions: Positions) -> tuple[list[str | None], list[str]]:
        """As `ShardSource.origins`; near-duplicates have not been looked for."""
        groups, known = self.groups, self._metadata
        sources = [known.get(self.paths[position], Metadata()).source for position in positions]
        return sources, [groups[position] for position in positions]

    def _read(self, positions: Positions) -> npt.NDArray[np.uint8]:
        try:
            images = [load_gray(self._folder / self.paths[position], self._image_size) for position in positions]
        except Exception as error:
            self.failure = error
            raise
        return np.stack(images)[..., None]
