"""villain: a deep residual encoder at 128 px in and out.

Shape letters: B faces, w = width (128), E = 8w latent values (4w with lowmem).

    face [B, 3, 128, 128] -> encoder -> [B, 4w, 16, 16] -> decoder of the side -> [B, 3, 128, 128]
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels.bias_act import bias_act, bias_act_depth_to_space
from .autoencoder import Autoencoder, Build
from .blocks import (
    ConvBlock,
    Decoder,
    Dense,
    Residual,
    SameConv,
    SeparableConv,
    ToImage,
    Upscale,
    branch,
    residual_upscale,
)
from .graph import Network, Value, describe
from .initializers import normal_002
from .options import Options, option
from .registry import register


class _ResidualTrunk(nn.Module):
    """[B, 3, H, W] -> [B, outputs, H/2, W/2]: a convolution, and around many `Residual`s a path
    past them, which begins before the activation."""

    def __init__(self, outputs: int, num_residuals: int, reflect: bool):
        super().__init__()
        self.conv = SameConv(3, outputs, 5, 2, reflect=reflect, draw=normal_002)
        self.residuals = nn.Sequential(
            *(Residual(outputs, reflect=reflect, draw=normal_002) for _ in range(num_residuals))
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        # One product, of which either path takes another slope.
        product = self.conv(x_bchw)
        past = bias_act(product, self.conv.bias, negative_slope=0.1)
        return self.residuals(bias_act(product, self.conv.bias, negative_slope=0.2)) + past

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        x = self.conv.describe(network, x)
        y = describe(network, self.residuals, network.leaky_relu(x, 0.2))
        return network.add("Add", y, network.leaky_relu(x, 0.1))


class _ShuffledConv(nn.Module):
    """[B, C, H, W] -> [B, outputs, H, W]: 5x5 of stride 2, LeakyReLU 0.1, depth-to-space."""

    def __init__(self, inputs: int, outputs: int, reflect: bool):
        super().__init__()
        # `shuffled`: what pads the channels goes to each of the four pixels alike.
        self.conv = SameConv(inputs, outputs, 5, 2, reflect=reflect, shuffled=4, draw=normal_002)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return bias_act_depth_to_space(self.conv(x_bchw), self.conv.bias, negative_slope=0.1)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        x = network.leaky_relu(self.conv.describe(network, x), 0.1)
        return network.add("PixelShuffler", x, size=2)


@register("villain")
class Villain(Autoencoder):
    """The `villain` family."""

    input_px = 128
    output_px = (128,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        lowmem: bool = option(False)
        """Half as many residual blocks, half the bottleneck, one downscale less."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(lowmem=True, width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        w, reflect, is_small = config.width, build.reflect_padding, config.lowmem
        # Of all but pictures and masks, as in the reference.
        drawn: dict[str, Any] = {"reflect": reflect, "draw": normal_002}
        steps: list[nn.Module] = [
            _ResidualTrunk(w, 8 if is_small else 16, reflect),
            _ShuffledConv(w, w // 4, reflect),
            _ShuffledConv(w // 4, w // 4, reflect),
            ConvBlock(w // 4, w, **drawn),
            SeparableConv(w, 2 * w, draw=normal_002, mix=normal_002),
            ConvBlock(2 * w, 4 * w, **drawn),
        ]
        if is_small:
            flat, nodes = (8, 4 * w), 4 * w
        else:
            steps.append(SeparableConv(4 * w, 8 * w, draw=normal_002, mix=normal_002))
            flat, nodes = (4, 8 * w), 8 * w
        self.encoder = nn.Sequential(
            *steps,
            Dense(flat, nodes, draw=normal_002),
            Dense(nodes, (8, 8 * w), draw=normal_002),
            Upscale(8 * w, 4 * w, **drawn),
        )
        self.decoder_a, self.decoder_b = (self._decoder() for _ in "ab")

    def _decoder(self) -> Decoder:
        w, reflect = self.config.width, self.build.reflect_padding
        widths, steps = (4 * w, 2 * w, w), []
        for before, after in zip((4 * w, *widths), widths, strict=False):
            steps += residual_upscale(
                before, after, reflect=reflect, draw=normal_002, first=normal_002
            )
        face = nn.Sequential(*steps, ToImage(w, 3))
        mask = branch(4 * w, widths, 1, reflect=reflect) if self.build.learn_mask else None
        return Decoder(face, mask)
