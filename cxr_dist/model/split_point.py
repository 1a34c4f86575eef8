"""The network on either side of a cut: below it everything is frozen, so an image gives the same tensor every time.

    image --below--> tensor at the cut --above--> logits

A stage that trains the head alone is cut at the pooled features. One that trains upper layers of the base too is cut
at the highest place below them that a single tensor crosses: inside a residual block two do, and the few layers between
that place and the first unfrozen one are cheaper than the bytes of the second tensor.

Both sides share the variables of the whole model. Frozen BatchNorm is folded on both (`folding`), and in the network as
a whole, which is what trains from images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_dist.model import batch_norm_folding, keras_graph
from cxr_dist.model.resnet import FEATURES, IMAGE_NAME, MEAN_NAME, POOL_NAME, TO_BGR_NAME, base_of, head_of


@dataclass(frozen=True)
class Cut:
    """Where the frozen part ends, as `set_trainable` left it."""

    name: str
    """The layer whose output crosses: POOL_NAME, or one of the base."""
    shape: tuple[int, ...]
    """Of the tensor, without the batch."""
    above: Any
    """That tensor, float32 [B, ...] -> logits float32 [B, C]."""

    @property
    def bytes_per_image(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(stored_dtype(self.name)).itemsize


def stored_dtype(name: str) -> str:
    """In which the tensor at a cut is kept: half the bytes where there are hundreds of thousands of values."""
    return "float32" if name == POOL_NAME else "float16"


def whole_network(model: Any) -> Any:
    """image -> logits, with frozen BatchNorm folded: what trains from images."""
    base = batch_norm_folding.fold_frozen_batch_norm(base_of(model))
    return _from_image(model, lambda bgr: _to_logits(model, base(bgr)))


def frozen_cut(model: Any) -> Cut | None:
    """The highest cut with everything below it frozen; None when nothing below one is."""
    import keras

    base = base_of(model)
    found, computed = None, False
    for call, tensors in keras_graph.crossing(base):
        if call.layer.trainable and call.layer.weights:
            break
        computed = computed or bool(call.layer.weights)  # padding alone is nothing to keep
        if len(tensors) == 1 and computed:
            found = call.layer.name, tensors[0]
    if found is None:
        return None
    name, tensor = found
    if tensor is base.output:
        return Cut(POOL_NAME, (FEATURES,), head_of(model))
    upper = batch_norm_folding.fold_frozen_batch_norm(keras.Model(tensor, base.output))
    inputs = keras.Input(tensor.shape[1:], name=f"{name}_values", dtype="float32")
    above = keras.Model(inputs, _to_logits(model, upper(inputs)), name="above_cut")
    return Cut(name, tuple(tensor.shape[1:]), above)


def frozen_outputs(model: Any, names: Sequence[str]) -> Any:
    """image float32 [B, S, S, 1] -> the tensors at the cuts `names`, in one pass."""
    import keras

    base = base_of(model)
    tensors = [base.output if name == POOL_NAME else base.get_layer(name).output for name in names]
    folded = batch_norm_folding.fold_frozen_batch_norm(keras.Model(base.input, tensors))

    def outputs(bgr: Any) -> list[Any]:
        pool, values = model.get_layer(POOL_NAME), keras.tree.flatten(folded(bgr))
        return [pool(value) if name == POOL_NAME else value for name, value in zip(names, values, strict=True)]

    return _from_image(model, outputs)


def _from_image(model: Any, continued: Callable[[Any], Any]) -> Any:
    import keras

    image = keras.Input(model.input.shape[1:], name=IMAGE_NAME, dtype="float32")
    bgr = model.get_layer(TO_BGR_NAME)([image, image, image])
    return keras.Model(image, continued(model.get_layer(MEAN_NAME)(bgr)))


def _to_logits(model: Any, base_output: Any) -> Any:
    return head_of(model)(model.get_layer(POOL_NAME)(base_output))
