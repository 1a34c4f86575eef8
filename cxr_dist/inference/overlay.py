"""A heat map over an X-ray."""

import io

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_dist.inference.grad_cam import enlarged

SIDE = 168
"""Of a picture, in pixels: small, as a report holds twenty."""

HEAT = "cividis"
"""Nunez, Anderton and Renslow, PLOS ONE 13, 2018: looks alike with and without a colour vision deficiency."""

OPACITY = 0.65
"""Of the highest heat; none is transparent, so that the X-ray stays to be seen."""


def overlay_png(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32], side: int = SIDE) -> bytes:
    """A gray image, uint8 [S, S], with a map, float32 [h, w] of 0 to 1, over it, as PNG of `side` pixels."""
    gray = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), np.float64)
    heat = enlarged(heat[None], side)[0]
    colours = np.asarray(mpl.colormaps[HEAT](heat))[..., :3] * 255
    opacity = OPACITY * heat[..., None].astype(np.float64)
    mixed = (1 - opacity) * gray[..., None] + opacity * colours
    buffer = io.BytesIO()
    Image.fromarray(np.rint(mixed).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
