"""original: the first deepfakes autoencoder, 64 px in and out.

Shape letters: B faces, w = width (128), E = 8w latent values (4w with lowmem).

    face [B, 3, 64, 64] -> encoder -> [B, 4w, 8, 8] -> decoder of the side -> [B, 3, 64, 64]
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .autoencoder import Autoencoder, Build, Codes, Outputs, Side, require_step
from .blocks import Bottleneck, Downscales, Upscale, UpscaleDecoder
from .registry import register


@register("original")
class Original(Autoencoder):
    """The `original` family."""

    input_px = 64
    output_px = (64,)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Options of the family."""

        lowmem: bool = False
        """Leave out the last downscale and halve the bottleneck, for small GPUs."""

        width: int = 128
        """Channels of the first convolution, 8 to 512 in steps of 8; all others follow it."""

        def __post_init__(self) -> None:
            require_step("original.width", self.width, 8, 512, 8)

    tiny = Config(width=8)

    def __init__(self, config: Config, build: Build):
        super().__init__()
        self.config, self.build = config, build
        w, reflect = config.width, build.reflect_padding
        widths = (w, 2 * w, 4 * w) if config.lowmem else (w, 2 * w, 4 * w, 8 * w)
        nodes = 4 * w if config.lowmem else 8 * w
        last_px = 64 // 2 ** len(widths)
        self.encoder = nn.Sequential(
            Downscales(3, widths, reflect=reflect),
            Bottleneck(last_px**2, widths[-1], nodes, 8 * w, 4),
            Upscale(8 * w, 4 * w, reflect=reflect),
        )
        self.decoder_a = self._decoder()
        self.decoder_b = self._decoder()

    def _decoder(self) -> UpscaleDecoder:
        w, build = self.config.width, self.build
        return UpscaleDecoder(
            4 * w, (2 * w, w, w // 2), learn_mask=build.learn_mask, reflect=build.reflect_padding
        )

    def encode(self, faces_nchw: Tensor) -> Codes:
        return (self.encoder(faces_nchw),)

    def decode(self, codes: Codes, side: Side) -> Outputs:
        return (self.decoder_a if side == "a" else self.decoder_b)(codes[0])
