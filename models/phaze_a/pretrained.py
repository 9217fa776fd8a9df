"""Pretrained weights of backbones, from files that the user has; nothing is downloaded.

A file holds the tensors by timm's names (Hugging Face's "timm/..." repositories do), as safetensors
or as PyTorch saves them. CLIP towers take OpenAI's names too, which FaRL has. The weights were
trained on RGB: the first convolution's input channels are reversed here, for pictures in BGR.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..weight_files import SUFFIXES, read_tensors
from .backbones import Backbone, spec


def load_pretrained(backbone: Backbone, path: str | Path | None) -> Path:
    """Fill a backbone with pretrained weights; the file that they came from.

    Args:
        backbone: Made with normalize="pretrained", else its strides, its padding or the scaling of
            the picture are not those that the weights were trained with. A position table may have
            another size than the file's.
        path: A file, or a folder that holds ``<weights>.safetensors`` (or .pth, .pt, .bin) or is a
            Hugging Face cache; ``<weights>`` is timm's name of the network, with ".openai" behind
            it for CLIP, and FaRL's own name for FaRL.

    Raises:
        ValueError: There is no such file, or more than one, or it is of another network.
    """
    file = _find(backbone, path)
    tensors = _named_as_here(backbone, read_tensors(file))
    own = backbone.trunk.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"{file} is not of {backbone.name}: it has no tensor {name}")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{file} is not of this {backbone.name}: {name} must have shape "
                f"{tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
            )
    first = _first_convolution(backbone.trunk)
    # Only now: a file that is refused leaves the backbone as it was.
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name].flip(1) if name == first else tensors[name])
    return file


def _find(backbone: Backbone, path: str | Path | None) -> Path:
    row = spec(backbone.name)
    wanted = row.weights or backbone.timm_name
    place = Path(os.path.expanduser(path)) if path else None
    if place and place.is_file():
        return place
    found = []
    if place and place.is_dir():
        found = [f for s in SUFFIXES if (f := place / f"{wanted}{s}").is_file()]
        if not found:
            repositories = f"models--timm--{wanted}"
            # The star finds networks, too, whose names only begin so, as resnet50d beside resnet50.
            found = [
                file
                for file in sorted(place.glob(f"{repositories}*/snapshots/*/model.safetensors"))
                if file.parts[-4] == repositories or file.parts[-4].startswith(f"{repositories}.")
            ]
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(place)) for file in found if place)
        raise ValueError(f"{place} has several weights of {backbone.name}, name one: {names}")
    if not found:
        raise ValueError(
            f"no pretrained weights of {backbone.name}: looked for {wanted}.safetensors in "
            f"{place or 'no folder'}; name a file or a folder by model.options.enc_weights or by "
            "MIEN_BACKBONES, or set enc_load_weights = false"
        )
    return found[0]


def _named_as_here(backbone: Backbone, tensors: dict[str, Any]) -> dict[str, Tensor]:
    if backbone.is_vector:
        from timm.models.vision_transformer import checkpoint_filter_fn

        # Undoes OpenAI's names and resizes the position table, bicubic.
        return checkpoint_filter_fn(tensors, backbone.trunk)
    # ConvNeXt: the norm of the classifier works on every pixel here.
    return {name.replace("head.norm.", "norm_pre.", 1): tensor for name, tensor in tensors.items()}


def _first_convolution(trunk: nn.Module) -> str:
    """Name of the weight that meets the picture."""
    layers = trunk.named_modules()
    return next(f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Conv2d))
