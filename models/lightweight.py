"""lightweight: a small model for GPUs of 2 GB and less, 64 px in and out.

Shape letters: B faces, w = width (128), 4w latent values.

    face [B, 3, 64, 64] -> encoder -> [B, 2w, 8, 8] -> decoder of the side -> [B, 3, 64, 64]
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .autoencoder import Autoencoder, Build, Codes, Outputs, Side, require_step
from .blocks import Bottleneck, Downscales, Upscale, UpscaleDecoder
from .registry import register


@register("lightweight")
class Lightweight(Autoencoder):
    """The `lightweight` family."""

    input_px = 64
    output_px = (64,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Options of the family."""

        width: int = 128
        """Channels of the first convolution, 8 to 512 in steps of 8; all others follow it."""

        def __post_init__(self) -> None:
            require_step("lightweight.width", self.width, 8, 512, 8)

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__()
        self.config, self.build = config, build
        w, reflect = config.width, build.reflect_padding
        widths = (w, 2 * w, 4 * w)
        self.encoder = nn.Sequential(
            Downscales(3, widths, reflect=reflect),
            Bottleneck(8 * 8, 4 * w, 4 * w, 4 * w, 4),
            Upscale(4 * w, 2 * w, reflect=reflect),
        )
        self.decoder_a = self._decoder()
        self.decoder_b = self._decoder()

    def _decoder(self) -> UpscaleDecoder:
        w, build = self.config.width, self.build
        return UpscaleDecoder(
            2 * w, (4 * w, 2 * w, w), learn_mask=build.learn_mask, reflect=build.reflect_padding
        )

    def encode(self, faces_nchw: Tensor) -> Codes:
        return (self.encoder(faces_nchw),)

    def decode(self, codes: Codes, side: Side) -> Outputs:
        return (self.decoder_a if side == "a" else self.decoder_b)(codes[0])
