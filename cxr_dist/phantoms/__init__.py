"""Phantom chest X-rays, drawn: what the demo and the tests run on where the real images are not at hand.

`signs` alone knows the classes; `anatomy` draws a healthy thorax, `drawing` puts both under a random exposure, and
`writer` makes a folder of them.
"""

from cxr_dist.phantoms.drawing import draw_phantom
from cxr_dist.phantoms.signs import CLASS_FOLDERS
from cxr_dist.phantoms.writer import phantom_rng, write_phantoms

__all__ = ["CLASS_FOLDERS", "draw_phantom", "phantom_rng", "write_phantoms"]
