"""Comparison of a model's graph with that of a file, and with it the place of every weight.

Both are walked together from their outputs, so that neither the names of layers nor the order in
which a file lists them matter.
"""

from ...models.graph import Layer, Network, Value
from ..system.printable import plural

_ONLY_IN_TRAINING = {"Dropout", "GaussianNoise", "SpatialDropout2D"}
# Of use in training only.
_NOT_COMPARED = {"momentum"}
# faceswap's own class, which enlarges by whole factors as Keras's does.
_SAME_AS = {"KResizeImages": "UpSampling2D"}


def match(theirs: Network, ours: Network) -> dict[Layer, Layer]:
    """The layer of a file for each layer of a model that computes something.

    Raises:
        ValueError: The graphs differ; the first layer that does, seen from the outputs, is named.
    """
    pairs: dict[Layer | Network, Layer | Network] = {}
    _match(theirs, ours, pairs)
    return {
        our: their
        for our, their in pairs.items()
        if isinstance(our, Layer) and isinstance(their, Layer)
    }


def _match(theirs: Network, ours: Network, pairs: dict[Layer | Network, Layer | Network]) -> None:
    for what in ("inputs", "outputs"):
        shapes = [[v.shape for v in getattr(network, what)] for network in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{what} of {theirs.name} must be {_listed(shapes[1])} with these options, got "
                f"{_listed(shapes[0])}"
            )
    seen = set()
    waiting = [*zip(theirs.outputs, ours.outputs, strict=True)][::-1]
    while waiting:
        their, our = (_source(value) for value in waiting.pop())
        if (their.call, our.call, their.index) in seen:
            continue
        # In pairs: a call that is shared on one side only is compared with each of the other's.
        seen.add((their.call, our.call, their.index))
        their_layer, our_layer = their.call.layer, our.call.layer
        # A layer that is shared here must be shared there: its weights are one array.
        is_paired = pairs.setdefault(our_layer, their_layer) is their_layer
        if not is_paired or their.index != our.index:
            raise ValueError(f"{_name(their, theirs)} stands where {_name(our, ours)} should")
        if isinstance(their_layer, Network) and isinstance(our_layer, Network):
            _match(their_layer, our_layer, pairs)
        else:
            _compare(their, our, theirs.name)
        if len(their.call.inputs) != len(our.call.inputs):
            layers = plural(len(their.call.inputs), "layer")
            raise ValueError(f"{_name(their, theirs)} takes {len(their.call.inputs)} {layers}")
        waiting += zip(_in_our_order(their, our), our.call.inputs, strict=True)


def _in_our_order(their: Value, our: Value) -> tuple[Value, ...]:
    """Inputs of a call, those of a sum as ours has them: their order is free."""
    theirs, ours = their.call.inputs, our.call.inputs
    kinds = [[_kind(_source(value).call.layer) for value in values] for values in (theirs, ours)]
    is_swapped = kinds[0] != kinds[1] and kinds[0] == kinds[1][::-1]
    return theirs[::-1] if is_swapped and _kind(our.call.layer) == "Add" else theirs


def _source(value: Value) -> Value:
    """The value without what passes everything on outside training."""
    while isinstance(value.call.layer, Layer) and value.call.layer.kind in _ONLY_IN_TRAINING:
        (value,) = value.call.inputs
    return value


def _compare(their: Value, our: Value, network: str) -> None:
    """Refuse layers of other kinds, or of the same kind with other settings."""
    theirs, ours = their.call.layer, our.call.layer
    kinds = [
        _SAME_AS.get(getattr(part, "kind", ""), getattr(part, "kind", ""))
        for part in (theirs, ours)
    ]
    if kinds[0] != kinds[1] or isinstance(theirs, Network) or isinstance(ours, Network):
        raise ValueError(
            f"{theirs.name} of {network} is a {kinds[0] or 'Functional'}, where a model with these "
            f"options has a {kinds[1] or 'Functional'}"
        )
    for key in ours.attributes.keys() - _NOT_COMPARED:
        wanted, found = ours.attributes[key], theirs.attributes.get(key)
        if not _is_alike(wanted, found):
            raise ValueError(
                f"{key} of {theirs.name} of {network} must be {wanted} with these options, got "
                f"{found}"
            )


def _kind(layer: Layer | Network) -> str:
    kind = "network" if isinstance(layer, Network) else layer.kind
    return _SAME_AS.get(kind, kind)


def _is_alike(wanted: object, found: object) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        # A slope or an epsilon may have gone through fp32 on its way into the file.
        return abs(wanted - found) <= 1e-6 * abs(wanted)
    return wanted == found


def _name(value: Value, network: Network) -> str:
    return f"{value.call.layer.name} of {network.name}"


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
