"""The split point between the frozen layers and those that train, and the networks on either side of it.

    image --below--> tensor at the split point --above--> logits

Everything below is frozen, so an image gives the same tensor every time. A stage that trains the head alone splits at
the pooled features. One that trains upper layers of the base too splits at the highest place below them that a single
tensor crosses: inside a residual block two do, and the few layers from that place to the first trained one are cheaper
than the bytes of the second tensor.

Both sides share the variables of the whole model. Frozen BatchNorm is folded on both (`batch_norm_folding`), and in the
network as a whole, which is what trains from images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_dist import compat
from cxr_dist.model import batch_norm_folding
from cxr_dist.model.resnet import FEATURES, IMAGE_NAME, MEAN_NAME, POOL_NAME, TO_BGR_NAME, FrozenBase, base_of, head_of


@dataclass(frozen=True)
class SplitPoint:
    """Where the frozen part ends."""

    name: str
    """The layer whose output crosses: POOL_NAME, or one of the base."""
    shape: tuple[int, ...]
    """Of the tensor, without the batch."""

    @classmethod
    def of(cls, model: Any, frozen: FrozenBase) -> "SplitPoint | None":
        """The highest one with everything below it frozen; None when nothing below one is."""
        base = base_of(model)
        trained = frozen.trained(base)
        highest, computed = None, False
        for layer, tensors in _crossing(base):
            if layer.name in trained and layer.weights:
                break
            computed = computed or bool(layer.weights)  # padding alone is nothing to keep
            if len(tensors) == 1 and computed:
                highest = layer.name, tensors[0]
        if highest is None:
            return None
        name, tensor = highest
        return cls(POOL_NAME, (FEATURES,)) if tensor is base.output else cls(name, tuple(tensor.shape[1:]))

    @property
    def bytes_per_image(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(stored_dtype(self.name)).itemsize


def _crossing(base: Any) -> Iterator[tuple[Any, list[Any]]]:
    """After each layer, in the order of computation, the tensors that later ones or the output still need."""
    nodes = compat.functional_nodes(base)
    last_use = {id(tensor): position for position, node in enumerate(nodes) for tensor in node.input_tensors}
    last_use |= {id(tensor): len(nodes) for tensor in base.outputs}
    alive: dict[int, Any] = {}
    for position, node in enumerate(nodes):
        alive |= {id(tensor): tensor for tensor in node.output_tensors}
        alive = {key: tensor for key, tensor in alive.items() if last_use.get(key, -1) > position}
        yield node.operation, list(alive.values())


def stored_dtype(name: str) -> str:
    """In which the tensor at a split point is kept: half the bytes where there are hundreds of thousands of values."""
    return "float32" if name == POOL_NAME else "float16"


def whole_network(model: Any, fuse: bool = False) -> Any:
    """image -> logits, with frozen BatchNorm folded: what trains from images. `fuse` as in `fold_frozen_batch_norm`."""
    base = batch_norm_folding.fold_frozen_batch_norm(base_of(model), fuse)
    return _from_image(model, lambda bgr: _to_logits(model, base(bgr)))


def network_above(model: Any, name: str, fuse: bool = False) -> Any:
    """The tensor at the split point `name`, float32 [B, ...] -> logits float32 [B, C]. `fuse` as in `whole_network`."""
    import keras

    if name == POOL_NAME:
        return head_of(model)
    base = base_of(model)
    tensor = base.get_layer(name).output
    upper = batch_norm_folding.fold_frozen_batch_norm(keras.Model(tensor, base.output), fuse)
    inputs = keras.Input(tensor.shape[1:], name=f"{name}_values", dtype="float32")
    return keras.Model(inputs, _to_logits(model, upper(inputs)), name="above_split_point")


def frozen_outputs(model: Any, names: Sequence[str]) -> Any:
    """image float32 [B, S, S, 1] -> the tensors at the split points `names`, in one pass."""
    import keras

    base = base_of(model)
    folded = batch_norm_folding.fold_frozen_batch_norm(
        keras.Model(base.input, [_in_base(base, name) for name in names])
    )

    def outputs(bgr: Any) -> list[Any]:
        pool, values = model.get_layer(POOL_NAME), keras.tree.flatten(folded(bgr))
        return [pool(value) if name == POOL_NAME else value for name, value in zip(names, values, strict=True)]

    return _from_image(model, outputs)


def variables_below(model: Any, name: str) -> list[Any]:
    """The base's variables that decide the tensor at the split point `name`."""
    import keras

    base = base_of(model)
    variables: list[Any] = keras.Model(base.input, _in_base(base, name)).variables
    return variables


def _in_base(base: Any, name: str) -> Any:
    return base.output if name == POOL_NAME else base.get_layer(name).output


def _from_image(model: Any, continued: Callable[[Any], Any]) -> Any:
    import keras

    image = keras.Input(model.input.shape[1:], name=IMAGE_NAME, dtype="float32")
    bgr = model.get_layer(TO_BGR_NAME)([image, image, image])
    return keras.Model(image, continued(model.get_layer(MEAN_NAME)(bgr)))


def _to_logits(model: Any, base_output: Any) -> Any:
    return head_of(model)(model.get_layer(POOL_NAME)(base_output))
