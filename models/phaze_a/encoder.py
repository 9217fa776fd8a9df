"""The encoder of phaze-a, and the bottleneck that ends it or begins each network behind it.

Shape letters: B faces, S the edge of their picture, C channels, H rows, W columns, N nodes.
"""

from typing import cast

from torch import Tensor, nn

from ..alignment import Runs, runs_of
from ..autoencoder import Build
from ..blocks import ConvBlock, Dense, downscales
from ..graph import Network, Value, describe
from .backbones import Backbone, Normalize, backbone
from .config import Config
from .layers import NORMS

Code = int | tuple[int, Runs]
"""Length of a vector, or (edge in px, channels) of a picture: as `Dense` takes its inputs."""


class FsOriginal(nn.Module):
    """[B, 3, S, S] -> [B, C, H, W], halved with every doubling of the channels."""

    def __init__(self, config: Config, build: Build):
        super().__init__()
        depth, most = config.fs_original_depth, config.fs_original_max_filters
        widths = [config.fs_original_min_filters]
        for _ in range(depth):
            widths.append(min(most, 2 * widths[-1]))
        reflect, self.output_px = build.reflect_padding, config.input_px
        if config.fs_original_use_alt:
            self.convs: nn.Sequential = _alternative(widths, reflect)
            self.output_px >>= depth - 1
            # The last convolution of 4 px pads nothing, unless by reflection.
            self.output_px -= 0 if reflect else 3
            self.channels: Runs = (widths[-1],)
            return
        self.convs = downscales(3, widths[:depth], reflect=reflect)
        # Rounded up, as halvings with "same" padding are.
        self.output_px = -(-self.output_px // 2**depth)
        self.channels = (widths[depth - 1],)

    def forward(self, faces_bcss: Tensor) -> Tensor:
        return self.convs(faces_bcss)

    def describe(self, network: Network, face: Value) -> Value:
        """Add the layers to a graph; their output."""
        return describe(network, self.convs, face)


def _alternative(widths: list[int], reflect: bool) -> nn.Sequential:
    """Halvings by maxima with two convolutions before each; the last convolution takes 4 px to 1,
    unless it pads by reflection."""
    steps: list[nn.Module] = []

    def convolve(inputs: int, outputs: int, kernel: int, valid: bool = False) -> None:
        steps.append(ConvBlock(inputs, outputs, kernel, 1, slope=0.2, reflect=reflect, valid=valid))

    convolve(3, widths[0], 1)
    inputs = widths[0]
    for width, following in zip(widths[:-2], widths[1:-1], strict=True):
        convolve(inputs, width, 3)
        convolve(width, following, 3)
        steps.append(nn.MaxPool2d(2))
        inputs = following
    convolve(inputs, widths[-2], 3)
    convolve(widths[-2], widths[-1], 4, valid=True)
    return nn.Sequential(*steps)


class Bottleneck(nn.Module):
    """[B, C, H, W] -> ``code``: normalised or not, then dense, pooled or as it is."""

    def __init__(self, edge_px: int, channels: Runs, config: Config):
        super().__init__()
        self.norm: nn.Module | None = None
        if config.bottleneck_norm != "none":
            self.norm = NORMS[config.bottleneck_norm](channels)
        self.kind, self.dense = config.bottleneck_type, None
        # Of a pooled picture.
        self.code: Code = (1, channels)
        if self.kind == "flatten":
            self.code = (edge_px, channels)  # the dense layer behind flattens
        elif self.kind == "dense":
            self.code = config.bottleneck_size
            self.dense = Dense((edge_px, channels), self.code)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = x_bchw if self.norm is None else self.norm(x_bchw)
        if self.dense is not None:
            return self.dense(x_bchw)
        if self.kind == "average_pooling":
            return x_bchw.mean((2, 3), keepdim=True)
        # Not by a pooling layer: on a GPU its gradient is summed in no fixed order.
        return x_bchw.amax((2, 3), keepdim=True) if self.kind == "max_pooling" else x_bchw

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers to a graph; their output, a vector."""
        x = x if self.norm is None else describe(network, self.norm, x)
        if self.dense is not None:
            return self.dense.describe(network, x)
        kinds = {"average_pooling": "GlobalAveragePooling2D", "max_pooling": "GlobalMaxPooling2D"}
        return network.add(kinds.get(self.kind, "Flatten"), x)


class Encoder(nn.Module):
    """[B, 3, S, S] -> [B, N] or [B, C, H, W]: what every network behind it takes."""

    def __init__(self, config: Config, build: Build):
        super().__init__()
        if config.is_original:
            self.backbone: nn.Module = FsOriginal(config, build)
        else:
            self.backbone = _known_network(config)
        self.picture = (self.backbone.output_px, runs_of(self.backbone.channels))
        self.bottleneck = (
            Bottleneck(*self.picture, config) if config.bottleneck_in_encoder else None
        )

    def forward(self, faces_bcss: Tensor) -> Tensor:
        x = self.backbone(faces_bcss)
        return x if self.bottleneck is None else self.bottleneck(x)

    def describe(self, network: Network, face: Value) -> Value:
        """Add the layers to a graph; their output.

        Raises:
            ValueError: The encoder is a known network, which has no description here.
        """
        if not isinstance(self.backbone, FsOriginal):
            raise ValueError(
                f"a phaze-a model with the encoder {self.backbone.name} can only be exported as "
                "safetensors: the layers of known networks are not described"
            )
        x = self.backbone.describe(network, face)
        return x if self.bottleneck is None else self.bottleneck.describe(network, x)


def _known_network(config: Config) -> Backbone:
    manner: Normalize = "pretrained" if config.starts_pretrained else "reference"
    if config.enc_normalize != "auto":
        manner = cast(Normalize, config.enc_normalize)
    return backbone(
        config.enc_architecture,
        config.input_px,
        mobilenet_width=config.mobilenet_width,
        mobilenet_depth=config.mobilenet_depth,
        mobilenet_minimalistic=config.mobilenet_minimalistic,
        normalize=manner,
    )
