"""A functional Keras model as a graph; the one place that reads what Keras keeps to itself about it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of a layer: from which tensors to which."""

    layer: Any
    inputs: tuple[Any, ...]
    """Keras tensors; none for an input layer."""
    outputs: tuple[Any, ...]


def calls(network: Any) -> list[Call]:
    """Every call in the functional model `network`, each after those that it depends on."""
    depths = sorted(network._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in network._nodes_by_depth[depth]]
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
