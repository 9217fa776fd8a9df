"""Layers that only phaze-a has.

Shape letters: B faces, C channels, H rows, W columns.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.bias_act import bias_act
from ...kernels.enlarge import enlarge
from ...kernels.wide_products import convolution
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
from ..graph import Network, Value, describe
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

    def describe(self, network: Network, x: Value) -> Value:
        """Add the noise, without the LeakyReLU, to a graph; its output."""
        return network.add("GaussianNoise", x, stddev=1.0)


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

    def describe(self, network: Network, x: Value) -> Value:
        """Add this layer to a graph; its output."""
        target = (self.edge_px, self.edge_px, sum(self.channels))
        return network.add("Reshape", x, target_shape=target)


class TransposedConv(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: transposed 3x3 convolution of stride 2.

    Its bias is not added here but by the kernel that follows it.
    """

    def __init__(self, inputs: Runs, outputs: int):
        super().__init__()
        self.inputs, self.channels = inputs, runs_of(outputs)
        self.conv = uninitialized(nn.ConvTranspose2d, sum(inputs), outputs, 3, 2, 1, 1)
        # Keras's own, which the reference leaves for this kind of layer.
        self.conv.draw = glorot_uniform

    def forward(self, x_bchw: Tensor) -> Tensor:
        return convolution(x_bchw, self.conv.weight, 2, 1, output_padding=1, is_transposed=True)

    def describe(self, network: Network, x: Value) -> Value:
        """Add this layer to a graph; its output, with the bias."""
        return network.add(
            "Conv2DTranspose",
            x,
            weights=self.conv,
            filters=sum(self.channels),
            kernel_size=3,
            strides=2,
            padding="same",
            use_bias=True,
        )

    def align(self, multiple: int) -> None:
        """Pad the channels to a multiple; see `alignment`."""
        # A transposed kernel has its inputs first.
        by_output = axis(1, self.channels, 1, multiple)
        pad_parameter(self.conv, "weight", (axis(0, self.inputs, 1, multiple), by_output))
        pad_parameter(self.conv, "bias", (axis(0, self.channels, 1, multiple),))


class ResizeImages(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: LeakyReLU of the sum of a convolution of the enlarged
    picture and a transposed convolution: 0.2, then ``after``."""

    def __init__(self, inputs: Runs, outputs: int, *, after: float):
        super().__init__()
        self.after, self.slope, self.channels = after, 0.2 * after, runs_of(outputs)
        self.enlarged = SameConv(inputs, outputs, 3)
        self.transposed = TransposedConv(inputs, outputs)

    def forward(self, x_bchw: Tensor) -> Tensor:
        # Both at once, in the one pass that follows: a sum of sums.
        bias = self.enlarged.conv.bias + self.transposed.conv.bias
        product, transposed = self.enlarged(enlarge(x_bchw)), self.transposed(x_bchw)
        return bias_act(product, bias, negative_slope=self.slope, residual_bchw=transposed)

    def describe(self, network: Network, x: Value, *, after: bool = True) -> Value:
        """Add the layers of this block to a graph; their output. ``after``: see `Upscale`."""
        enlarged = network.add("KResizeImages", x, size=2, interpolation="bilinear")
        enlarged = self.enlarged.describe(network, enlarged)
        transposed = self.transposed.describe(network, x)
        x = network.leaky_relu(network.add("Add", enlarged, transposed), 0.2)
        return network.leaky_relu(x, self.after) if after else x


class Dny(nn.Module):
    """[B, C, H, W] -> [B, outputs, 2H, 2W]: enlarged, then two 3x3 convolutions with LeakyReLU 0.2,
    the second also with ``after``."""

    def __init__(self, inputs: Runs, outputs: int, *, after: float, reflect: bool):
        super().__init__()
        self.convs = ConvBlocks(
            ConvBlock(inputs, outputs, 3, 1, slope=0.2, reflect=reflect),
            ConvBlock(outputs, outputs, 3, 1, slope=0.2 * after, reflect=reflect),
        )
        self.after, self.channels = after, self.convs.channels

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.convs(enlarge(x_bchw))

    def describe(self, network: Network, x: Value, *, after: bool = True) -> Value:
        """Add the layers of this block to a graph; their output. ``after``: see `Upscale`."""
        x = network.add("UpSampling2D", x, size=2, interpolation="bilinear")
        for block in self.convs:
            x = network.leaky_relu(cast(ConvBlock, block).conv.describe(network, x), 0.2)
        return network.leaky_relu(x, self.after) if after else x


def dny_entry(inputs: Runs, outputs: int, *, reflect: bool) -> ConvBlocks:
    """What comes before the first `Dny`: two convolutions at the size of the input."""
    return ConvBlocks(
        ConvBlock(inputs, outputs, 4, 1, slope=0.2, reflect=reflect),
        ConvBlock(outputs, outputs, 3, 1, slope=0.2, reflect=reflect),
    )


Upscaler = Upscale | ResizeImages | FastUpscale | HybridUpscale | Dny


def upscaler(
    method: str, inputs: Runs, filters: int, *, after: float = 1.0, reflect: bool
) -> Upscaler:
    """[B, C, H, W] -> [B, filters, 2H, 2W], with LeakyReLU ``after`` behind all that it does."""
    if method == "subpixel":
        return Upscale(inputs, filters, after=after, reflect=reflect)
    if method == "resize_images":
        return ResizeImages(inputs, filters, after=after)
    if method == "upscale_fast":
        return FastUpscale(inputs, filters, after=after, reflect=reflect)
    if method == "upscale_hybrid":
        return HybridUpscale(inputs, filters, after=after, reflect=reflect)
    return Dny(inputs, filters, after=after, reflect=reflect)


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
            method, inputs, filters, after=slope if is_last else 1.0, reflect=reflect
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

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        x = self.step.describe(network, x, after=False)
        for part in filter(None, (self.noise, self.norm)):
            x = describe(network, part, x)
        return describe(network, self.residuals, network.leaky_relu(x, self.slope))
