"""dfl-h128: the original's idea at 128 px in and out.

Shape letters: B faces, w = width (128), E = 4w channels of the code (2w with lowmem).

    face [B, 3, 128, 128] -> encoder -> [B, E, 16, 16] -> decoder of the side -> [B, 3, 128, 128]
"""

from dataclasses import dataclass

from torch import nn

from .autoencoder import Autoencoder, Build
from .blocks import Dense, Upscale, downscales, upscale_decoder
from .options import Options, option
from .registry import register


@register("dfl-h128")
class DflH128(Autoencoder):
    """The `dfl-h128` family."""

    input_px = 128
    output_px = (128,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        lowmem: bool = option(False)
        """Halve the code and all that follows it, for small GPUs."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        w, reflect, learn_mask = config.width, build.reflect_padding, build.learn_mask
        code = 2 * w if config.lowmem else 4 * w
        self.encoder = nn.Sequential(
            downscales(3, (w, 2 * w, 4 * w, 8 * w), reflect=reflect),
            Dense((8, 8 * w), code),
            Dense(code, (8, code)),
            Upscale(code, code, reflect=reflect),
        )
        widths = (code, code // 2, code // 4)
        self.decoder_a, self.decoder_b = (
            upscale_decoder(code, widths, learn_mask=learn_mask, reflect=reflect) for _ in "ab"
        )
