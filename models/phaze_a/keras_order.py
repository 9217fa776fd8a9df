"""Places of the ordered Keras arrays of a backbone of the reference.

An array that the network here has no place for is folded in, so that it computes the same outside
training: a bias before a batch norm is taken off the norm's running mean, and EfficientNet's own
normalisation of the picture becomes the backbone's. The channels of the picture are not reversed:
the reference trains these networks, and all that follows them, on RGB.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..keras_weights import Entry

# The same network here as there, its layers made in the same order but for ResNet's shortcuts.
_SAME = r"clipv_.*|densenet\d+|efficientnet_.*|mobilenet|mobilenet_v2|resnet\d+|vgg\d+"

IMAGENET_STD = (0.229, 0.224, 0.225)


class KnownNetwork(Protocol):
    """A backbone, as far as its arrays go."""

    mean: Tensor
    std: Tensor
    trunk: Any
    name: str
    is_vector: bool

    @property
    def normalize(self) -> str:
        """How it scales a picture."""


def entries(backbone: KnownNetwork) -> list[Entry]:
    """All arrays of the reference's network, in its order.

    Raises:
        ValueError: The reference's network is another one, or the order of its weights unknown.
    """
    name = backbone.name
    if not re.fullmatch(_SAME, name):
        raise ValueError(
            f"weights of the reference's {name} cannot be read, its network differs from this one; "
            "train a new model"
        )
    if backbone.normalize != "reference":
        raise ValueError(
            f"weights of the reference need a {name} made with normalize='reference', "
            f"got {backbone.normalize!r}"
        )
    if backbone.is_vector:
        return list(_clip(backbone.trunk))
    found = list(_normalization(backbone)) if name.startswith("efficientnet_b") else []
    biased = name.startswith("resnet")
    layers = list(_layers(backbone.trunk))
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d):
            found += _convolution(layer, following if biased else None)
        else:
            found += _norm(layer, adds=biased)
    return found


def _copy(
    parameter: Tensor, change: Callable[[Tensor], Tensor] = lambda t: t
) -> Callable[[np.ndarray], None]:
    """What copies an array, changed to PyTorch's layout, into a parameter or a part of one."""
    destination = parameter.detach()  # shares its memory

    def load(array: np.ndarray) -> None:
        destination.copy_(change(torch.from_numpy(np.ascontiguousarray(array))))

    return load


def _layers(module: nn.Module) -> Iterator[Any]:
    """Convolutions and norms in the order in which the reference makes them."""
    if isinstance(module, nn.Conv2d | BatchNorm):
        yield module
        return
    children = dict(module.named_children())
    if "downsample" in children:  # a block's shortcut is made before the block's own layers
        children = {"downsample": children.pop("downsample"), **children}
    for child in children.values():
        yield from _layers(child)


def _convolution(layer: nn.Conv2d, folds_into: BatchNorm | None) -> Iterator[Entry]:
    """The kernel, and the bias where the reference has one: into ``folds_into`` if given."""
    outputs, inputs, rows, columns = weight_shape = layer.weight.shape
    if layer.groups > 1:
        shape = rows, columns, layer.groups, outputs // layer.groups
        yield Entry(
            shape, _copy(layer.weight, lambda t: t.permute(2, 3, 0, 1).reshape(weight_shape))
        )
    else:
        shape = rows, columns, inputs, outputs
        yield Entry(shape, _copy(layer.weight, lambda t: t.permute(3, 2, 0, 1)))
    if layer.bias is not None:
        yield Entry((outputs,), _copy(layer.bias))
    elif folds_into is not None:
        yield Entry((outputs,), _copy(folds_into.running_mean, torch.neg))


def _norm(layer: BatchNorm, *, adds: bool) -> Iterator[Entry]:
    """Gain, offset, running mean and variance; ``adds``: the mean has a bias taken off already."""
    shape = (layer.channels,)
    mean = layer.running_mean
    yield Entry(shape, _copy(layer.weight))
    yield Entry(shape, _copy(layer.bias))
    yield Entry(shape, _copy(mean, (lambda t: mean + t) if adds else lambda t: t))
    yield Entry(shape, _copy(layer.running_var))


def _normalization(backbone: KnownNetwork) -> Iterator[Entry]:
    """Mean and variance of the picture's channels, and a count that nothing uses."""
    yield Entry((3,), _copy(backbone.mean, lambda t: t.reshape(3, 1, 1)))
    yield Entry((3,), _copy(backbone.std, lambda t: _deviation(t).reshape(3, 1, 1)))
    yield Entry((), lambda array: None)


def _deviation(variance: Tensor) -> Tensor:
    """What the reference divides the picture by.

    Where it began with ImageNet's weights, which bring ImageNet's variance, its network divides by
    the root of the deviation once more.
    """
    deviation = variance.sqrt()
    is_imagenet = torch.allclose(deviation, torch.tensor(IMAGENET_STD), rtol=1e-3)
    return deviation**1.5 if is_imagenet else deviation


def _clip(tower: Any) -> Iterator[Entry]:
    """A CLIP tower: tables, norms, and query, key and value apart by head."""
    width, heads = tower.embed_dim, tower.blocks[0].attn.num_heads
    yield from _convolution(tower.patch_embed.proj, None)
    yield Entry((width,), _copy(tower.cls_token[0, 0]))
    yield Entry(tuple(tower.pos_embed.shape[1:]), _copy(tower.pos_embed[0]))
    yield from _gain_and_offset(tower.norm_pre)
    for block in tower.blocks:
        yield from _gain_and_offset(block.norm1)
        qkv = block.attn.qkv
        split = width, heads, width // heads
        # timm has query, key and value in one layer, the reference in three.
        for weight, bias in zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            yield Entry(split, _copy(weight, lambda t: t.reshape(width, width).t()))
            yield Entry(split[1:], _copy(bias, torch.flatten))
        output = block.attn.proj
        yield Entry(
            (heads, width // heads, width),
            _copy(output.weight, lambda t: t.reshape(width, width).t()),
        )
        yield Entry((width,), _copy(output.bias))
        yield from _gain_and_offset(block.norm2)
        yield from _dense(block.mlp.fc1)
        yield from _dense(block.mlp.fc2)
    yield from _gain_and_offset(tower.norm)
    yield from _dense(tower.head)


def _gain_and_offset(norm: nn.LayerNorm) -> Iterator[Entry]:
    yield Entry(tuple(norm.weight.shape), _copy(norm.weight))
    yield Entry(tuple(norm.bias.shape), _copy(norm.bias))


def _dense(layer: nn.Linear) -> Iterator[Entry]:
    yield Entry((layer.in_features, layer.out_features), _copy(layer.weight, torch.t))
    if layer.bias is not None:
        yield Entry((layer.out_features,), _copy(layer.bias))
