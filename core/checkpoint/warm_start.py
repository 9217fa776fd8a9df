"""Sub-networks of a new model taken from another one of its family."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder
from .weights import read_weights

Reader = Callable[[Path], tuple[dict[str, Tensor], str | None]]
"""Function that gives the tensors of a model, and its family where that is told."""


def load_weights(model: Autoencoder, path: Path, read: Reader = read_weights) -> str:
    """What was taken, in words: the model's `load_layers` get the numbers that they have in a save.

    Args:
        model: New, in fp32, not aligned.
        path: A model folder, one generation of it, or a model.safetensors.
        read: Reader of such a path, or of more.

    Raises:
        ValueError: There are no such weights, or they do not fit; then nothing was taken.
    """
    # A file of another program names no family; its tensors then decide.
    tensors, family = read(path)
    own_family = model.Config.family
    # By the name: shapes of two families may agree by chance.
    if family not in (None, own_family):
        raise ValueError(
            f"{path} holds a model of {family}, not of {own_family}; load from another"
        )
    taken: dict[str, Tensor] = {}
    for part in model.load_layers:
        # Asked only for its refusal of a name that the model does not have.
        model.subnetwork(part)
        taken |= {name: t for name, t in tensors.items() if name.startswith(f"{part}.")}
        # All is compared before anything is copied: a refused model is as it was made.
        _check(model, part, taken, path)
    if not taken:
        raise ValueError(
            "model.options.load_layers names no sub-network of this model, so nothing of "
            f"{path} would be taken; name one of "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    # Into the tensors that are there: the optimizer is made of them later.
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    count = sum(tensor.numel() for tensor in taken.values())
    return f"{count / 1e6:.1f} M parameters of {', '.join(model.load_layers)} from {path}"


def _check(model: Autoencoder, part: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse a sub-network whose tensors are not, by name and shape, those of the model."""
    theirs = {name: t.shape for name, t in tensors.items() if name.startswith(f"{part}.")}
    if not theirs:
        raise ValueError(f"{path} holds no weights of {part}; load from another model")
    ours = {name: t.shape for name, t in model.state_dict().items() if name.startswith(f"{part}.")}
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = (_shown(shapes.get(name)) for shapes in (theirs, ours))
        if there != here:
            raise ValueError(
                f"{part} of {path} does not fit: {name} is {there} there and {here} here; give "
                "the new model the options of that one, or load from another"
            )


def _shown(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
