"""dlight: a dense-block encoder at 128 px, a light decoder for A, a strong or a fast one for B.

Shape letters: B faces, w = width (64), r = output_size / 64.

    face [B, 3, 128, 128] -> encoder -> [B, 16w, 4, 4] -> decoder of the side -> [B, 3, 64r, 64r]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bias_act import bias_act
from ..kernels.enlarge import enlarge
from .alignment import Runs
from .autoencoder import Autoencoder, Build, Codes, Outputs, Side
from .batch_norm import BatchNorm
from .blocks import (
    ConvBlock,
    Dense,
    FastUpscale,
    HybridUpscale,
    Residual,
    ToImage,
    Upscale,
)
from .graph import Network, Value, describe
from .options import Options, option
from .registry import register

_NODES = {"lowmem": 10, "fair": 18, "best": 26}  # times the width


class _Densescale(nn.Module):
    """[B, C, H, W] -> [B, outputs + C, H/2, W/2]: a convolution, beside it the input's average."""

    def __init__(self, inputs: Runs, outputs: int, reflect: bool):
        super().__init__()
        self.conv = ConvBlock(inputs, outputs, reflect=reflect)
        self.channels = (outputs, *inputs)

    def forward(self, x_bchw: Tensor) -> Tensor:
        pooled = bias_act(F.avg_pool2d(x_bchw, 2), None, negative_slope=0.1)
        return torch.cat((self.conv(x_bchw), pooled), dim=1)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers of this block to a graph; their output."""
        pooled = network.add("AveragePooling2D", x, pool_size=2, strides=2, padding="valid")
        first = self.conv.describe(network, x)
        return network.add("Concatenate", first, network.leaky_relu(pooled, 0.1), axis=-1)


class _Enlarged(nn.Module):
    """A stem: the code, enlarged bilinearly."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor, self.channels = factor, (channels,)

    def starts(self, x_bchw: Tensor, count: int) -> tuple[Tensor, ...]:
        """Inputs of the face's branch and, if two are asked for, of the mask's."""
        return (enlarge(x_bchw, self.factor),) * count

    def describe_starts(self, network: Network, x: Value) -> tuple[Value, Value]:
        """Add the stem to a graph; the inputs of the face's branch and of the mask's."""
        x = network.add("UpSampling2D", x, size=self.factor, interpolation="bilinear")
        return x, x


class _Hybrid(HybridUpscale):
    """A stem: the code, scaled up by `HybridUpscale`."""

    def starts(self, x_bchw: Tensor, count: int) -> tuple[Tensor, ...]:
        """Inputs of the face's branch and, if two are asked for, of the mask's."""
        # The reference has another slope before the mask: the same convolutions, activated twice.
        return self.branches(x_bchw, *((0.2, 0.2), (0.1, 0.1))[:count])

    def describe_starts(self, network: Network, x: Value) -> tuple[Value, Value]:
        """Add the stem to a graph; the inputs of the face's branch and of the mask's."""
        x = self.describe(network, x, after=False)
        return network.leaky_relu(x, 0.2), network.leaky_relu(x, 0.1)


class _Shuffled(Upscale):
    """A stem: the code, scaled up by `Upscale`."""

    def starts(self, x_bchw: Tensor, count: int) -> tuple[Tensor, ...]:
        """Inputs of the face's branch and, if two are asked for, of the mask's."""
        return (self(x_bchw),) * count

    def describe_starts(self, network: Network, x: Value) -> tuple[Value, Value]:
        """Add the stem to a graph; the inputs of the face's branch and of the mask's."""
        x = self.describe(network, x)
        return x, x


class _Decoder(nn.Module):
    """A stem, from there the face and, where learned, the mask."""

    def __init__(
        self,
        stem: _Enlarged | _Hybrid | _Shuffled,
        face: Sequence[nn.Module],
        masks: tuple[int, ...],
        build: Build,
    ):
        super().__init__()
        self.stem, self.face, self.mask = stem, nn.Sequential(*face), None
        if build.learn_mask:
            self.mask = nn.Sequential(*_hybrids(stem.channels, masks, 1, build.reflect_padding))

    def forward(self, code_bchw: Tensor) -> Outputs:
        branches = (self.face,) if self.mask is None else (self.face, self.mask)
        starts = self.stem.starts(code_bchw, len(branches))
        return tuple(branch(start) for branch, start in zip(branches, starts, strict=True))

    def describe(self, network: Network, code: Value) -> tuple[Value, ...]:
        """Add the layers of all branches to a graph; their outputs."""
        for_face, for_mask = self.stem.describe_starts(network, code)
        face = describe(network, self.face, for_face)
        return (face,) if self.mask is None else (face, describe(network, self.mask, for_mask))


def _hybrids(inputs: Runs, widths: tuple[int, ...], outputs: int, reflect: bool) -> list[nn.Module]:
    """`HybridUpscale` to each width in turn, then a picture or a mask."""
    steps: list[nn.Module] = []
    for width in widths:
        step = HybridUpscale(inputs, width, reflect=reflect)
        steps, inputs = [*steps, step], step.channels
    return [*steps, ToImage(inputs, outputs)]


@register("dlight")
class Dlight(Autoencoder):
    """The `dlight` family."""

    input_px = 128

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        features: str = option("best", choices=("lowmem", "fair", "best"))
        """Size of the bottleneck: how many different faces and angles it can tell apart."""

        details: str = option("good", choices=("fast", "good"))
        """B's decoder: quick, or with residual blocks."""

        output_size: int = option(256, low=128, high=384, step=128)
        """Edge of the decoded face in px."""

        width: int = option(64, low=8, high=128, step=8)
        """Channels of the encoder's second stage; all others follow it."""

    tiny = Config(features="lowmem", details="fast", output_size=128, width=8)

    @classmethod
    def sizes(cls, options: Config) -> tuple[int, tuple[int, ...]]:
        return cls.input_px, (options.output_size,)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        self.output_px = (config.output_size,)
        reflect, factor = build.reflect_padding, config.output_size // 64
        w = config.width
        # 48 of 64, as the reference has it.
        growth = 3 * w // 4 if config.features == "lowmem" else w
        nodes, code, convs = w * _NODES[config.features], 16 * w, []
        channels: Runs = (3,)
        for width in (growth // 2, growth, 2 * growth, 4 * growth, 8 * growth):
            convs.append(_Densescale(channels, width, reflect))
            channels = convs[-1].channels
        self.encoder: nn.Sequential = nn.Sequential(
            *convs,
            Dense((4, channels), nodes),
            nn.Dropout(0.05),
            Dense(nodes, (4, code)),
            nn.Dropout(0.05),
        )
        self.decoder_a = _Decoder(
            _Enlarged(code, factor),
            _hybrids((code,), (4 * w, 2 * w, w, w // 2), 3, reflect),
            _masks(w),
            build,
        )
        self.is_fast = config.details == "fast"
        if self.is_fast:
            # The reference's name of the sub-network, which its files have.
            self.decoder_b_fast = _fast_decoder(w, factor, build)
        else:
            self.decoder_b = _good_decoder(w, factor, build)

    def decode(self, codes: Codes, side: Side) -> Outputs:
        if self.is_fast and side == "b":
            return self.decoder_b_fast(*codes)
        return super().decode(codes, side)

    def describe_side(self, model: Network, face: Value, side: Side) -> tuple[Value, ...]:
        name = "decoder_b_fast" if self.is_fast and side == "b" else f"decoder_{side}"
        codes = model.run("encoder", self._describe_encoder, face)
        return model.run(name, getattr(self, name), *codes)

    def _describe_encoder(self, network: Network, x: Value) -> Value:
        """Add the encoder to a graph; dropout comes before its vector becomes a picture."""
        code, dropout = cast(Dense, self.encoder[-2]), self.encoder[-1]
        x = describe(network, self.encoder[:-2], x)
        x = describe(network, dropout, code.describe_product(network, x))
        edge_px, channels = code.outputs
        return network.add("Reshape", x, target_shape=(edge_px, edge_px, sum(channels)))


def _masks(w: int) -> tuple[int, ...]:
    """Channels of a mask's upscales."""
    return 2 * w, w, w // 2, w // 4


def _good_decoder(w: int, factor: int, build: Build) -> _Decoder:
    reflect = build.reflect_padding
    stem = _Hybrid(16 * w, 8 * w, factor=factor, slope=1, reflect=reflect)
    inputs = stem.channels
    face: list[nn.Module] = _residuals(inputs, 3, reflect)
    # (channels, residual blocks of which the first has biases, whether a batch norm follows)
    for width, num_residuals, has_biases, has_norm in (
        (8 * w, 2, True, True),
        (4 * w, 1, True, False),
        (2 * w, 1, False, True),
    ):
        step = HybridUpscale(inputs, width, slope=1, after=0.2, reflect=reflect)
        inputs = step.channels
        face += [step, *_residuals(inputs, num_residuals, reflect, has_biases)]
        # This decoder meets B's faces alone.
        face += [BatchNorm(width, sides=1)] if has_norm else []
    face += _hybrids(inputs, (w,), 3, reflect)
    return _Decoder(stem, face, _masks(w), build)


def _residuals(
    channels: Runs, count: int, reflect: bool, first_has_biases: bool = True
) -> list[nn.Module]:
    """`Residual` blocks, all but perhaps the first without biases."""
    return [
        Residual(channels, bias=first_has_biases and number == 0, reflect=reflect)
        for number in range(count)
    ]


def _fast_decoder(w: int, factor: int, build: Build) -> _Decoder:
    reflect, inputs = build.reflect_padding, 8 * w
    stem = _Shuffled(16 * w, inputs, factor=factor, reflect=reflect)
    face: list[nn.Module] = []
    for width in (8 * w, 4 * w, 2 * w, w):
        face.append(FastUpscale(inputs, width, reflect=reflect))
        inputs = width
    return _Decoder(stem, [*face, ToImage(inputs, 3)], _masks(w), build)
