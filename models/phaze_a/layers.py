"""Layers that only phaze-a has.

Shape letters: B faces, C channels, H rows, W columns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.bias_act import bias_act
from ...kernels.enlarge import enlarge
from ..alignment import Runs, axis, pad_parameter, runs_of
from ..batch_norm import BatchNorm
from ..blocks import (
    ConvBlock,
    ConvBlocks,
    FastUpscale,
    HybridUpscale,
    Residual,
    SameConv,
    Upscale,
    uninitialized,
)
from ..initializers import glorot_uniform
from ..norms import GroupNorm, InstanceNorm, LayerNorm, RmsNorm

NORMS: dict[str, Callable[[Runs], nn.Module]] = {
    "group": GroupNorm,
    "instance": InstanceNorm,
    "layer": LayerNorm,
    "rms": RmsNorm,
}
"""Normalisations that need to know nothing but the channels."""


class Noise(nn.Module):
    """Gaussian noise of deviation 1, in training only; then LeakyReLU ``slope``, in one pass."""

    is_noise = True

    def __init__(self, channels: Runs, *, slope: float = 1.0):
        super().__init__()
        self.slope = slope
        self.normal_channels = channels  # zeros among them would become noise

    def forward(self, x_bchw: Tensor, bias_c: Tensor | None = None) -> Tensor:
        """``bias_c``: of the convolution before it, if that is still to be added."""
        noise_bchw = torch.randn_like(x_bchw) if self.training else None
        if noise_bchw is None and bias_c is None and self.slope == 1:
            return x_bchw
        return bias_act(x_bchw, bias_c, negative_slope=self.slope, residual_bchw=noise_bchw)


class Reshape(nn.Module):
    """All values of a face, in NHWC order, as a picture of another edge: [B, channels, edge, edge].

    The input is a vector or a picture, whose neighbours do not stay neighbours.
    """

    def __init__(self, inputs: Runs, edge_px: int, channels: int):
        super().__init__()
        self.edge_px, self.channels = edge_px, runs_of(channels)
        self.normal_channels = (*inputs, channels)  # zeros among the channels would become pixels

    def forward(self, x: Tensor) -> Tensor:
        x_bhwc = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        return x_bhwc.reshape(len(x), self.edge_px, self.edge_px, -1).permute(0, 3, 1, 2)


class TransposedConv(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: transposed 3x3 convolution of stride 2.

    Its bias is not added here but by the kernel that follows it.
    """

    def __init__(self, inputs: Runs, outputs: int):
        super().__init__()
        self.inputs, self.channels = inputs, runs_of(outputs)
        self.conv = uninitialized(nn.ConvTranspose2d, sum(inputs), outputs, 3, 2, 1, 1)
        self.conv.draw = glorot_uniform

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.conv_transpose2d(x_bchw, self.conv.weight, None, 2, 1, 1)

    def align(self, multiple: int) -> None:
        """Pad the channels to a multiple; see `alignment`."""
        by_output = axis(1, self.channels, 1, multiple)
        pad_parameter(self.conv, "weight", (axis(0, self.inputs, 1, multiple), by_output))
        pad_parameter(self.conv, "bias", (axis(0, self.channels, 1, multiple),))


class ResizeImages(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: LeakyReLU of the sum of a convolution of the enlarged
    picture and a transposed convolution."""

    def __init__(self, inputs: Runs, outputs: int, *, slope: float):
        super().__init__()
        self.slope, self.channels = slope, runs_of(outputs)
        self.enlarged = SameConv(inputs, outputs, 3)
        self.transposed = TransposedConv(inputs, outputs)

    def forward(self, x_bchw: Tensor) -> Tensor:
        bias = self.enlarged.conv.bias + self.transposed.conv.bias
        product, transposed = self.enlarged(enlarge(x_bchw)), self.transposed(x_bchw)
        return bias_act(product, bias, negative_slope=self.slope, residual_bchw=transposed)


class Dny(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: enlarged, then two 3x3 convolutions with LeakyReLU 0.2
    and ``slope``."""

    def __init__(self, inputs: Runs, outputs: int, *, slope: float, reflect: bool):
        super().__init__()
        self.convs = ConvBlocks(
            ConvBlock(inputs, outputs, 3, 1, slope=0.2, reflect=reflect),
            ConvBlock(outputs, outputs, 3, 1, slope=slope, reflect=reflect),
        )
        self.channels = self.convs.channels

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.convs(enlarge(x_bchw))


def dny_entry(inputs: Runs, outputs: int, *, reflect: bool) -> ConvBlocks:
    """What comes before the first `Dny`: two convolutions at the size of the input."""
    return ConvBlocks(
        ConvBlock(inputs, outputs, 4, 1, slope=0.2, reflect=reflect),
        ConvBlock(outputs, outputs, 3, 1, slope=0.2, reflect=reflect),
    )


Upscaler = Upscale | ResizeImages | FastUpscale | HybridUpscale | Dny


def upscaler(
    method: str, inputs: Runs, filters: int, *, slope: float = 1.0, reflect: bool
) -> Upscaler:
    """[B, C, H, W] -> [B, filters, 2H, 2W], with LeakyReLU ``slope`` behind all that it does."""
    if method == "subpixel":
        return Upscale(inputs, filters, slope=0.1 * slope, reflect=reflect)
    if method == "resize_images":
        return ResizeImages(inputs, filters, slope=0.2 * slope)
    if method == "upscale_fast":
        return FastUpscale(inputs, filters, slope=slope, reflect=reflect)
    if method == "upscale_hybrid":
        return HybridUpscale(
            inputs, filters, slope=0.1 * slope, slope_enlarged=slope, reflect=reflect
        )
    return Dny(inputs, filters, slope=0.2 * slope, reflect=reflect)


class Level(nn.Module):
    """[B, C, H, W] -> [B, filters, 2H, 2W]: an upscale; then noise, a norm, a LeakyReLU, residual
    blocks, of which each may be missing.

    The LeakyReLU is done by the last of the others before it: a product of slopes, one pass.
    """

    def __init__(
        self,
        method: str,
        inputs: Runs,
        filters: int,
        *,
        noise: bool,
        norm: str,
        residuals: int,
        sides: int,
        reflect: bool,
    ):
        """``sides``: of a batch; see `BatchNorm`."""
        super().__init__()
        after = 1.0 if method == "upscale_dny" else 0.1
        self.slope = slope = 0.2 if residuals else after
        is_last, noise_is_last = norm == "none" and not noise, norm == "none"
        self.step = upscaler(
            method, inputs, filters, slope=slope if is_last else 1.0, reflect=reflect
        )
        self.channels = self.step.channels
        self.noise = Noise(self.channels, slope=slope if noise_is_last else 1.0) if noise else None
        self.norm: nn.Module | None = None
        if norm == "batch":
            self.norm = BatchNorm(self.channels, sides=sides)
        elif norm != "none":
            self.norm = NORMS[norm](self.channels)
        blocks = (Residual(self.channels, reflect=reflect) for _ in range(residuals))
        self.residuals = nn.Sequential(*blocks)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.step(x_bchw)
        if self.noise is not None:
            x_bchw = self.noise(x_bchw)
        if self.norm is not None:
            x_bchw = self.norm(x_bchw)
            x_bchw = (
                x_bchw if self.slope == 1 else bias_act(x_bchw, None, negative_slope=self.slope)
            )
        return self.residuals(x_bchw)
