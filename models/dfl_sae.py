"""dfl-sae: residual decoders at 64 to 256 px in and out, wired as df or as liae.

Shape letters: B faces, S = input_size, q = S / 16, n = 3 encoder_dims, m = 3 decoder_dims,
e = autoencoder_dims.

    df     face [B, 3, S, S] -> encoder_df -> [B, e, 2q, 2q] -> decoder of the side -> [B, 3, S, S]
    liae   face -> encoder_liae -> [B, 8n, q, q] -> intermediate_both, intermediate_b
                                                                       -> [B, 2e, 2q, 2q] each
           A: both twice; B: b, then both -> decoder_both -> [B, 3, S, S]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .alignment import Runs
from .autoencoder import Autoencoder, Build, Codes, Outputs, Side
from .blocks import Dense, ToImage, Upscale, branch, downscales, residual_upscale
from .graph import Network, Value, describe, flattened
from .options import Options, option
from .registry import register


class _Level(nn.Module):
    """[B, C, H, W] -> [B, width, 2H, 2W] and, where it is to show one, the face at that size."""

    def __init__(self, inputs: int | Runs, width: int, *, reflect: bool, shows: bool):
        super().__init__()
        self.steps = nn.Sequential(*residual_upscale(inputs, width, residuals=2, reflect=reflect))
        self.to_image = ToImage(width, 3) if shows else None

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, Tensor | None]:
        x_bchw = self.steps(x_bchw)
        return x_bchw, None if self.to_image is None else self.to_image(x_bchw)

    def describe(self, network: Network, x: Value) -> tuple[Value, ...]:
        """Add the layers of this block to a graph; the picture and, if it shows one, the face."""
        x = describe(network, self.steps, x)
        return (x,) if self.to_image is None else (x, self.to_image.describe(network, x))


class _Decoder(nn.Module):
    """Faces, small to large, of each level that shows one; then the mask."""

    def __init__(self, inputs: int | Runs, dims: int, *, multiscale: bool, build: Build):
        super().__init__()
        reflect, widths = build.reflect_padding, (24 * dims, 12 * dims, 6 * dims)
        self.levels = nn.ModuleList(
            _Level(before, width, reflect=reflect, shows=multiscale or width == widths[-1])
            for before, width in zip((inputs, *widths), widths, strict=False)
        )
        # The mask's branch is three times narrower.
        narrow = (8 * dims, 4 * dims, 2 * dims)
        self.mask = branch(inputs, narrow, 1, reflect=reflect) if build.learn_mask else None

    def forward(self, code_bchw: Tensor) -> Outputs:
        x_bchw, faces = code_bchw, []
        for level in self.levels:
            x_bchw, face = level(x_bchw)
            faces += [] if face is None else [face]
        return (*faces,) if self.mask is None else (*faces, self.mask(code_bchw))

    def describe(self, network: Network, code: Value) -> tuple[Value, ...]:
        """Add the layers of all branches to a graph; the outputs."""
        x, faces = code, []
        for level in self.levels:
            x, *shown = describe(network, level, x)
            faces += shown
        return (*faces,) if self.mask is None else (*faces, describe(network, self.mask, code))


@register("dfl-sae")
class DflSae(Autoencoder):
    """The `dfl-sae` family."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        input_size: int = option(128, low=64, high=256, step=16)
        """Edge of the face in px, in and out."""

        architecture: str = option("df", choices=("df", "liae"))
        """df: one decoder a side; liae: one decoder, and an intermediate that only B has."""

        autoencoder_dims: int = option(0, low=0, high=1024, step=32)
        """Size of the code; 0: 512 with df, 256 with liae."""

        encoder_dims: int = option(42, low=21, high=85)
        """A third of the encoder's first width."""

        decoder_dims: int = option(21, low=10, high=85)
        """A 24th of the decoder's first width."""

        multiscale_decoder: bool = option(False)
        """Decode faces of a quarter and half the size as well, and train on them."""

    tiny = Config(input_size=64, autoencoder_dims=32, encoder_dims=21, decoder_dims=10)

    @classmethod
    def sizes(cls, options: Config) -> tuple[int, tuple[int, ...]]:
        size = options.input_size
        return size, (size // 4, size // 2, size) if options.multiscale_decoder else (size,)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        self.input_px, self.output_px = self.sizes(config)
        self.is_df = config.architecture == "df"
        self.has_one_decoder = not self.is_df
        code, reflect = (
            config.autoencoder_dims or (512 if self.is_df else 256),
            build.reflect_padding,
        )
        widths = tuple(3 * config.encoder_dims * factor for factor in (1, 2, 4, 8))
        small_px = config.input_size // 16

        def bottleneck(channels: int) -> list[nn.Module]:
            return [
                Dense((small_px, widths[-1]), code),
                Dense(code, (small_px, channels)),
                Upscale(channels, channels, reflect=reflect),
            ]

        def decoder(inputs: int | Runs) -> _Decoder:
            multiscale = config.multiscale_decoder
            return _Decoder(inputs, config.decoder_dims, multiscale=multiscale, build=build)

        convs = downscales(3, widths, reflect=reflect)
        if self.is_df:
            # The reference's name of the sub-network, which its files and its users have.
            self.freeze_layers = self.load_layers = ("encoder_df",)
            self.encoder_df = nn.Sequential(convs, *bottleneck(code))
            self.decoder_a, self.decoder_b = decoder(code), decoder(code)
        else:
            self.freeze_layers = self.load_layers = ("encoder_liae",)
            self.encoder_liae = convs
            # Before B's, as the reference's files have their weights.
            self.intermediate_both = nn.Sequential(*bottleneck(2 * code))
            self.intermediate_b = nn.Sequential(*bottleneck(2 * code))
            # Two runs, not one: a concatenation is padded part by part.
            self.decoder_both = decoder((2 * code, 2 * code))

    def encode(self, faces_nchw: Tensor) -> Codes:
        if self.is_df:
            return (self.encoder_df(faces_nchw),)
        # What both sides share once: the reference evaluates it for each, and for A twice.
        code = self.encoder_liae(faces_nchw)
        return code, self.intermediate_both(code)

    def side_code(self, codes: Codes, side: Side) -> Codes:
        if self.is_df:
            return codes
        code, of_both = codes
        # A has no intermediate of its own, and takes that of both in its place.
        first = of_both if side == "a" else self.intermediate_b(code)
        return (torch.cat((first, of_both), dim=1),)

    def decode(self, codes: Codes, side: Side) -> Outputs:
        return super().decode(codes, side) if self.is_df else self.decoder_both(*codes)

    @property
    def graph_name(self) -> str:
        return f"dfl_sae_{self.config.architecture}"

    def describe_side(self, model: Network, face: Value, side: Side) -> tuple[Value, ...]:
        if self.is_df:
            (code,) = model.run("encoder_df", self.encoder_df, face)
            name = f"decoder_{side}"
            return model.run(name, getattr(self, name), code)
        (code,) = model.run("encoder_liae", flattened(self.encoder_liae), face)
        own = () if side == "a" else model.run("intermediate_b", self.intermediate_b, code)
        both = model.run("intermediate_both", self.intermediate_both, code)
        (first,), (second,) = own or both, both  # A's twice, of one call
        joined = model.add("Concatenate", first, second, axis=-1)
        return model.run("decoder_both", self.decoder_both, joined)
