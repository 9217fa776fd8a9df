"""Order in which Keras keeps the layers of a model, and the places of their weights in a file.

The order follows from the graph alone: layers by falling depth, those of one depth by the first
arrival of a walk from the outputs. A file names a layer only by its class and its number in that
order, so a list in another order would load layers into each other.
"""

import re
from collections import Counter

from ...models.graph import Call, Layer, Network, finishing_order

Slots = list[tuple[Layer | Network, str]]
"""Layers in Keras's order, each with the name of its group in the weights."""


def ordered_layers(network: Network) -> list[Layer | Network]:
    """Layers of one network, without those of its sub-networks, in Keras's order."""
    finished, arrived = finishing_order(network.outputs)
    rank: dict[Layer | Network, int] = {}
    for call in arrived:
        # By first arrival: of two calls of a layer the first one counts.
        rank.setdefault(call.layer, len(rank))
    call_depth: dict[Call, int] = {}
    depth: dict[Layer | Network, int] = {}
    # Each call behind all that take of it, so that its depth is final when it is its turn.
    for call in reversed(finished):
        deepest = max(call_depth.get(call, 0), depth.get(call.layer, 0))
        call_depth[call] = depth[call.layer] = deepest
        for value in call.inputs:
            # The longest way to an output, as Keras counts.
            call_depth[value.call] = max(call_depth.get(value.call, 0), deepest + 1)
    return sorted(rank, key=lambda layer: (-depth[layer], rank[layer]))


def slots_of(network: Network) -> Slots:
    """Layers of one network in Keras's order, with their slots."""
    counts: Counter[str] = Counter()
    slots: Slots = []
    for layer in ordered_layers(network):
        kind = snake_case("Functional" if isinstance(layer, Network) else layer.kind)
        slots.append((layer, f"{kind}_{counts[kind]}" if counts[kind] else kind))
        counts[kind] += 1
    return slots


def weight_paths(network: Network, prefix: str = "") -> dict[Layer, str]:
    """Path of the group that holds the weights of each layer, sub-networks and all."""
    paths: dict[Layer, str] = {}
    for layer, slot in slots_of(network):
        place = f"{prefix}layers/{slot}"
        if isinstance(layer, Network):
            paths |= weight_paths(layer, f"{place}/")
        else:
            paths[layer] = f"{place}/vars"
    return paths


def snake_case(name: str) -> str:
    """Class name as it stands in the weights: ``LeakyReLU`` is ``leaky_re_lu``."""
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
