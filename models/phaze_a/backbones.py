"""Encoders that come from elsewhere: timm's networks behind one interface.

Two manners. "reference": the network that a model of the reference holds, as far as timm has it:
its scaling of the picture, its "same" padding, its constants. "pretrained": as timm's own weights
were trained. Known differences from the reference that stay in both, for timm's weights would not
fit otherwise:

    resnet50 ..         no bias before a batch norm, which takes it away again
    resnet50_v2 ..      a stack strides in its first block, with a convolution on the shortcut; no
                        biases
    inception, xception padding of timm; inception's batch norms have a gain
    mobilenet_v3        the picture is scaled once

Shape letters: B faces, C channels, H rows, W columns, S the edge of the picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..fields import no_such
from ..keras_weights import Entry
from . import keras_order, trunks

Normalize = Literal["reference", "pretrained"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One backbone: what timm calls it and what the reference does with it."""

    timm_name: str
    default_px: int
    min_px: int = 32
    scaling: Literal["0..1", "0..255", "-1..1", "imagenet"] = "-1..1"
    """Range of the picture that the network gets in the reference; "imagenet": less the mean of
    ImageNet's pictures, by their deviation."""

    eps: float | None = None
    """Epsilon of the reference's batch norms; None: as timm's."""

    momentum: float = 0.01
    """Step of the running estimates of the reference's batch norms."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm's constructor."""

    same_padding: bool = False
    """timm pads on both ends alike unless told to."""

    unused: tuple[str, ...] = ()
    """Modules that only the classifier needs."""

    weights: str = ""
    """Name of the pretrained weights, where it is not timm's name of the network."""

    @property
    def is_vector(self) -> bool:
        """Whether the output is a vector: CLIP's image towers."""
        return self.timm_name.startswith("vit")


def _clip(size: str, default_px: int, channels: int, weights: str = "") -> Spec:
    # The network of OpenAI's weights: other ones have another activation.
    return Spec(
        timm_name=f"vit_{size}_clip_quickgelu_{default_px}",
        default_px=default_px,
        scaling="0..1",
        arguments={"num_classes": channels},
        weights=weights or f"vit_{size}_clip_{default_px}.openai",
    )


def _efficientnet(size: str, default_px: int) -> Spec:
    return Spec(
        timm_name=f"tf_efficientnet_{size}",
        default_px=default_px,
        # The reference multiplies by 255 and the network divides by it again.
        scaling="0..1",
        arguments={"drop_path_rate": 0.2},
    )


def _efficientnet_v2(size: str, default_px: int) -> Spec:
    return Spec(
        timm_name=f"tf_efficientnetv2_{size}",
        default_px=default_px,
        momentum=0.1,
        arguments={"drop_path_rate": 0.2},
    )


def _mobilenet_v3(size: str) -> Spec:
    return Spec(
        timm_name=f"tf_mobilenetv3_{size}_100",
        default_px=224,
        momentum=0.001,
        unused=("conv_head", "norm_head", "act2"),
    )


_EFFICIENTNET_PX = {"b0": 224, "b1": 240, "b2": 260, "b3": 300}
_EFFICIENTNET_PX |= {"b4": 380, "b5": 456, "b6": 528, "b7": 600}
_EFFICIENTNET_V2_PX = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "s": 384, "m": 480, "l": 480}
_CONVNEXT = {s: s for s in ("tiny", "small", "base", "large")} | {"extra_large": "xlarge"}

BACKBONES: dict[str, Spec] = {
    "clipv_farl-b-16-16": _clip("base_patch16", 224, 512, "FaRL-Base-Patch16-LAIONFace20M-ep16"),
    "clipv_farl-b-16-64": _clip("base_patch16", 224, 512, "FaRL-Base-Patch16-LAIONFace20M-ep64"),
    "clipv_vit-b-16": _clip("base_patch16", 224, 512),
    "clipv_vit-b-32": _clip("base_patch32", 224, 512),
    "clipv_vit-l-14": _clip("large_patch14", 224, 768),
    "clipv_vit-l-14-336px": _clip("large_patch14", 336, 768),
    **{
        f"convnext_{size}": Spec(
            timm_name=f"convnext_{timm_size}",
            default_px=224,
            scaling="imagenet",
            # The norm before the classifier stays, and works on every pixel.
            arguments={"head_norm_first": True},
        )
        for size, timm_size in _CONVNEXT.items()
    },
    **{
        f"densenet{depth}": Spec(
            timm_name=f"densenet{depth}", default_px=224, scaling="0..1", eps=1.001e-5
        )
        for depth in (121, 169, 201)
    },
    **{f"efficientnet_{size}": _efficientnet(size, px) for size, px in _EFFICIENTNET_PX.items()},
    **{
        f"efficientnet_v2_{size}": _efficientnet_v2(size, px)
        for size, px in _EFFICIENTNET_V2_PX.items()
    },
    "inception_resnet_v2": Spec(timm_name="inception_resnet_v2", default_px=299, min_px=75),
    "inception_v3": Spec(
        timm_name="inception_v3", default_px=299, min_px=75, arguments={"aux_logits": False}
    ),
    "mobilenet": Spec(timm_name="mobilenetv1_100", default_px=224, eps=1e-3, same_padding=True),
    "mobilenet_v2": Spec(
        timm_name="mobilenetv2_100", default_px=224, eps=1e-3, momentum=0.001, same_padding=True
    ),
    "mobilenet_v3_large": _mobilenet_v3("large"),
    "mobilenet_v3_small": _mobilenet_v3("small"),
    "nasnet_large": Spec(timm_name="nasnetalarge", default_px=331, momentum=0.0003),
    "nasnet_mobile": Spec(timm_name="nasnetamobile", default_px=224, momentum=0.0003),
    **{
        f"resnet{depth}": Spec(timm_name=f"resnet{depth}", default_px=224, eps=1.001e-5)
        for depth in (50, 101, 152)
    },
    **{
        f"resnet{depth}_v2": Spec(timm_name=f"resnetv2_{depth}", default_px=224, eps=1.001e-5)
        for depth in (50, 101, 152)
    },
    **{
        f"vgg{depth}": Spec(
            timm_name=f"vgg{depth}",
            default_px=224,
            scaling="0..255",
            unused=("pre_logits", "head"),
        )
        for depth in (16, 19)
    },
    "xception": Spec(timm_name="legacy_xception", default_px=299, min_px=71, eps=1e-3),
}

NAMES = ("fs_original", *BACKBONES)
"""Everything that ``enc_architecture`` may be; fs_original is no backbone but made of blocks."""

_MEAN_AND_STD = {
    "0..1": ((0.0,) * 3, (1.0,) * 3),
    "0..255": ((0.0,) * 3, (1 / 255,) * 3),
    "-1..1": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), keras_order.IMAGENET_STD),
}


def input_size(name: str, scaling_percent: int, *, pretrained: bool = False) -> int:
    """Edge of the pictures that an encoder takes, a multiple of 16 or the least that it takes.

    ``pretrained``: it is to start from pretrained weights; NASNet then has its own size only.
    """
    default_px, min_px = 1024, 32
    if name != "fs_original":
        default_px, min_px = spec(name).default_px, spec(name).min_px
    # As the reference does with NASNet's weights.
    if pretrained and name.startswith("nasnet"):
        return default_px
    return max(min_px, int(default_px * scaling_percent / 100 // 16) * 16)


def spec(name: str) -> Spec:
    """The row of the table; ValueError naming the known ones where there is none."""
    if name not in BACKBONES:
        refusal = no_such("no backbone", name, BACKBONES)
        raise ValueError(f"{refusal}; there are: {', '.join(BACKBONES)}")
    return BACKBONES[name]


class Backbone(nn.Module):
    """[B, 3, S, S] BGR in 0..1 -> [B, channels, output_px, output_px].

    Of an input with more channels the first three are taken: the others are zeros that fill up.
    In training every batch norm keeps A's faces, the first half of the batch, from B's.
    """

    mean: Tensor
    std: Tensor

    channels: int
    """Channels of the output."""

    output_px: int
    """Edge of the output; 1 where it is a vector."""

    def __init__(self, name: str, timm_name: str, normalize: Normalize, trunk: nn.Module):
        super().__init__()
        self.name, self.timm_name, self.normalize = name, timm_name, normalize
        self.is_vector = spec(name).is_vector
        # Buffers, for a loaded network of the reference brings its own.
        for part, values in zip(("mean", "std"), self._mean_and_std(trunk), strict=True):
            # Turned round: the values are of red, green, blue, the pictures are BGR.
            self.register_buffer(part, torch.tensor(values).flip(0).reshape(3, 1, 1))
        self.trunk: Any = trunk

    def _mean_and_std(self, trunk: Any) -> Any:
        """Mean and deviation of the picture's red, green and blue."""
        config = getattr(trunk, "pretrained_cfg", None)
        if self.normalize == "pretrained" and config:
            return config["mean"], config["std"]
        return _MEAN_AND_STD[spec(self.name).scaling]

    def forward(self, faces_bcss: Tensor) -> Tensor:
        faces = ((faces_bcss[:, :3] - self.mean) / self.std).to(faces_bcss.dtype)
        return self._features(faces)

    def _features(self, faces_b3ss: Tensor) -> Tensor:
        if self.is_vector:
            return self.trunk(faces_b3ss)[..., None, None]
        return self.trunk.forward_features(faces_b3ss)

    def draw_weights(self, generator: torch.Generator) -> None:
        """Fill every weight as a pure function of the generator.

        Convolutions and dense layers Glorot-uniform, biases 0, norms 1 and 0, ConvNeXt's gains
        1e-6, the tables and the projection of a CLIP tower N(0, 1) / sqrt(width).
        """
        for module in self.trunk.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                    self._draw_kernel(module, generator)
                elif name in ("pos_embed", "cls_token"):
                    _draw_table(parameter, generator)
                else:
                    # By name, so that a parameter of an unknown kind is an error and not a guess.
                    value = {"weight": 1.0, "bias": 0.0, "gamma": 1e-6}[name]
                    nn.init.constant_(parameter, value)
            if isinstance(module, BatchNorm):
                module.running_mean.zero_()
                module.running_var.fill_(1)

    def _draw_kernel(self, layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
        if self.is_vector and layer is self.trunk.head:
            _draw_table(layer.weight, generator)
            return
        # Query, key and value are one layer of three.
        is_threefold = self.is_vector and layer.weight.shape[0] == 3 * layer.weight.shape[1]
        for part in layer.weight.chunk(3 if is_threefold else 1):
            nn.init.xavier_uniform_(part, generator=generator)

    def keras_entries(self) -> Iterable[Entry]:
        """Positions of the arrays of the reference's network; see `keras_order`."""
        return keras_order.entries(self)


def _draw_table(table: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(table, std=table.shape[-1] ** -0.5, generator=generator)


def backbone(
    name: str,
    size_px: int,
    *,
    mobilenet_width: float = 1.0,
    mobilenet_depth: int = 1,
    mobilenet_minimalistic: bool = False,
    normalize: Normalize = "reference",
) -> Backbone:
    """An encoder whose weights are not filled yet.

    Args:
        name: A key of `BACKBONES`.
        size_px: Edge of the pictures, from `input_size`.
        mobilenet_width: Multiplies the channels of every MobileNet; they stay multiples of 8.
        mobilenet_depth: Filters for each channel in the depthwise convolutions of mobilenet.
        mobilenet_minimalistic: MobileNet v3 without 5x5 kernels, hard-swish, squeeze and excite.
        normalize: Manner, of the two, in which the network is made and scales its input.

    Raises:
        ValueError: There is no such backbone, or the pictures are too small for it.
    """
    row = spec(name)
    if size_px < row.min_px:
        raise ValueError(f"{name} takes pictures of {row.min_px} px or more, got {size_px}")
    as_reference = normalize == "reference"
    timm_name, arguments = row.timm_name, dict(row.arguments)
    if row.is_vector:
        arguments["img_size"] = size_px
    if name.startswith("mobilenet"):
        arguments["width"] = mobilenet_width
    if name == "mobilenet":
        arguments["depth"] = mobilenet_depth
    if name.startswith("mobilenet_v3") and mobilenet_minimalistic:
        timm_name = timm_name.replace("_100", "_minimal_100")
    if row.same_padding and as_reference:
        arguments["pad_type"] = "same"
    eps = row.eps if as_reference else None
    trunk = trunks.make_trunk(
        timm_name, arguments, eps=eps, momentum=row.momentum, unused=row.unused
    )
    if as_reference:
        trunks.stride_first(trunk)
    made = Backbone(name, timm_name, normalize, trunk)
    with torch.no_grad():
        # The network itself says what it puts out; on the meta device this costs no memory.
        shape = made.eval()._features(torch.empty(1, 3, size_px, size_px, device="meta")).shape
    made.channels, made.output_px = shape[1], shape[2]
    trunk.to_empty(device=torch.get_default_device())
    return made.train()
