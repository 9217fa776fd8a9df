"""iae: one decoder; what tells the sides apart lies between encoder and decoder. 64 px in and out.

Shape letters: B faces, w = width (128).

    face [B, 3, 64, 64] -> encoder -> [B, 8w, 4, 4] -> inter of the side  -> [B, 4w, 4, 4]
                                                    -> inter_both         -> [B, 4w, 4, 4]
    both, the side's own first -> decoder of both sides -> [B, 3, 64, 64]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder, Build, Codes, Outputs, Side
from .blocks import Dense, downscales, upscale_decoder
from .graph import Network, Value, flattened
from .options import Options, option
from .registry import register


@register("iae")
class Iae(Autoencoder):
    """The `iae` family."""

    input_px = 64
    output_px = (64,)
    has_one_decoder = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        w, reflect = config.width, build.reflect_padding
        self.encoder = downscales(3, (w, 2 * w, 4 * w, 8 * w), reflect=reflect)
        self.decoder = upscale_decoder(
            # Two runs: the concatenation is padded part by part.
            (4 * w, 4 * w),
            (4 * w, 2 * w, w, w // 2),
            learn_mask=build.learn_mask,
            reflect=reflect,
        )
        self.inter_a, self.inter_b, self.inter_both = (
            nn.Sequential(Dense((4, 8 * w), 8 * w), Dense(8 * w, (4, 4 * w))) for _ in range(3)
        )

    def encode(self, faces_nchw: Tensor) -> Codes:
        code = self.encoder(faces_nchw)
        return code, self.inter_both(code)

    def side_code(self, codes: Codes, side: Side) -> Codes:
        code, of_both = codes
        own = (self.inter_a if side == "a" else self.inter_b)(code)
        return (torch.cat((own, of_both), dim=1),)

    def decode(self, codes: Codes, _side: Side) -> Outputs:
        return self.decoder(*codes)

    def describe_side(self, model: Network, face: Value, side: Side) -> tuple[Value, ...]:
        (code,) = model.run("encoder", flattened(self.encoder), face)
        inters = (f"inter_{side}", "inter_both")
        codes = [value for name in inters for value in model.run(name, getattr(self, name), code)]
        return model.run("decoder", self.decoder, model.add("Concatenate", *codes, axis=-1))
