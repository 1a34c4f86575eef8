"""A functional Keras model as a graph."""

from dataclasses import dataclass
from typing import Any

from cxr_dist import compat


@dataclass(frozen=True)
class Call:
    """One call of a layer: from which tensors to which."""

    layer: Any
    inputs: tuple[Any, ...]
    """Keras tensors; none for an input layer."""
    outputs: tuple[Any, ...]


def calls(network: Any) -> list[Call]:
    """Every call in the functional model `network`, each after those that it depends on."""
    nodes = compat.functional_nodes(network)
    return [Call(node.operation, tuple(node.input_tensors), tuple(node.output_tensors)) for node in nodes]


def crossing(network: Any) -> list[tuple[Call, list[Any]]]:
    """After each call, in order, the tensors that later calls or the model's outputs still need."""
    ordered = calls(network)
    last_use: dict[int, int] = {id(tensor): len(ordered) for tensor in network.outputs}
    for position, call in enumerate(ordered):
        for tensor in call.inputs:
            last_use[id(tensor)] = max(last_use.get(id(tensor), 0), position)
    alive: dict[int, Any] = {}
    result = []
    for position, call in enumerate(ordered):
        alive |= {id(tensor): tensor for tensor in call.outputs}
        alive = {key: tensor for key, tensor in alive.items() if last_use.get(key, -1) > position}
        result.append((call, list(alive.values())))
    return result
