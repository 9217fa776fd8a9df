"""lightweight: a small model for GPUs of 2 GB and less, 64 px in and out.

Shape letters: B faces, w = width (128), 4w latent values.

    face [B, 3, 64, 64] -> encoder -> [B, 2w, 8, 8] -> decoder of the side -> [B, 3, 64, 64]
"""

from dataclasses import dataclass

from torch import nn

from .autoencoder import Autoencoder, Build
from .blocks import Dense, Upscale, downscales, upscale_decoder
from .options import Options, option
from .registry import register


@register("lightweight")
class Lightweight(Autoencoder):
    """The `lightweight` family."""

    input_px = 64
    output_px = (64,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        w, reflect, learn_mask = config.width, build.reflect_padding, build.learn_mask
        self.encoder = nn.Sequential(
            downscales(3, (w, 2 * w, 4 * w), reflect=reflect),
            Dense((8, 4 * w), 4 * w),
            Dense(4 * w, (4, 4 * w)),
            Upscale(4 * w, 2 * w, reflect=reflect),
        )
        self.decoder_a, self.decoder_b = (
            upscale_decoder(2 * w, (4 * w, 2 * w, w), learn_mask=learn_mask, reflect=reflect)
            for _ in "ab"
        )
