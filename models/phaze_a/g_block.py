"""The g-block of phaze-a: noise and a shared style shape the code (Karras et al. 2019).

Shape letters: B faces, C channels, H rows, W columns, N nodes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.bias_act import bias_act
from ..alignment import Runs
from ..blocks import Dense, SameConv
from ..graph import Network, Value, describe
from ..initializers import glorot_uniform, he_normal
from ..norms import AdaptiveInstanceNorm
from .layers import Noise

# The reference's.
_STYLE = 512
_LAYERS = 2


class _Layer(nn.Module):
    """[B, C, H, W] -> the same shape: normalised to the style, plus noise, LeakyReLU 0.2."""

    def __init__(self, channels: Runs, *, convolves: bool):
        """``convolves``: a 3x3 convolution comes first; the noise is of what comes before it."""
        super().__init__()
        self.bias, self.gain = Dense(_STYLE, (1, channels)), Dense(_STYLE, (1, channels))
        self.noise = Noise(channels)
        self.blend = SameConv(channels, channels, 1, draw=glorot_uniform)
        self.conv = SameConv(channels, channels, 3, draw=glorot_uniform) if convolves else None
        self.norm = AdaptiveInstanceNorm()

    def forward(self, x_bchw: Tensor, style_bn: Tensor) -> Tensor:
        # Without its bias, which the last kernel of this layer adds together with the noise.
        noise_bchw = self.blend(self.noise(x_bchw))
        if self.conv is not None:
            x_bchw = bias_act(self.conv(x_bchw), self.conv.bias, negative_slope=1)
        x_bchw = self.norm(x_bchw, self.gain(style_bn), self.bias(style_bn))
        return bias_act(x_bchw, self.blend.bias, negative_slope=0.2, residual_bchw=noise_bchw)

    def describe(self, network: Network, x: Value, style: Value) -> Value:
        """Add the layers to a graph; their output."""
        bias, gain = (dense.describe(network, style) for dense in (self.bias, self.gain))
        noise = self.blend.describe(network, self.noise.describe(network, x))
        x = x if self.conv is None else self.conv.describe(network, x)
        x = network.add(
            "AdaInstanceNormalization",
            *(x, bias, gain),
            axis=-1,
            momentum=0.99,
            epsilon=1e-3,
            center=True,
            scale=True,
        )
        return network.leaky_relu(network.add("Add", x, noise), 0.2)


class GBlock(nn.Module):
    """Code [B, C, H, W] and style [B, N] -> code [B, C, H, W]."""

    def __init__(self, channels: Runs, nodes: int):
        super().__init__()
        lengths = (nodes, _STYLE, _STYLE)
        self.style = nn.ModuleList(Dense(length, _STYLE, draw=he_normal) for length in lengths)
        self.conv = SameConv(channels, channels, 3)
        self.noise = Noise(channels)
        # As in the reference, `conv` is the convolution of the first one.
        self.layers = nn.ModuleList(
            _Layer(channels, convolves=number > 0) for number in range(_LAYERS)
        )

    def forward(self, code_bchw: Tensor, style_bn: Tensor) -> Tensor:
        for number, dense in enumerate(self.style):
            # The reference activates between its dense layers, not before or behind them.
            style_bn = dense(F.leaky_relu(style_bn, 0.1) if number else style_bn)
        x_bchw = self.noise(self.conv(code_bchw), self.conv.bias)
        for layer in self.layers:
            x_bchw = layer(x_bchw, style_bn)
        return x_bchw

    def describe(self, network: Network, code: Value, style: Value) -> Value:
        """Add the layers to a graph; their output."""
        for number, dense in enumerate(self.style):
            style = network.leaky_relu(style, 0.1) if number else style
            style = describe(network, dense, style)
        x = self.noise.describe(network, self.conv.describe(network, code))
        for layer in self.layers:
            x = describe(network, layer, x, style)
        return x
