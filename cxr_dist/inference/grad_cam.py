"""Grad-CAM: which parts of an image raise the logit of a class, and the picture that shows them."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_dist import compat

BATCH_SIZE = 32
OVERLAY_SIDE = 168
"""Of a picture, in pixels: small, as a report holds twenty."""
HEAT = "cividis"
"""Nunez, Anderton and Renslow, PLOS ONE 13, 2018: looks alike with and without a colour vision deficiency."""
OPACITY = 0.65
"""Of the highest heat; none is transparent, so that the X-ray stays to be seen."""

Maps = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explained:
    """Of N images."""

    maps: Maps
    """float32 [N, h, w], 0 to 1: each divided by its highest value; zeros where no place raises the score."""
    features: npt.NDArray[np.float32]
    """float32 [N, F]: means over the last feature map's places."""


def last_feature_map(model: Any) -> Any:
    """The Keras tensor [B, h, w, F] from which `model` goes on without places: what global pooling takes.

    Raises:
        ValueError: `model` has no such tensor.
    """
    found = None
    for node in compat.functional_nodes(model):
        inputs, outputs = node.input_tensors, node.output_tensors
        if len(inputs) == 1 and len(inputs[0].shape) == 4 and len(outputs[0].shape) == 2:
            found = inputs[0]
    if found is None:
        raise ValueError(f"{model.name}: no layer turns a feature map [B, h, w, F] into a vector [B, F]")
    return found


Explain = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int32]], Explained]
"""(images uint8 [N, S, S], targets int32 [N]: the class that each map is about) -> Explained."""


def make_explain(model: Any, done: Callable[[int], None] = lambda _: None) -> Explain:
    """Grad-CAM maps of the classes `targets`, and pooled features, in inference mode.

    With A the last feature map and y the class's logit: weights a_k = mean over places of dy/dA_k, map = relu(sum over
    k of a_k A_k) (Selvaraju et al. 2017, equations 1 and 2).

    Args:
        model: A functional Keras model, float [B, S, S, 1] of 0 to 255 -> logits [B, C].
        done: Called after each batch with its number of images.
    """
    import keras
    import tensorflow as tf

    tensor = last_feature_map(model)
    below, above = keras.Model(model.input, tensor), keras.Model(tensor, model.output)

    def explain(images: npt.NDArray[np.uint8], targets: npt.NDArray[np.int32]) -> Explained:
        maps, features = [], []
        for start in range(0, len(images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            values = tf.cast(below(tf.cast(images[part, ..., None], tf.float32), training=False), tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(values)
                logits = above(values, training=False)
                of_target = tf.gather(logits, targets[part], axis=1, batch_dims=1)
            weights = tf.reduce_mean(tape.gradient(of_target, values), axis=(1, 2), keepdims=True)
            maps.append(tf.nn.relu(tf.reduce_sum(weights * values, axis=-1)).numpy())
            features.append(tf.reduce_mean(values, axis=(1, 2)).numpy())
            done(len(images[part]))
        raw = np.concatenate(maps)
        highest = raw.max(axis=(1, 2), keepdims=True)
        scaled = np.divide(raw, highest, out=np.zeros_like(raw), where=highest > 0)
        return Explained(scaled.astype(np.float32), np.concatenate(features).astype(np.float32))

    return explain


def enlarged(maps: Maps, side: int) -> Maps:
    """Maps [N, h, w] at the size of the images, float32 [N, side, side], bilinear."""
    scaled = (Image.fromarray(each).resize((side, side), Image.Resampling.BILINEAR) for each in maps)
    return np.stack([np.clip(np.asarray(each, np.float32), 0, 1) for each in scaled])


def overlay_png(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32], side: int = OVERLAY_SIDE) -> bytes:
    """A gray image, uint8 [S, S], with a map, float32 [h, w] of 0 to 1, over it, as PNG of `side` pixels."""
    gray = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), np.float64)
    heat = enlarged(heat[None], side)[0]
    colours = np.asarray(mpl.colormaps[HEAT](heat))[..., :3] * 255
    opacity = OPACITY * heat[..., None].astype(np.float64)
    mixed = (1 - opacity) * gray[..., None] + opacity * colours
    buffer = io.BytesIO()
    Image.fromarray(np.rint(mixed).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
