"""Images of which a part is taken away or exchanged: without lungs, without border, with another's border. Pure.

What fills a hole must tell nothing of what was in it. Its gray level is therefore the mean of the pixels that are
kept, a function of what the network sees anyway: the mean of the image as a whole would be brighter where the lungs
were white. And its outline is a rectangle around the mask, with a margin: the silhouette of the mask would show the
shape of the lungs, which disease and the segmentation of a class both change. A rectangle still tells where the lungs
were and how large; nothing that lies in them.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cxr_dist.evaluation.examination.perturbations import Images, resampled

Masks = npt.NDArray[np.bool_]

BORDER_SHARE = 0.1
"""Width of the border, as a share of the side, on each side."""
BOX_MARGIN = 1 / 16
"""By which the rectangle around a lung mask is wider on each side, as a share of the image's side."""
CENTRAL_BOX = (0.15, 0.85)
"""Where the lungs are taken to be in an image without a mask, as shares of the side: rows and columns alike."""
THUMBNAIL_SIDE = 16


def border_width(side: int) -> int:
    """In pixels, of an image of `side` pixels."""
    return max(1, round(BORDER_SHARE * side))


def border_mask(side: int) -> Masks:
    """bool [S, S]: the outer pixels."""
    width = border_width(side)
    mask = np.ones((side, side), np.bool_)
    mask[width:-width, width:-width] = False
    return mask


def lung_boxes(masks: Masks | None, count: int, side: int) -> tuple[Masks, npt.NDArray[np.bool_]]:
    """A rectangle around each image's lungs, bool [N, S, S], and whether it comes from a mask, bool [N].

    Args:
        masks: bool [N, S, S]; None, or a mask without a pixel, where an image has none: it gets `CENTRAL_BOX`.
        count: N.
        side: S, in pixels.
    """
    boxes: Masks = np.zeros((count, side, side), np.bool_)
    given: Masks = boxes.copy() if masks is None else masks
    known: npt.NDArray[np.bool_] = np.asarray(given.any(axis=(1, 2)))
    low, high = (round(share * side) for share in CENTRAL_BOX)
    margin = round(BOX_MARGIN * side)
    for box, mask, has_mask in zip(boxes, given, known, strict=True):
        if not has_mask:
            box[low:high, low:high] = True
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box[
            max(rows[0] - margin, 0) : rows[-1] + margin + 1, max(columns[0] - margin, 0) : columns[-1] + margin + 1
        ] = True
    return boxes, known


def filled(images: Images, hole: Masks) -> Images:
    """Each image with the mean of its kept pixels in `hole`, bool [N, S, S] or [S, S]; 0 where nothing is kept."""
    hole = np.broadcast_to(hole, images.shape)
    kept = (~hole).sum(axis=(1, 2))
    sums = np.where(hole, 0, images).sum(axis=(1, 2), dtype=np.int64)
    means = np.rint(sums / np.maximum(kept, 1)).astype(np.uint8)
    return np.where(hole, means[:, None, None], images)


def without_lungs(images: Images, masks: Masks | None = None) -> Images:
    """The rectangle around the lungs filled."""
    return filled(images, lung_boxes(masks, *images.shape[:2])[0])


def lungs_only(images: Images, masks: Masks | None = None) -> Images:
    """Everything but the lungs filled: here their outline stays, as it is part of what is kept."""
    boxes, known = lung_boxes(masks, *images.shape[:2])
    kept = boxes if masks is None else np.where(known[:, None, None], masks, boxes)
    return filled(images, ~kept)


def border_only(images: Images, _masks: Masks | None = None) -> Images:
    """Everything but the border filled."""
    return filled(images, ~border_mask(images.shape[1]))


def without_border(images: Images, _masks: Masks | None = None) -> Images:
    """In the border's place, the nearest pixel inside of it: the mildest filling, as what is asked is what falls."""
    width = border_width(images.shape[1])
    inner = images[:, width:-width, width:-width]
    return np.pad(inner, ((0, 0), (width, width), (width, width)), mode="edge")


def thumbnail(images: Images, _masks: Masks | None = None) -> Images:
    """16 x 16 means of blocks, blown up again: no texture is left, and no small sign."""
    return resampled(images, THUMBNAIL_SIDE)


def with_border_of(images: Images, donors: Images) -> Images:
    """Each image inside the border of another."""
    return np.where(border_mask(images.shape[1]), donors, images)


OCCLUSIONS: dict[str, tuple[str, Callable[[Images, Masks | None], Images]]] = {
    "without_lungs": ("Lungs blacked out", without_lungs),
    "lungs_only": ("Lungs only", lungs_only),
    "border_only": ("Border only", border_only),
    "without_border": ("Border filled", without_border),
    "thumbnail": ("16 x 16 thumbnail", thumbnail),
}
"""Name -> what people call it, and how it is made."""
USES_MASKS = ("without_lungs", "lungs_only")
