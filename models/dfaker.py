"""dfaker: the original's encoder, a decoder with residual blocks; 64 px in and 128 out, or twice.

Shape letters: B faces, w = width (128), S = output_size.

    face [B, 3, S/2, S/2] -> encoder -> [B, 4w, 8, 8] -> decoder of the side -> [B, 3, S, S]
"""

from dataclasses import dataclass

from torch import nn

from .autoencoder import Autoencoder, Build
from .blocks import Decoder, Dense, ToImage, Upscale, branch, downscales, residual_upscale
from .initializers import normal_002
from .options import Options, option
from .registry import register


@register("dfaker")
class Dfaker(Autoencoder):
    """The `dfaker` family."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        output_size: int = option(128, low=128, high=256, step=128)
        """Edge of the decoded face in px; the encoder is given half of it."""

        width: int = option(128, low=8, high=512, step=8)
        """Channels of the first convolution; all others follow it."""

    tiny = Config(width=8)

    @classmethod
    def sizes(cls, options: Config) -> tuple[int, tuple[int, ...]]:
        return options.output_size // 2, (options.output_size,)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        self.input_px, self.output_px = self.sizes(config)
        w, reflect = config.width, build.reflect_padding
        self.encoder = nn.Sequential(
            downscales(3, (w, 2 * w, 4 * w, 8 * w), reflect=reflect),
            Dense((self.input_px // 16, 8 * w), 8 * w),
            Dense(8 * w, (4, 8 * w)),
            Upscale(8 * w, 4 * w, reflect=reflect),
        )
        self.decoder_a, self.decoder_b = (self._decoder() for _ in "ab")

    def _decoder(self) -> Decoder:
        w, reflect = self.config.width, self.build.reflect_padding
        widths = (4 * w, 2 * w, w) if self.config.output_size == 128 else (8 * w, 4 * w, 2 * w, w)
        steps: list[nn.Module] = []
        for before, after in zip((4 * w, *widths), widths, strict=False):
            # Of a residual block's first convolution; the second always has its own.
            steps += residual_upscale(before, after, reflect=reflect, first=normal_002)
        steps += [Upscale(w, w // 2, reflect=reflect), ToImage(w // 2, 3)]
        face, mask = nn.Sequential(*steps), None
        if self.build.learn_mask:
            mask = branch(4 * w, (*widths, w // 2), 1, reflect=reflect)
        return Decoder(face, mask)
