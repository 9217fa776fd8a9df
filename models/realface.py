"""realface: a residual encoder, and decoders that begin dense; input and output sizes apart.

Shape letters: B faces, S = input_size, e = complexity_encoder, w = edge of the decoder's first
picture, n = its upscales (w * 2^n = output_size).

    face [B, 3, S, S] -> encoder -> [B, 8e, S/16, S/16] -> decoder of the side
                                    -> [B, 3, output_size, output_size]
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .autoencoder import Autoencoder, Build, Outputs
from .blocks import ConvBlock, Dense, Residual, ToImage, Upscale, branch, residual_upscale
from .graph import Network, Value, describe
from .options import Options, option
from .registry import register


def _widths(channels: int, num_upscales: int) -> tuple[int, ...]:
    """Channels of all upscales but the first: each half of the one before."""
    return tuple(channels // 2**number for number in range(num_upscales - 1))


class _Decoder(nn.Module):
    """Two dense layers and an upscale; from there the face and, where learned, the mask."""

    def __init__(
        self,
        code: tuple[int, int],
        nodes: int,
        first: tuple[int, int],
        widths: tuple[int, ...],
        masks: tuple[int, ...],
        *,
        residual: bool,
        reflect: bool,
    ):
        """``masks``: channels of the mask's upscales; none: no mask is learned."""
        super().__init__()
        channels = first[1]
        self.dense = nn.Sequential(Dense(code, nodes), Dense(nodes, first))
        self.upscale = Upscale(channels, channels, slope=1, after=0.2, reflect=reflect)
        steps: list[nn.Module] = [Residual(channels, bias=False, reflect=reflect)]
        if residual:
            for before, after in zip((channels, *widths), widths[:-1], strict=False):
                steps += residual_upscale(before, after, residuals=0, reflect=reflect)
                steps.append(Residual(after, bias=False, reflect=reflect))
                steps.append(Residual(after, reflect=reflect))
            last = Upscale(widths[-2], widths[-1], reflect=reflect)
            self.face = nn.Sequential(*steps, last, ToImage(widths[-1], 3))
        else:
            self.face = nn.Sequential(*steps, *branch(channels, widths, 3, reflect=reflect))
        self.mask = branch(channels, masks, 1, reflect=reflect) if masks else None

    def forward(self, code_bchw: Tensor) -> Outputs:
        x_bchw = self.dense(code_bchw)
        if self.mask is None:
            return (self.face(self.upscale(x_bchw)),)
        # The reference has another slope before the mask: one convolution, two activations.
        for_face, for_mask = self.upscale.branches(x_bchw, 0.2, 0.1)
        return self.face(for_face), self.mask(for_mask)

    def describe(self, network: Network, code: Value) -> tuple[Value, ...]:
        """Add the layers of both branches to a graph; their outputs."""
        x = self.upscale.describe(network, describe(network, self.dense, code), after=False)
        face = describe(network, self.face, network.leaky_relu(x, 0.2))
        if self.mask is None:
            return (face,)
        return face, describe(network, self.mask, network.leaky_relu(x, 0.1))


@register("realface")
class Realface(Autoencoder):
    """The `realface` family."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        input_size: int = option(64, low=64, high=128, step=16)
        """Edge of the face that the encoder is given, in px."""

        # The reference's help says 16, its check 32.
        output_size: int = option(128, low=64, high=256, step=32)
        """Edge of the decoded face in px."""

        dense_nodes: int = option(1536, low=768, high=2048, step=64)
        """Size of B's bottleneck; A's is two thirds of it."""

        complexity_encoder: int = option(128, low=96, high=160, step=4)
        """Channels of the first convolution."""

        complexity_decoder: int = option(512, low=512, high=544, step=4)
        """Channels of B's second upscale; A's are two thirds of them."""

        width: int = option(64, low=4, high=64, step=4)
        """64ths of every width above and of the rest; less than 64 makes a smaller model."""

    tiny = Config(output_size=64, width=8)

    @classmethod
    def sizes(cls, options: Config) -> tuple[int, tuple[int, ...]]:
        return options.input_size, (options.output_size,)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        self.input_px, self.output_px = self.sizes(config)
        reflect = build.reflect_padding

        def scaled(width: int) -> int:
            return width * config.width // 64

        e = scaled(config.complexity_encoder)
        convs: list[nn.Module] = []
        for before, after in ((3, e), (e, 2 * e), (2 * e, 4 * e)):
            convs.append(ConvBlock(before, after, slope=0.2, reflect=reflect))
            convs += [Residual(after, reflect=reflect) for _ in range(2)]
        self.encoder = nn.Sequential(*convs, ConvBlock(4 * e, 8 * e, reflect=reflect))
        edge, num_upscales = dense_edge(config.input_size, config.output_size)
        # Fewer channels where the first picture is larger.
        code, filters = (config.input_size // 16, 8 * e), scaled(1024 - (edge - 4) * 64)
        nodes, channels = scaled(config.dense_nodes), scaled(config.complexity_decoder)
        # The reference's masks are as wide for A as for B, whatever the faces are.
        masks = _widths(scaled(384), num_upscales) if build.learn_mask else ()
        self.decoder_a = _Decoder(
            code,
            # Rounded down, as the reference does: its weights fit no other number.
            int(nodes / 1.5),
            (edge, int(filters / 1.5)),
            _widths(int(channels / 1.5), num_upscales),
            masks,
            residual=False,
            reflect=reflect,
        )
        self.decoder_b = _Decoder(
            code,
            nodes,
            (edge, filters),
            _widths(channels, num_upscales),
            masks,
            residual=True,
            reflect=reflect,
        )


def dense_edge(input_px: int, output_px: int) -> tuple[int, int]:
    """(edge of the decoder's first picture, upscales): the edge below 10 px that is nearest to a
    16th of the input; with fewer upscales where two are as near."""
    edges = [(output_px // 2**upscales, upscales) for upscales in (4, 5)]
    return min(
        (pair for pair in edges if pair[0] < 10), key=lambda pair: abs(16 * pair[0] - input_px)
    )
