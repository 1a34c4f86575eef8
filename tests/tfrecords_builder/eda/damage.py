"""Damage of eight kinds: each function gives a damaged copy of a gray image, uint8 [S, S]."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_images

Gray = npt.NDArray[np.uint8]


def resized(gray: Gray, width: int, height: int) -> Gray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(gray)).resize((width, height), Image.Resampling.BILINEAR))


def stripes(gray: Gray, rng: np.random.Generator) -> Gray:
    """A third of the bytes of the image in color, read as gray; or dark lines, each 2 to 8 pixels, in one direction."""
    size = gray.size
    if rng.random() < 0.5:
        third = int(rng.integers(3))
        return np.repeat(gray.ravel(), 3)[third * size : (third + 1) * size].reshape(gray.shape)
    period = int(rng.integers(2, 9))
    lines = np.where(np.arange(len(gray)) % period < max(period // 2, 1), rng.uniform(6, 20), 0)
    return np.clip(gray - (lines[:, None] if rng.random() < 0.5 else lines), 0, 255).astype(np.uint8)


def half_gray(gray: Gray, rng: np.random.Generator) -> Gray:
    """What a decoder leaves of a file that is cut off."""
    cut = gray.copy()
    cut[int(len(gray) * rng.uniform(0.35, 0.65)) :] = 128
    return cut


def inverted(gray: Gray, _: np.random.Generator) -> Gray:
    return 255 - gray


def rotated(gray: Gray, rng: np.random.Generator) -> Gray:
    """By 90, 180 or 270 degrees."""
    return np.ascontiguousarray(np.rot90(gray, rng.integers(1, 4)))


def channel_order(gray: Gray, _: np.random.Generator) -> Gray:
    """Three equal planes read as interleaved: three by three small copies."""
    return np.asarray(Image.fromarray(np.stack([gray] * 3).reshape(*gray.shape, 3)).convert("L"))


def uniform(gray: Gray, rng: np.random.Generator) -> Gray:
    """One level, or one level with faint noise."""
    noise = rng.integers(2) * rng.normal(0, 2, gray.shape)
    return np.clip(rng.integers(256) + noise, 0, 255).astype(np.uint8)


def photograph(gray: Gray, rng: np.random.Generator) -> Gray:
    """A part of one of the two photographs of scikit-learn."""
    picture = np.asarray(Image.fromarray(load_sample_images().images[rng.integers(2)]).convert("L"))
    side = int(rng.integers(200, 420))
    top, left = (int(rng.integers(length - side + 1)) for length in picture.shape)
    part = picture[top : top + side, left : left + side]
    return resized(part[:, ::-1] if rng.random() < 0.5 else part, gray.shape[1], gray.shape[0])


def squeezed(gray: Gray, rng: np.random.Generator) -> Gray:
    """As narrow as a lateral view, 40 to 60 % of the width, with black on both sides."""
    width = int(gray.shape[1] * rng.uniform(0.4, 0.6))
    narrow = np.zeros_like(gray)
    left = (gray.shape[1] - width) // 2
    narrow[:, left : left + width] = resized(gray, width, len(gray))
    return narrow


KINDS: dict[str, Callable[[Gray, np.random.Generator], Gray]] = {
    function.__name__: function
    for function in (stripes, half_gray, inverted, rotated, channel_order, uniform, photograph, squeezed)
}
