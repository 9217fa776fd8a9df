"""original: the first deepfakes autoencoder, 64 px in and out.

Shape letters: B faces, w = width (128), E = 8w latent values (4w with lowmem).

    face [B, 3, 64, 64] -> encoder -> [B, 4w, 8, 8] -> decoder of the side -> [B, 3, 64, 64]
"""

from dataclasses import dataclass

from torch import nn

from .autoencoder import Autoencoder, Build
from .blocks import Dense, Upscale, downscales, upscale_decoder
from .options import Options, option
from .registry import register


@register("original")
class Original(Autoencoder):
    """The `original` family."""

    input_px = 64
    output_px = (64,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        lowmem: bool = option(False)
        """Leave out the last downscale and halve the bottleneck, for small GPUs."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        w, reflect, learn_mask = config.width, build.reflect_padding, build.learn_mask
        widths = (w, 2 * w, 4 * w) if config.lowmem else (w, 2 * w, 4 * w, 8 * w)
        nodes = 4 * w if config.lowmem else 8 * w
        self.encoder = nn.Sequential(
            downscales(3, widths, reflect=reflect),
            Dense((64 // 2 ** len(widths), widths[-1]), nodes),
            Dense(nodes, (4, 8 * w)),
            Upscale(8 * w, 4 * w, reflect=reflect),
        )
        self.decoder_a, self.decoder_b = (
            upscale_decoder(4 * w, (2 * w, w, w // 2), learn_mask=learn_mask, reflect=reflect)
            for _ in "ab"
        )
