"""A random thorax: its pose, its two lungs, and the healthy attenuation that an X-ray of it shows.

Body coordinates run from -1 to 1, `x` to the image's right and `y` down; the image shows about that square. The
patient faces the viewer, so the heart, on the patient's left, lies on the image's right (`x` > 0).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from cxr_dist.phantoms.fields import Field, Point, Strokes, blob, ellipse, soft_step

RIGHT_LUNG, LEFT_LUNG = -1, 1
"""The patient's right lung is on the image's left, where `x` is negative."""
SIDES = (RIGHT_LUNG, LEFT_LUNG)
BLUNT = 0.06
"""The radius, in body units, with which a lung's corners are rounded."""
HEART_ANGLE = 0.65
"""The slant of the heart's long axis, in radians: down and to the patient's left."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Where the body lies in the image: an affine map from image to body coordinates."""

    angle: float
    shift: Point
    scale: Point

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """A pose within what a technician lets pass: up to 7 degrees, a tenth of the image, an eighth of the scale."""
        zoom, habitus = rng.uniform(0.95, 1.22), rng.uniform(0.93, 1.07)
        return cls(
            angle=float(np.deg2rad(rng.uniform(-7, 7))),
            shift=(float(rng.uniform(-0.1, 0.1)), float(rng.uniform(-0.06, 0.14))),
            scale=(float(zoom * habitus), float(zoom / habitus)),
        )

    def body_coordinates(self, size: int) -> tuple[Field, Field]:
        """Body `x` and `y` of every pixel's centre, float32 [S, S] each."""
        axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1
        column, row = axis[None, :] - np.float32(self.shift[0]), axis[:, None] - np.float32(self.shift[1])
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        x = (cos * column + sin * row) * np.float32(1 / self.scale[0])
        y = (cos * row - sin * column) * np.float32(1 / self.scale[1])
        return x, y

    def to_image(self, point: Point) -> Point:
        """The image coordinates of a point of the body; the inverse of `body_coordinates`."""
        u, v = point[0] * self.scale[0], point[1] * self.scale[1]
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        return cos * u - sin * v + self.shift[0], sin * u + cos * v + self.shift[1]


@dataclass(frozen=True, slots=True)
class Lung:
    """One lung: a half ellipse above its widest level, straight below it, cut by the diaphragm's dome."""

    side: int
    apex: Point
    widest: float
    base: float
    centre: float
    half_width: float
    dome: float

    @classmethod
    def sample(cls, side: int, width: float, rng: np.random.Generator) -> Self:
        """One lung of a thorax whose lungs reach `width` from the midline."""
        medial = rng.uniform(0.08, 0.12)
        return cls(
            side=side,
            apex=(float(rng.uniform(0.24, 0.3)), float(rng.uniform(-0.74, -0.66))),
            widest=float(rng.uniform(0.08, 0.2)),
            # The liver lifts the right side.
            base=float(rng.uniform(0.5, 0.6)) + (0.05 if side == LEFT_LUNG else 0.0),
            centre=float(width + medial) / 2,
            half_width=float(width - medial) / 2,
            dome=float(rng.uniform(0.14, 0.24)),
        )

    def point(self, outward: float, downward: float) -> Point:
        """Body coordinates of a place in the lung: 0..1 from its midline edge outward, and from apex to base."""
        y = self.apex[1] + downward * (self.base - self.dome - self.apex[1])
        rise = max(0.0, (self.widest - y) / (self.widest - self.apex[1]))
        centre = self.centre + (self.apex[0] - self.centre) * rise**2
        half = self.half_width * float(np.sqrt(max(0.0, 1 - rise**2)))
        return self.side * (centre + (2 * outward - 1) * half), y

    def depth(self, x: Field, y: Field) -> Field:
        """How far inside the lung a place is, in body units, up to `BLUNT`; negative outside (float32 [S, S])."""
        across = x * np.float32(self.side)
        rise = np.maximum((self.widest - y) * np.float32(1 / (self.widest - self.apex[1])), 0)
        rise *= rise
        centre = self.centre + (self.apex[0] - self.centre) * rise
        half = self.half_width * np.sqrt(np.maximum(1 - rise, 0)) - 0.5 * np.maximum(rise - 1, 0)
        # The dome falls off outward, down to the costophrenic angle.
        off = (across - np.float32(self.centre - 0.12)) * np.float32(1 / (self.half_width + 0.12))
        floor = np.float32(self.base) - np.float32(self.dome) * (1 - off * off)
        return _inside_both(half - np.abs(across - centre), floor - y)


@dataclass(frozen=True, slots=True)
class Thorax:
    """One patient, as the numbers from which everything healthy is drawn."""

    pose: Pose
    lungs: tuple[Lung, Lung]
    wall: float
    """Thickness of the chest wall beside the lungs."""
    shoulder: float
    heart: Point
    heart_radii: Point
    rib_spacing: float
    rib_phase: float
    rib_drop: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """A patient; nothing here knows of any class."""
        width = rng.uniform(0.58, 0.68)
        return cls(
            pose=Pose.sample(rng),
            lungs=(Lung.sample(RIGHT_LUNG, width, rng), Lung.sample(LEFT_LUNG, width, rng)),
            wall=float(rng.uniform(0.1, 0.34)),
            shoulder=float(rng.uniform(-0.78, -0.66)),
            heart=(float(rng.uniform(0.08, 0.14)), float(rng.uniform(0.24, 0.32))),
            heart_radii=(float(rng.uniform(0.27, 0.34)), float(rng.uniform(0.19, 0.24))),
            rib_spacing=float(rng.uniform(0.145, 0.18)),
            rib_phase=float(rng.uniform(0, 1)),
            rib_drop=float(rng.uniform(0.5, 0.9)),
        )

    def heart_edge(self, x: Field, y: Field) -> Field:
        """Squared distance from the heart's centre: 1 on its outline (float32 [S, S]). Its apex points down and out."""
        return ellipse(x, y, self.heart, self.heart_radii, angle=HEART_ANGLE)

    def lung_depths(self, x: Field, y: Field) -> tuple[Field, Field]:
        """Depth inside the right and the left lung, as `Lung.depth`, without what the heart covers (float32 [S, S])."""
        right, left = (_inside_both(lung.depth(x, y), self._beside_heart(lung.side, x, y)) for lung in self.lungs)
        return right, left

    def _beside_heart(self, side: int, x: Field, y: Field) -> Field:
        # Below its widest level the heart's shadow goes on straight down: no scrap of lung is left under it.
        (long, short), (cos, sin) = self.heart_radii, (float(np.cos(HEART_ANGLE)), float(np.sin(HEART_ANGLE)))
        reach = float(np.hypot(long * cos, short * sin))
        lowest = self.heart[1] + side * (long**2 - short**2) * cos * sin / reach
        return (np.sqrt(self.heart_edge(x, np.minimum(y, np.float32(lowest)))) - 1) * np.float32(short)


def healthy_attenuation(
    thorax: Thorax, x: Field, y: Field, air: Field, vessels: Field, rng: np.random.Generator
) -> tuple[Field, Field]:
    """What a healthy thorax absorbs, and the body's silhouette.

    Args:
        x, y: body coordinates, float32 [S, S].
        air: 0..1, the lungs with soft edges, float32 [S, S].
        vessels: 0..1, the lungs' vessels (`vessel_strokes`), float32 [S, S].
        rng: for what varies and has no name in `Thorax`.

    Returns:
        Attenuation, 0 in air and about 1 behind the heart, and the silhouette, 0..1: float32 [S, S] each.
    """
    beside = np.abs(x)
    body = _silhouette(thorax, beside, y)
    reach = thorax.lungs[0].centre + thorax.lungs[0].half_width
    roundness = np.sqrt(np.maximum(1 - (x * np.float32(0.85 / (reach + thorax.wall))) ** 2, 0))
    abdomen = rng.uniform(0.15, 0.25) * soft_step(y - np.float32(0.42), 0.5) * (1 - air)
    tissue = 0.36 + 0.22 * roundness + abdomen
    # Below the neck the spine and the great vessels, a bright band; the trachea, dark, in its upper half.
    column = soft_step(np.float32(0.1) - beside, 0.14)
    vertebrae = 0.5 + 0.5 * np.cos(y * np.float32(2 * np.pi / 0.13))
    middle = column * (0.13 + 0.03 * vertebrae)
    middle -= 0.12 * soft_step(0.035 - np.abs(x - np.float32(0.01)), 0.05) * soft_step(-0.25 - y, 0.2)
    heart = 0.2 * soft_step(1 - thorax.heart_edge(x, y), 0.45) * (1 - 0.6 * soft_step(y - np.float32(0.42), 0.3))
    heart += 0.08 * soft_step(1 - ellipse(x, y, (-0.07, 0.22), (0.12, 0.24)), 0.5)  # right atrium
    heart += 0.1 * soft_step(1 - ellipse(x, y, (0.09, -0.24), (0.08, 0.09)), 0.6)  # aortic knuckle
    bones = _ribs(thorax, beside, y) + _clavicles(x, y, rng)
    # Wide shadows beyond the lungs: shoulder blades.
    blades = sum(blob(x, y, (side * (reach + 0.12), -0.42), (0.1, 0.2), angle=side * 0.35) for side in SIDES)
    attenuation = tissue + middle + heart * (1 - 0.2 * air) + bones + 0.07 * blades
    attenuation += air * (vessels * np.float32(0.16) - np.float32(rng.uniform(0.3, 0.36)))
    if rng.random() < 0.5:  # gas in the stomach, below the left diaphragm
        gas = (0.3 + float(rng.uniform(-0.05, 0.1)), thorax.lungs[1].base + float(rng.uniform(0.0, 0.1)))
        attenuation -= 0.15 * soft_step(1 - ellipse(x, y, gas, (0.12, 0.06)), 0.8) * (1 - air)
    return attenuation * body, body


def vessel_strokes(thorax: Thorax, size: int, rng: np.random.Generator) -> Field:
    """The vessels that fan out from both hila, thinner outward; float32 [S, S], 0..1."""
    strokes = Strokes()
    for lung in thorax.lungs:
        hilum = (lung.side * 0.14, 0.0)
        for angle in np.linspace(-1.2, 1.25, 8) + rng.normal(0, 0.1, 8):
            length, bend = rng.uniform(0.3, 0.5), rng.normal(0, 0.2)
            points = [hilum]
            for step in range(3):
                turn = angle + bend * step
                last = points[-1]
                points.append((last[0] + lung.side * length / 3 * np.cos(turn), last[1] + length / 3 * np.sin(turn)))
            for start, (width, level) in enumerate(((0.035, 0.8), (0.022, 0.6), (0.012, 0.45))):
                segment = [thorax.pose.to_image(point) for point in points[start : start + 2]]
                strokes.line(segment, width, level)
    return strokes.field(size)


def _inside_both(one: Field, other: Field) -> Field:
    """The depth inside two shapes, the corners where they meet rounded: a sharp tip would end in loose pixels."""
    blunt = np.float32(BLUNT)
    off_one, off_other = np.maximum(blunt - one, 0), np.maximum(blunt - other, 0)
    return blunt - np.sqrt(off_one * off_one + off_other * off_other)


def _silhouette(thorax: Thorax, beside: Field, y: Field) -> Field:
    """Neck, shoulders, trunk: 1 inside the body, 0 outside (float32 [S, S])."""
    reach = thorax.lungs[0].centre + thorax.lungs[0].half_width
    neck = 0.22 + 1.1 * soft_step(y - np.float32(thorax.shoulder), 0.55)
    # Raised shoulders, then the armpit, then the trunk.
    trunk = np.float32(reach + thorax.wall) + 0.45 * soft_step(-0.3 - y, 0.75)
    return soft_step(np.minimum(neck, trunk) - beside, 0.06)


def _ribs(thorax: Thorax, beside: Field, y: Field) -> Field:
    """Posterior ribs, that fall outward, and fainter anterior ones, that fall inward; brighter at their borders."""
    reach = thorax.lungs[0].centre + thorax.lungs[0].half_width
    rise = np.clip((thorax.lungs[0].widest - y) * np.float32(1 / (thorax.lungs[0].widest + 0.78)), 0, 1)
    cage = soft_step(np.float32(reach + 0.04) * np.sqrt(1 - rise * rise) - beside, 0.04) * soft_step(0.62 - y, 0.3)
    turn = np.float32(2 * np.pi / thorax.rib_spacing)
    curve = np.float32(thorax.rib_drop) * (beside - 0.2) ** 2
    back = np.cos((y - curve) * turn + np.float32(2 * np.pi * thorax.rib_phase))
    front = np.cos((y + 0.45 * beside) * (turn * 0.85) + np.float32(np.pi * thorax.rib_phase))
    # A rib is a tube: its band is bright, and brightest where the beam runs along its wall.
    band = soft_step(back - np.float32(0.25), 0.5)
    core = soft_step(back - np.float32(0.8), 0.4)
    return cage * (0.085 * band + 0.04 * band * (1 - core) + 0.03 * soft_step(front - np.float32(0.3), 0.6))


def _clavicles(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Both collar bones: slanting S-shaped bars above the lungs' tips."""
    height, slope = rng.uniform(-0.6, -0.52), rng.uniform(0.12, 0.35)
    beside = np.abs(x)
    course = height - np.float32(slope) * (beside - 0.06) + 0.025 * np.sin((beside - 0.06) * 9)
    along = soft_step(beside - np.float32(0.06), 0.04) * soft_step(np.float32(0.66) - beside, 0.06)
    return np.float32(0.12) * along * soft_step(np.float32(0.03) - np.abs(y - course), 0.02)
