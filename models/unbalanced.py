"""unbalanced: a plain decoder for A, which is only re-created, and a strong one for B.

Shape letters: B faces, S = input_size, q = S / 16, d = channels of the code (512, lowmem 384).

    face [B, 3, S, S] -> encoder -> [B, d, q, q] -> decoder of the side -> [B, 3, S, S]
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from .autoencoder import Autoencoder, Build
from .blocks import (
    ConvBlock,
    ConvBlocks,
    Decoder,
    Dense,
    ToImage,
    Upscale,
    branch,
    residual_upscale,
)
from .initializers import normal_002
from .norms import InstanceNorm
from .options import Options, option
from .registry import register


@register("unbalanced")
class Unbalanced(Autoencoder):
    """The `unbalanced` family."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Options):
        """Options of the family."""

        # Any multiple of 16 makes a whole model, though 64 is the usual step.
        input_size: int = option(128, low=64, high=512, step=16)
        """Edge of the face in px, in and out."""

        lowmem: bool = option(False)
        """Smaller widths in place of the four options below, and a plain decoder for B."""

        nodes: int = option(1024, low=512, high=4096, step=64)
        """Size of the bottleneck."""

        complexity_encoder: int = option(128, low=64, high=1024, step=16)
        """Channels of the first convolution."""

        complexity_decoder_a: int = option(384, low=64, high=1024, step=16)
        """Channels of A's first upscale."""

        complexity_decoder_b: int = option(512, low=64, high=1024, step=16)
        """Channels of B's first upscale."""

    tiny = Config(
        input_size=64,
        nodes=512,
        complexity_encoder=64,
        complexity_decoder_a=64,
        complexity_decoder_b=64,
    )

    @classmethod
    def sizes(cls, options: Config) -> tuple[int, tuple[int, ...]]:
        return options.input_size, (options.input_size,)

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        self.input_px, self.output_px = self.sizes(config)
        if config.lowmem:
            # For the widths below alone: `self.config` stays what the user chose.
            config = dataclasses.replace(
                config,
                nodes=512,
                complexity_encoder=128,
                complexity_decoder_a=320,
                complexity_decoder_b=384,
            )
        e, reflect = config.complexity_encoder, build.reflect_padding
        channels, small_px = 384 if config.lowmem else 512, config.input_size // 16
        widths = (e, 2 * e, 4 * e, 6 * e, 8 * e)
        # The reference normalises the first two alone.
        norms = (InstanceNorm(e), InstanceNorm(2 * e), None, None, None)
        pairs = zip((3, *widths), widths, norms, strict=False)
        convs = ConvBlocks(
            *(ConvBlock(i, o, norm=n, reflect=reflect, draw=normal_002) for i, o, n in pairs)
        )
        self.encoder = nn.Sequential(
            convs,
            # Rounded up, as five halvings with "same" padding are.
            Dense((-(-config.input_size // 32), 8 * e), config.nodes, draw=normal_002),
            Dense(config.nodes, (small_px, channels), draw=normal_002),
        )
        self.decoder_a = self._plain_decoder(
            channels,
            _narrowing(config.complexity_decoder_a, 1, 1, 2, 4),
            dropouts=(0.25, 0.15 if config.lowmem else 0.25),
        )
        b = config.complexity_decoder_b
        if config.lowmem:
            self.decoder_b = self._plain_decoder(channels, _narrowing(b, 1, 2, 4, 8))
        else:
            self.decoder_b = self._strong_decoder(channels, _narrowing(b, 1, 1, 2, 4))

    def _plain_decoder(
        self, inputs: int, widths: tuple[int, ...], dropouts: tuple[float, ...] = ()
    ) -> Decoder:
        """`Upscale`s; after the first ones whole channels are dropped with these chances."""
        reflect = self.build.reflect_padding
        face = [*branch(inputs, widths, 3, kernel=5, reflect=reflect, draw=normal_002)]
        for number, chance in enumerate(dropouts):
            # Each one inserted has moved the upscales behind it by a place.
            face.insert(2 * number + 1, nn.Dropout2d(chance))
        return Decoder(nn.Sequential(*face), self._mask(inputs, widths))

    def _strong_decoder(self, inputs: int, widths: tuple[int, ...]) -> Decoder:
        reflect, steps = self.build.reflect_padding, []
        for before, after in zip((inputs, *widths), widths[:-1], strict=False):
            steps += residual_upscale(
                before, after, kernel=5, reflect=reflect, draw=normal_002, first=normal_002
            )
        last = Upscale(widths[-2], widths[-1], kernel=5, reflect=reflect, draw=normal_002)
        face = nn.Sequential(*steps, last, ToImage(widths[-1], 3))
        return Decoder(face, self._mask(inputs, widths))

    def _mask(self, inputs: int, widths: tuple[int, ...]) -> nn.Sequential | None:
        if not self.build.learn_mask:
            return None
        # In all families of the reference masks have kernels of 3 and the blocks' own draw.
        return branch(inputs, widths, 1, reflect=self.build.reflect_padding)


def _narrowing(width: int, *divisors: int) -> tuple[int, ...]:
    return tuple(width // divisor for divisor in divisors)
