"""What may happen to an image on its way to a network: a rotation, noise, compression. Pure.

Each perturbation takes and gives uint8 [N, S, S]. Its first strength is None: nothing is done, exactly.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_dist.data import random_streams

Images = npt.NDArray[np.uint8]
Change = Callable[[Images, float, int], Images]
"""Images, strength, seed -> images."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A kind of change, and how strong it is tried."""

    name: str
    title: str
    unit: str
    """Of the strength, for people."""
    strengths: tuple[float | None, ...]
    """From none on, ever stronger."""
    change: Change

    def apply(self, images: Images, strength: float | None, seed: int) -> Images:
        """The changed images; `images` itself is left alone."""
        return images.copy() if strength is None else self.change(images, strength, seed)


def rotated(images: Images, degrees: float, _seed: int = 0) -> Images:
    """Turned counter-clockwise about the centre, bilinear; what comes from outside repeats the image's edge.

    Repeated edges and not black corners: the corners' angle would itself be a sign that no rotated X-ray has.
    """
    side = images.shape[1]
    margin = math.ceil(side * (math.sqrt(2) - 1) / 2) + 1
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    inner = slice(margin, margin + side)
    turned = [
        np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))[inner, inner] for image in padded
    ]
    return np.stack(turned)


def shifted(images: Images, share: float, _seed: int = 0) -> Images:
    """Moved right and down by that share of the side, to whole pixels; the edge repeats where nothing comes in."""
    side = images.shape[1]
    pixels = round(share * side)
    return np.pad(images, ((0, 0), (pixels, 0), (pixels, 0)), mode="edge")[:, :side, :side]


def contrasted(images: Images, factor: float, _seed: int = 0) -> Images:
    """Distances from the image's mean times `factor`: below 1 flatter."""
    values = images.astype(np.float64)
    means = values.mean(axis=(1, 2), keepdims=True)
    return _bytes(means + factor * (values - means))


def noisy(images: Images, deviation: float, seed: int = 0) -> Images:
    """Gaussian noise of that standard deviation in gray levels; the same draws, scaled, at every strength."""
    noise = random_streams.generator("noise on images", seed).standard_normal(images.shape)
    return _bytes(images + deviation * noise)


def compressed(images: Images, quality: float, _seed: int = 0) -> Images:
    """Through JPEG at that quality (1 to 95) and back."""
    return np.stack([_through_jpeg(image, round(quality)) for image in images])


def coarsened(images: Images, share: float, _seed: int = 0) -> Images:
    """At that share of the side and back: means of blocks, then bilinear."""
    side = images.shape[1]
    return resampled(images, max(1, round(share * side)))


def resampled(images: Images, small: int) -> Images:
    """Down to `small` pixels a side by means of blocks, and up again, bilinear."""
    side = images.shape[1]
    if small >= side:
        return images.copy()
    down = (Image.fromarray(image).resize((small, small), Image.Resampling.BOX) for image in images)
    return np.stack([np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) for image in down])


PERTURBATIONS = (
    Perturbation("rotation", "Rotation", "degrees", (None, 5, 10, 20), rotated),
    Perturbation("shift", "Shift", "fraction of the side", (None, 0.03, 0.06, 0.12), shifted),
    Perturbation("contrast", "Reduced contrast", "factor", (None, 0.75, 0.5, 0.25), contrasted),
    Perturbation("noise", "Gaussian noise", "gray levels", (None, 4, 8, 16), noisy),
    Perturbation("jpeg", "JPEG compression", "quality", (None, 75, 40, 15), compressed),
    Perturbation("resolution", "Reduced resolution", "fraction of the side", (None, 0.5, 0.25, 0.125), coarsened),
)


def _through_jpeg(image: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _bytes(values: npt.NDArray[np.float64]) -> Images:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
