"""timm's networks without their classifiers, fitted to a trainer of two sides.

timm (PyTorch Image Models, Ross Wightman) is imported when the first network is asked for. All
parameters are made on the meta device: nothing is drawn, nothing is downloaded.

Shape letters: B faces, C channels, H rows, W columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.wide_products import widen
from ..batch_norm import BatchNorm

_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def import_timm() -> Any:
    """The package timm.

    timm imports torchvision. Beside a torch of another build (PyPI's torchvision is built for CUDA)
    its compiled operators do not load, and then it stumbles over its own declarations of them. The
    networks here use none of these operators, so declaring their signatures is enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import timm

    return timm


def make_trunk(
    timm_name: str,
    arguments: dict[str, Any],
    *,
    eps: float | None,
    momentum: float,
    unused: tuple[str, ...],
) -> Any:
    """A network of timm's on the meta device, without its classifier.

    Args:
        timm_name: The name under which timm has it, "mobilenetv1" and "mobilenetv2" with a
            ``width`` among the arguments, or "nasnetamobile", which timm lacks.
        arguments: Arguments of timm's constructor.
        eps: Epsilon of every batch norm; None: timm's own.
        momentum: Step of the running estimates of every batch norm.
        unused: Modules that only the classifier needs.
    """
    import_timm()
    with torch.device("meta"):
        trunk = _create(timm_name, {"num_classes": 0, **arguments})
        for name in unused:
            # In their place, since timm's forward pass calls them.
            setattr(trunk, name, nn.Identity())
        if timm_name.startswith("vit"):  # its projection is no classifier, and has no bias
            trunk.head = nn.Linear(trunk.embed_dim, trunk.num_classes, bias=False)
        _keep_sides_apart(trunk, eps, momentum)
    _mark_noise(trunk)
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            widen(layer)
    return trunk


def _create(timm_name: str, arguments: dict[str, Any]) -> Any:
    import timm
    from timm.models import efficientnet, mobilenetv3

    if timm_name == "nasnetamobile":
        return _nasnet_mobile(**arguments)
    if "width" not in arguments:
        return timm.create_model(timm_name, pretrained=False, **arguments)
    # timm has names for a few widths only; its makers take any.
    width, depth = arguments.pop("width"), arguments.pop("depth", 1)
    if timm_name.startswith("tf_mobilenetv3"):
        # What timm sets for its networks named tf_, and their maker does not.
        arguments |= {"bn_eps": 1e-3, "pad_type": "same"}
        return mobilenetv3._gen_mobilenet_v3(timm_name, width, **arguments)
    if timm_name.startswith("mobilenetv2"):
        return efficientnet._gen_mobilenet_v2(timm_name, width, **arguments)
    trunk = efficientnet._gen_mobilenet_v1(timm_name, width, **arguments)
    _change_depthwise(trunk, depth, pads_behind=arguments.get("pad_type") == "same")
    return trunk


class _PaddedBehind(nn.Conv2d):
    """Convolution that pads one row and one column of zeros at the far ends, whatever the size."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        padded = F.pad(x_bchw, (0, 1, 0, 1))
        return F.conv2d(padded, self.weight, None, self.stride, groups=self.groups)


def _change_depthwise(trunk: nn.Module, depth: int, *, pads_behind: bool) -> None:
    """MobileNet v1 with ``depth`` filters for each channel in its depthwise convolutions.

    ``pads_behind``: strided ones pad as the reference's, which is TensorFlow's "same" for an even
    size only.
    """
    from timm.layers import create_conv2d
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv

    for block in trunk.modules():
        if not isinstance(block, DepthwiseSeparableConv):
            continue
        inputs, stride = block.conv_dw.in_channels, block.conv_dw.stride[0]
        filters = inputs * depth
        if pads_behind and stride == 2:
            block.conv_dw = _PaddedBehind(inputs, filters, 3, 2, groups=inputs, bias=False)
        elif depth > 1:
            block.conv_dw = create_conv2d(inputs, filters, 3, stride=stride, groups=inputs)
        if depth > 1:
            block.bn1 = type(block.bn1)(filters, eps=block.bn1.eps, act_layer=nn.ReLU6)
            block.conv_pw = create_conv2d(filters, block.conv_pw.out_channels, 1)


class _Skipped(nn.Module):
    """A cell left out of NASNet: gives the older of its two inputs back."""

    def forward(self, _newer: Tensor, older: Tensor) -> Tensor:
        return older


def _nasnet_mobile(**arguments: Any) -> nn.Module:
    """NASNet-A (4 @ 1056): timm's (6 @ 4032) with other widths and four cells in a row for six.

    Two cells beside one another that give their older inputs back are as though not there, for
    each cell takes the outputs of the two before it.
    """
    from timm.models.nasnet import NASNetALarge

    trunk = NASNetALarge(stem_size=32, num_features=1056, **arguments)
    for number in (2, 3, 8, 9, 14, 15):
        setattr(trunk, f"cell_{number}", _Skipped())
    return trunk


class _NormActivation(BatchNorm):
    """Batch norm, then an activation, for timm's module that is both."""

    def __init__(self, channels: int, act: nn.Module, *, eps: float, momentum: float):
        super().__init__(channels, eps=eps, momentum=momentum)
        self.act = act

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.act(super().forward(x_bchw))


def _keep_sides_apart(trunk: nn.Module, eps: float | None, momentum: float) -> None:
    """Put `BatchNorm` in the place of every batch norm, under the same names."""
    from timm.layers import BatchNormAct2d

    # Lists, since the modules are replaced on the way.
    for parent in list(trunk.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            channels, chosen = norm.num_features, norm.eps if eps is None else eps
            if isinstance(norm, BatchNormAct2d):
                own: BatchNorm = _NormActivation(channels, norm.act, eps=chosen, momentum=momentum)
            else:
                own = BatchNorm(channels, eps=chosen, momentum=momentum)
            setattr(parent, name, own)


def _mark_noise(trunk: nn.Module) -> None:
    """Let blocks that are skipped at random in training be known as noise."""
    from timm.layers import DropPath

    for module in trunk.modules():
        if isinstance(module, DropPath):
            module.is_noise = True  # type: ignore[assignment]


def stride_first(trunk: nn.Module) -> None:
    """Let ResNet's blocks stride in their first convolution (He et al. 2015), not in the second."""
    from timm.models.resnet import Bottleneck

    for block in trunk.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
