"""One phantom X-ray: a healthy thorax, a sign inside its lungs, and an exposure that knows of neither."""

import numpy as np
from numpy.typing import NDArray

from cxr_dist.phantoms.anatomy import SIDES, Thorax, healthy_attenuation, vessel_strokes
from cxr_dist.phantoms.fields import Field, Strokes, blob, smooth_noise, soft_step
from cxr_dist.phantoms.signs import draw_sign

Image8 = NDArray[np.uint8]

LUNG_EDGE = 0.04
"""Width of the lungs' soft edge, in body units; it lies inside the mask."""


def draw_phantom(class_name: str, size: int, rng: np.random.Generator) -> tuple[Image8, Image8]:
    """One X-ray of a class of `CLASS_FOLDERS` and its lung mask (255 inside), uint8 [size, size] each.

    Anatomy, exposure and sign have a stream of `rng` each: generators of the same seed give the same patient under
    the same exposure for every class, and images that differ inside the lungs alone. Nothing but pixel noise depends
    on `size`.

    Raises:
        ValueError: `class_name` is none of the four.
    """
    body_rng, sign_rng, exposure_rng, noise_rng = rng.spawn(4)
    thorax = Thorax.sample(body_rng)
    x, y = thorax.pose.body_coordinates(size)
    depths = thorax.lung_depths(x, y)
    right, left = (soft_step(depth - np.float32(LUNG_EDGE / 2), LUNG_EDGE) for depth in depths)
    vessels = vessel_strokes(thorax, size, body_rng)
    attenuation, body = healthy_attenuation(thorax, x, y, right + left, vessels, body_rng)
    attenuation += draw_sign(class_name, thorax, x, y, (right, left), sign_rng)
    attenuation += _shadows(x, y, body, (right, left), exposure_rng)
    image = _expose(attenuation, exposure_rng, noise_rng)
    mask = np.where(np.maximum(*depths) > 0, np.uint8(255), np.uint8(0))
    return image, mask


def _shadows(x: Field, y: Field, body: Field, airs: tuple[Field, Field], rng: np.random.Generator) -> Field:
    """Broad shadows that mean nothing: breasts, unequal lungs, scatter. They hide the signs' mean from a thumbnail."""
    size = x.shape[0]
    total = np.float32(0.06) * smooth_noise(rng, 4, size)
    for air in airs:
        total += np.float32(rng.normal(0, 0.05)) * air
    # Both lungs darker or lighter toward the base and toward the outer wall.
    lungs = airs[0] + airs[1]
    total += lungs * (np.float32(rng.normal(0, 0.1)) * y + np.float32(rng.normal(0, 0.15)) * (np.abs(x) - 0.35))
    if rng.random() < 0.6:
        depth, height, width = rng.uniform(0.04, 0.15), rng.uniform(0.15, 0.45), rng.uniform(0.14, 0.22)
        for side in SIDES:
            centre = (side * float(rng.uniform(0.34, 0.46)), float(height + rng.normal(0, 0.03)))
            total += np.float32(depth) * blob(x, y, centre, (float(width), float(width)))
    return total * body


def _expose(attenuation: Field, rng: np.random.Generator, noise_rng: np.random.Generator) -> Image8:
    """Window, gamma, gradient, noise, marker and collimation; nothing here depends on what is shown."""
    size = attenuation.shape[0]
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    tilt = np.float32(rng.normal(0, 0.06)) * axis[None, :] + np.float32(rng.normal(0, 0.06)) * axis[:, None]
    low, high = rng.uniform(-0.05, 0.12), rng.uniform(0.85, 1.1)
    level = (attenuation * (1 + tilt) - np.float32(low)) * np.float32(1 / (high - low))
    level = np.clip(level, 0, None)
    level = level / (1 + level**4) ** np.float32(0.25)  # a film's shoulder: bright parts saturate softly
    level = level ** np.float32(rng.uniform(0.75, 1.35))
    level = level * np.float32(rng.uniform(0.8, 1.0)) + np.float32(rng.uniform(0, 0.12))
    level = np.maximum(level, _marker(size, rng))
    level *= _collimation(axis, rng)
    grain = np.float32(rng.uniform(0.004, 0.015)) * noise_rng.standard_normal((size, size), dtype=np.float32)
    return np.clip(np.rint((level + grain) * 255), 0, 255).astype(np.uint8)


def _marker(size: int, rng: np.random.Generator) -> Field:
    """A burned-in R or L, beside the body's shoulder, and now and then a lead with its wire."""
    strokes = Strokes()
    side = int(rng.choice(SIDES))
    left, top = side * rng.uniform(0.78, 0.88) - 0.03, rng.uniform(-0.93, -0.7)
    height = rng.uniform(0.07, 0.12)
    width = height * 0.6
    bright = float(rng.uniform(0.6, 1))
    if rng.random() < 0.8:
        letter = (
            [((0, 0), (0, 1), (1, 1))]
            if side > 0
            else [((0, 1), (0, 0), (0.8, 0), (1, 0.25), (0.8, 0.5), (0, 0.5)), ((0.4, 0.5), (1, 1))]
        )
        for line in letter:
            strokes.line([(left + width * u, top + height * v) for u, v in line], 0.018, bright)
    if rng.random() < 0.15:
        start = (float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.4, 0.4)))
        course = [start]
        while abs(course[-1][0]) < 1 and abs(course[-1][1]) < 1 and len(course) < 12:
            last = course[-1]
            course.append((last[0] + side * float(rng.uniform(0.05, 0.15)), last[1] + float(rng.uniform(-0.02, 0.15))))
        strokes.line(course, 0.01, 0.85)
        strokes.disc(start, 0.03, 0.95)
    return strokes.field(size)


def _collimation(axis: Field, rng: np.random.Generator) -> Field:
    """1 inside the exposed window, nearly 0 outside; most images are exposed to their edges."""
    if rng.random() < 0.7:
        return np.ones((1, 1), dtype=np.float32)
    left, right, top, bottom = (np.float32(1 - value) for value in rng.uniform(-0.02, 0.1, 4))
    across = ((axis > -left) & (axis < right)).astype(np.float32)
    down = ((axis > -top) & (axis < bottom)).astype(np.float32)
    return np.maximum(across[None, :] * down[:, None], np.float32(0.05))
