"""Which lung mask belongs to which image, by the names of the files and of the folders that they are in. Pure."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from tfrecords_builder.collection.file_kinds import IMAGES_FOLDER, MASKS_FOLDER

_MASK_WORDS = r"(?:lungs?[_. -]?)?(?:masks?|seg(?:mentation)?)"
_MASK_NAME = re.compile(rf"{_MASK_WORDS}[_. -]+(?P<after>.+)|(?P<before>.+?)[_. -]+{_MASK_WORDS}")
"""Of a mask that is named after its image: x_mask, mask-x, x_lung_mask, x_seg."""


def match_masks(images: Sequence[str], masks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The images of a class that are no masks, and the mask of each that has one, by path.

    Where images of different folders have one name (`p1/1.png`, `p2/1.png`), a mask belongs to an image of its own
    folder, the folders `images` and `masks` left out. Otherwise see `_match_names`.
    """
    if not _ambiguous(images):
        return _match_names(images, masks)
    branches: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for place, paths in enumerate((images, masks)):
        for path in paths:
            branches[_branch(path)][place].append(path)
    taken: list[str] = []
    mask_of: dict[str, str] = {}
    for own_images, own_masks in branches.values():
        some, of_some = _match_names(own_images, own_masks)
        taken += some
        mask_of |= of_some
    return taken, mask_of


def _ambiguous(images: Sequence[str]) -> bool:
    """Whether images of different folders have the same name."""
    branch_of: dict[str, str] = {}
    folders = {path.rpartition("/")[0] for path in images}
    if len({_branch(f"{folder}/") for folder in folders}) < 2:
        return False
    return any(branch_of.setdefault(_stem(path), _branch(path)) != _branch(path) for path in images)


def _branch(path: str) -> str:
    parts = path.split("/")[:-1]
    return "/".join(part for part in parts if part.casefold() not in (IMAGES_FOLDER, MASKS_FOLDER))


def _match_names(images: Sequence[str], masks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The images of a class that are no masks, and the mask of each that has one, by path.

    A mask belongs to the image of its name. Without one, it belongs to the image whose name it has without regard to
    case and without the word "mask", if no other mask does. So does a file among the images, if the image is there.
    """
    maybe = [path for path in images if "mask" in (name := path.lower()) or "seg" in name]  # most collections: none
    if not masks and not maybe:
        return list(images), {}
    stems = {path: _stem(path) for path in images}
    mask_of_stem: dict[str, str] = {}
    for mask in sorted(masks):
        mask_of_stem.setdefault(_stem(mask), mask)
    mask_of = {path: mask_of_stem[stem] for path, stem in stems.items() if stem in mask_of_stem}
    if len(mask_of) == len(stems) and not maybe:
        return list(images), mask_of
    named = Counter(stem.casefold() for stem in stems.values())
    drawn = {path for path in maybe if _without_mask_word(stems[path]) in named}
    others: dict[str, list[str]] = {}
    for mask in sorted({*masks, *drawn} - set(mask_of.values())):
        name = _stem(mask).casefold()
        key = name if name in named and mask not in drawn else _without_mask_word(name)
        others.setdefault(key or name, []).append(mask)
    taken = [path for path in images if path not in drawn]
    for path in taken:
        name = stems[path].casefold()
        if path not in mask_of and named[name] == 1 and len(others.get(name, ())) == 1:
            mask_of[path] = others[name][0]
    return taken, {path: mask_of[path] for path in taken if path in mask_of}


def _without_mask_word(stem: str) -> str | None:
    """The name of a mask's image, without regard to case; None for what is not named so."""
    match = _MASK_NAME.fullmatch(stem.casefold())
    return (match["before"] or match["after"]) if match else None


def _stem(path: str) -> str:
    """The file's name without suffix. Not by `Path`, which takes most of the time of a listing."""
    return path.rpartition("/")[2].rpartition(".")[0]
