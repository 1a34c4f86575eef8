"""What each class shows inside the lungs, and nothing else: the only code of the phantoms that knows a class.

Most of a sign's mean over a lung is taken away again, as an exposure that is set for the lungs would. What tells the
classes apart is local contrast and texture, which neither an image's mean nor a linear reading of a thumbnail shows.
"""

import numpy as np

from cxr_dist.phantoms.anatomy import RIGHT_LUNG, Lung, Thorax
from cxr_dist.phantoms.fields import Field, blob, smooth_noise, soft_step

COVID = "COVID"
LUNG_OPACITY = "Lung_Opacity"
NORMAL = "Normal"
VIRAL_PNEUMONIA = "Viral Pneumonia"
CLASS_FOLDERS = (COVID, LUNG_OPACITY, NORMAL, VIRAL_PNEUMONIA)
"""The database's own folder names, in alphabetical order."""

COMPENSATION = 0.8
"""The share of a sign's mean over a lung that the exposure takes away again."""


def draw_sign(
    class_name: str, thorax: Thorax, x: Field, y: Field, airs: tuple[Field, Field], rng: np.random.Generator
) -> Field:
    """The attenuation that the class's disease adds, float32 [S, S], 0 outside the lungs.

    Args:
        class_name: one of `CLASS_FOLDERS`.
        thorax: the patient.
        x, y: body coordinates, float32 [S, S].
        airs: the right and the left lung, 0..1 with soft edges and 0 outside, float32 [S, S] each.
        rng: the sign's own randomness.

    Raises:
        ValueError: `class_name` is none of the four.
    """
    if class_name == NORMAL:
        return np.zeros_like(x)
    if class_name == COVID:
        signs = _peripheral_patches(thorax, x, y, rng)
    elif class_name == LUNG_OPACITY:
        signs = _lobar_opacity(thorax, x, y, rng)
    elif class_name == VIRAL_PNEUMONIA:
        signs = _interstitial_lines(x, rng)
    else:
        raise ValueError(f"class_name must be one of {', '.join(CLASS_FOLDERS)}, not {class_name!r}")
    total = np.zeros_like(x)
    for sign, air in zip(signs, airs, strict=True):
        total += (sign - np.float32(COMPENSATION) * _mean(sign, air)) * air
    return total


def _peripheral_patches(thorax: Thorax, x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    """Hazy patches near the outer wall, mostly in both lungs, mostly low."""
    mottle = smooth_noise(rng, 22, x.shape[0])
    counts = rng.integers(2, 6, size=2)
    if rng.random() < 0.1:
        counts[rng.integers(2)] = 0
    right, left = (_patches(lung, int(count), x, y, rng) for lung, count in zip(thorax.lungs, counts, strict=True))
    texture = np.float32(1) + np.float32(0.45) * mottle
    return right * texture, left * texture


def _patches(lung: Lung, count: int, x: Field, y: Field, rng: np.random.Generator) -> Field:
    total = np.zeros_like(x)
    for index in range(count):  # spread over the height from the base up, so that they stay apart
        downward = float(np.clip(1 - 0.8 * index / count + rng.normal(0, 0.06), 0.15, 1))
        centre = lung.point(float(rng.uniform(0.5, 0.9)), downward)
        radii = (float(rng.uniform(0.065, 0.095)), float(rng.uniform(0.065, 0.105)))
        total += np.float32(rng.uniform(0.48, 0.6)) * blob(x, y, centre, radii, angle=float(rng.uniform(0, np.pi)))
    return np.minimum(total, np.float32(0.6))


def _lobar_opacity(thorax: Thorax, x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    """One large consolidation in one lung, at any height, with a soft and uneven edge."""
    side = int(rng.integers(2))
    lung = thorax.lungs[side]
    centre = lung.point(float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.15, 0.9)))
    radii = (float(rng.uniform(0.18, 0.25)), float(rng.uniform(0.2, 0.28)))
    dx, dy = (x - np.float32(centre[0])) / radii[0], (y - np.float32(centre[1])) / radii[1]
    uneven = np.float32(0.15) * smooth_noise(rng, 9, x.shape[0])
    opacity = np.float32(rng.uniform(0.58, 0.7)) * soft_step(1 - np.sqrt(dx * dx + dy * dy) + uneven, 0.5)
    empty = np.zeros_like(x)
    return (opacity, empty) if lung.side == RIGHT_LUNG else (empty, opacity)


def _interstitial_lines(x: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    """A net of fine lines all over both lungs: the zero lines of smooth noise."""
    size = x.shape[0]
    strength = np.float32(rng.uniform(0.4, 0.5))
    lines = np.zeros_like(x)
    for _ in range(2):  # two nets, so that lines cross
        noise = smooth_noise(rng, int(rng.integers(16, 20)), size)
        fading = np.float32(0.5) + np.float32(0.5) * soft_step(smooth_noise(rng, 8, size), 1.5)
        lines = np.maximum(lines, strength * fading * np.exp(-((noise * np.float32(1 / 0.32)) ** 2)))
    return lines, lines


def _mean(sign: Field, air: Field) -> np.float32:
    return np.float32(np.vdot(sign, air) / max(float(air.sum()), 1.0))
