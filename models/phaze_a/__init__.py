"""phaze-a: a model that its user builds of parts.

Shape letters: B faces of one side, N = 2B faces of both, S edge of the encoder's picture, c
channels and h edge of the code, O = output_size.

    face [N, 3, S, S] -> encoder -> fc, beside it fc_shared -> code [B, c, h, h]
                                 -> fc_gblock -> style         -> g_block  -> code [B, c, h, h]
                                                               -> decoder  -> [B, 3, O, O]

fc, g_block and decoder may each be one for a side (`_a`, `_b`) or one for both (`_both`). What is
for both takes them as one batch, also where it follows what is not.
"""

import os
from typing import cast

import torch
from torch import Tensor

from ..alignment import Runs
from ..autoencoder import (
    Autoencoder,
    Build,
    Codes,
    Outputs,
    Side,
    decode_on_streams,
    record_stream,
    split_sides,
)
from ..graph import Network, Value
from ..registry import register
from .backbones import Backbone
from .config import Config as PhazeAConfig
from .decoder import Decoder
from .encoder import Encoder
from .fully_connected import FullyConnected, Style
from .g_block import GBlock
from .pretrained import load_pretrained


@register("phaze-a")
class PhazeA(Autoencoder):
    """The `phaze-a` family."""

    Config = PhazeAConfig

    encoder: Encoder
    fc_a: FullyConnected
    fc_b: FullyConnected
    fc_both: FullyConnected
    fc_shared: FullyConnected
    fc_gblock: Style
    g_block_a: GBlock
    g_block_b: GBlock
    g_block_both: GBlock
    decoder_both: Decoder

    tiny = PhazeAConfig(
        output_size=64,
        enc_scaling=0,
        bottleneck_size=128,
        fc_min_filters=16,
        fc_max_filters=16,
        fc_gblock_depth=1,
        fc_gblock_min_nodes=128,
        fc_gblock_max_nodes=128,
        dec_min_filters=8,
        dec_max_filters=16,
        fs_original_depth=3,
        fs_original_min_filters=8,
        fs_original_max_filters=32,
    )

    @classmethod
    def sizes(cls, options: PhazeAConfig) -> tuple[int, tuple[int, ...]]:
        return options.input_px, (options.output_size,)

    def __init__(self, config: PhazeAConfig, build: Build):
        super().__init__(config, build)
        if build.reflect_padding:
            config.check_reflection()
        self.input_px, self.output_px = self.sizes(config)
        self.has_one_decoder = not config.split_decoders
        self.encoder = Encoder(config, build)
        channels = self._make_fully_connected(config, build)
        if config.enable_gblock:
            self.fc_gblock = Style(self.encoder, config)
            for name in _names("g_block", config.split_gblock):
                self.add_module(name, GBlock(channels, config.style_nodes[-1]))
        sides = 1 if config.split_decoders else 2
        for name in _names("decoder", config.split_decoders):
            self.add_module(name, Decoder(config, build, channels, sides=sides))
        self.freeze_layers = self._paths(config.freeze_layers)
        self.load_layers = self._paths(config.load_layers)

    def _make_fully_connected(self, config: PhazeAConfig, build: Build) -> Runs:
        """Make the networks of the code; its channels."""
        is_half = config.shared_fc == "half"
        for name in _names("fc", config.split_fc):
            # The half that is shared: A's network then meets B's faces too.
            meets_both = name == "fc_both" or (name == "fc_a" and is_half)
            fc = FullyConnected(self.encoder, config, build, sides=2 if meets_both else 1)
            self.add_module(name, fc)
        if config.shared_fc == "full":
            self.fc_shared = FullyConnected(self.encoder, config, build, sides=2)
        # Both parts as runs, since a concatenation is padded part by part.
        return fc.channels if config.shared_fc == "none" else 2 * fc.channels

    def _paths(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Paths of the attributes that an option names, of those that there are."""
        has_known = not self.config.is_original
        paths = (
            "encoder.backbone" if name == "keras_encoder" and has_known else name for name in names
        )
        return tuple(path for path in paths if hasattr(self, path.split(".")[0]))

    def load_pretrained(self) -> None:
        if self.config.starts_pretrained:
            path = self.config.enc_weights or os.environ.get("MIEN_BACKBONES")
            load_pretrained(cast(Backbone, self.encoder.backbone), path)

    def encode(self, faces_nchw: Tensor) -> Codes:
        """Codes: where a side has a network of its own, ``(the encoder's output, the shared
        code)``, else ``(code,)``; then the style, unless it has been used. What the model lacks is
        left out."""
        config, encoded = self.config, self.encoder(faces_nchw)
        # Both sides share the style's network always, as in the reference.
        style = (self.fc_gblock(encoded),) if config.enable_gblock else ()
        if config.split_fc:
            shared = {"full": "fc_shared", "half": "fc_a"}.get(config.shared_fc)
            return (encoded, *(() if shared is None else (getattr(self, shared)(encoded),)), *style)
        own = self.fc_both(encoded)
        if config.shared_fc != "none":
            own = torch.cat(
                (own, self.fc_shared(encoded) if config.shared_fc == "full" else own), 1
            )
        if style and not config.split_gblock:
            # All before it is of both sides, so it can take them here as one batch.
            return (self.g_block_both(own, *style),)
        return (own, *style)

    def side_code(self, codes: Codes, side: Side) -> Codes:
        """``(code,)``, or ``(code, style)`` where a g-block of both sides is still to come."""
        if self.config.split_fc:
            codes = self._own(codes, side)
        if self.config.enable_gblock and self.config.split_gblock:
            return ((self.g_block_a if side == "a" else self.g_block_b)(*codes),)
        return codes

    def _own(self, codes: Codes, side: Side) -> Codes:
        """The code of a side, its own channels before the shared ones; then the style."""
        if self.config.shared_fc == "none":
            encoded, *style = codes
            return ((self.fc_a if side == "a" else self.fc_b)(encoded), *style)
        encoded, shared, *style = codes
        if side == "a" and self.config.shared_fc == "half":
            own = shared
        else:
            own = (self.fc_a if side == "a" else self.fc_b)(encoded)
        return (torch.cat((own, shared), dim=1), *style)

    def decode(self, codes: Codes, side: Side) -> Outputs:
        if len(codes) > 1:
            codes = (self.g_block_both(*codes),)
        if self.has_one_decoder:
            return self.decoder_both(*codes)
        return super().decode(codes, side)

    def describe_side(self, model: Network, face: Value, side: Side) -> tuple[Value, ...]:
        config = self.config

        def run(name: str, is_split: bool, *inputs: Value) -> tuple[Value, ...]:
            name = f"{name}_{side if is_split else 'both'}"
            return model.run(name, getattr(self, name), *inputs)

        (encoded,) = model.run("encoder", self.encoder, face)
        code = run("fc", config.split_fc, encoded)
        if config.shared_fc == "full":
            code += model.run("fc_shared", self.fc_shared, encoded)
        elif config.shared_fc == "half":  # of A's, which a side may have called already
            is_called = side == "a" or not config.split_fc
            code += code if is_called else model.run("fc_a", self.fc_a, encoded)
        if len(code) > 1:
            code = (model.add("Concatenate", *code, name=f"inter_{side}", axis=-1),)
        if config.enable_gblock:
            style = model.run("fc_gblock", self.fc_gblock, encoded)
            code = run("g_block", config.split_gblock, *code, *style)
        return run("decoder", config.split_decoders, *code)

    def forward(
        self, faces_nchw: Tensor, side_stream: torch.cuda.Stream | None = None
    ) -> tuple[Outputs, Outputs]:
        config = self.config
        has_shared_gblock = config.enable_gblock and not config.split_gblock
        if not (config.split_fc and has_shared_gblock and config.split_decoders):
            return super().forward(faces_nchw, side_stream)
        # Between networks of one side there is one of both, which takes them as one batch.
        code_a, code_b = split_sides(self.encode(faces_nchw))
        mixed = zip(self.side_code(code_a, "a"), self.side_code(code_b, "b"), strict=True)
        codes = (self.g_block_both(*(torch.cat(sides) for sides in mixed)),)
        record_stream(codes, side_stream)
        code_a, code_b = split_sides(codes)
        return decode_on_streams(
            lambda: self.decode(code_a, "a"), lambda: self.decode(code_b, "b"), side_stream
        )


def _names(name: str, is_split: bool) -> tuple[str, ...]:
    return (f"{name}_a", f"{name}_b") if is_split else (f"{name}_both",)
