"""A finished run as a function of images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfrecords_builder.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cxr_dist.inference import classifier
    from cxr_dist.inference.classifier import Prediction

    Images = npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]]

PathLike = str | os.PathLike[str]


class Classifier:
    """A finished run as a function of images.

    Attributes:
        class_names: C names, in the order of the probabilities.
        image_size: Side in pixels of the images that the network sees; others are resized.
    """

    def __init__(self, loaded: "classifier.Classifier") -> None:
        self._loaded = loaded
        self.class_names, self.image_size = loaded.class_names, loaded.image_size

    def predict(
        self, images: "PathLike | Sequence[PathLike] | Images", *, overlay: PathLike | None = None
    ) -> "list[Prediction]":
        """A prediction for each image: `predicted`, `abstained` and `reason`, and `probabilities` by class, 0 to 1.

        Args:
            images: Paths of image files, or of folders that hold such, one or several; or gray images,
                uint8 [B, H, W], or a sequence of uint8 [H, W].
            overlay: A new folder. Each image is written there with the network's attention over it, as PNG, in the
                order of the predictions. For paths alone. Default: none.

        Returns:
            Predictions in the order of the images; those of a folder come in the order of their names.

        Raises:
            UserError: a path does not exist, or a file cannot be read.
            ValueError: an array of another shape or dtype.
        """
        from cxr_dist.data.image_files import find_inputs
        from cxr_dist.inference.predict import Overlays, predict_arrays, predict_files
        from cxr_dist.runs.loggers import progress_bar
        from tfrecords_builder.common.pool import default_workers

        given = [images] if isinstance(images, str | os.PathLike) else images
        paths = [Path(item) for item in given if isinstance(item, str | os.PathLike)]
        if not paths:
            if overlay is not None:
                raise UserError("overlay: is for files; give the paths of the images")
            return predict_arrays(self._loaded, [item for item in given if not isinstance(item, str | os.PathLike)])
        if len(paths) != len(given):
            raise UserError("images: holds both paths and arrays; give one kind at a time")
        found = find_inputs(paths)
        overlays = Overlays(Path(overlay), self._loaded) if overlay is not None else None
        predictions: list[Prediction] = []
        with progress_bar("predict") as progress:
            for outcome in predict_files(self._loaded, found, default_workers(), overlays=overlays):
                if outcome.prediction is None:
                    raise UserError(f"{outcome.path}: {outcome.error}")
                predictions.append(outcome.prediction)
                progress(len(predictions), len(found))
        return predictions
