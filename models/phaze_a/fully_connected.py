"""What stands between the encoder and the decoders of phaze-a, where there are no pixels yet.

Shape letters: B faces, N nodes, C channels, H rows, W columns.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.bias_act import bias_act
from ...kernels.enlarge import enlarge
from ..alignment import runs_of
from ..autoencoder import Build
from ..blocks import Dense
from ..graph import Network, Value, describe
from .config import Config
from .decoder import upscales
from .encoder import Bottleneck, Code, Encoder
from .layers import Reshape, upscaler


class _Layer(nn.Module):
    """A dense layer, in training without a share of its inputs."""

    def __init__(self, inputs: Code, outputs: Code, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.dense = Dense(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x if self.dropout is None else self.dropout(x))

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers to a graph, dropout even where nothing is dropped; their output."""
        rate = 0.0 if self.dropout is None else self.dropout.p
        return self.dense.describe(network, network.add("Dropout", x, rate=rate))


class _Enlarge(nn.Module):
    """[B, C, H, W] -> [B, C, factor H, factor W], LeakyReLU 0.1; by repetition of pixels once,
    bilinear from then on."""

    def __init__(self, doublings: int):
        super().__init__()
        self.factor = 2**doublings

    def forward(self, x_bchw: Tensor) -> Tensor:
        if self.factor > 2:
            return bias_act(enlarge(x_bchw, self.factor), None, negative_slope=0.1)
        # Before the pixels are repeated: of fewer pixels, with the same result.
        x_bchw = bias_act(x_bchw, None, negative_slope=0.1)
        return F.interpolate(x_bchw, scale_factor=2.0) if self.factor == 2 else x_bchw

    def describe(self, network: Network, x: Value) -> Value:
        """Add the layers to a graph; their output."""
        if self.factor > 1:
            interpolation = "bilinear" if self.factor > 2 else "nearest"
            x = network.add("UpSampling2D", x, size=self.factor, interpolation=interpolation)
        return network.leaky_relu(x, 0.1)


def _begin(encoder: Encoder, config: Config) -> tuple[list[nn.Module], Code]:
    """The bottleneck, where the encoder has none; and what the dense layers take."""
    if encoder.bottleneck is not None:
        return [], encoder.bottleneck.code
    bottleneck = Bottleneck(*encoder.picture, config)
    return [bottleneck], bottleneck.code


class FullyConnected(nn.Module):
    """The encoder's output -> the code, [B, C, H, W]: dense layers, upscales, and such of the
    decoder's upscales as are done here."""

    def __init__(self, encoder: Encoder, config: Config, build: Build, *, sides: int):
        """``sides``: of a batch; see `BatchNorm`."""
        super().__init__()
        steps, code = _begin(encoder, config)
        edge_px, self.channels = config.fc_dimensions, runs_of(config.fc_channels)
        # The last one's nodes as a picture: `Dense` puts them out so without another pass.
        outputs: list[Code] = [*config.fc_nodes[:-1], (edge_px, self.channels)]
        if config.fc_depth:
            for layer in outputs:
                steps.append(_Layer(code, layer, config.fc_dropout))
                code = layer
        else:
            steps.append(_reshape(code, config))
        if config.fc_upsampler == "upsample2d":
            steps.append(_Enlarge(config.fc_upsamples))
        elif config.fc_has_filters:
            filters = config.fitted(config.fc_upsample_filters)
            for _ in range(config.fc_upsamples):
                reflect = build.reflect_padding
                step = upscaler(config.fc_upsampler, self.channels, filters, reflect=reflect)
                steps, self.channels = [*steps, step], step.channels
        if config.dec_upscales_in_fc:
            levels = range(config.dec_upscales_in_fc)
            chain, self.channels = upscales(
                config, build, self.channels, levels=levels, num_branches=1, sides=sides
            )
            steps += [face for (face,) in chain]
        self.steps = nn.Sequential(*steps)

    def forward(self, code: Tensor) -> Tensor:
        return self.steps(code)

    def describe(self, network: Network, code: Value) -> Value:
        """Add the layers to a graph; their output."""
        return describe(network, self.steps, code)


def _reshape(code: Code, config: Config) -> Reshape:
    """The bottleneck's output as a picture, without a dense layer."""
    edge_px, channels = (0, ()) if isinstance(code, int) else code
    values = code if isinstance(code, int) else edge_px**2 * sum(channels)
    needed = config.fc_channels * config.fc_dimensions**2
    if values != needed:
        raise ValueError(
            f"model.options.fc_depth of {config.family} must be 1 or more where the bottleneck "
            f"gives {values} values and fc_max_filters and fc_dimensions ask for {needed}, got 0; "
            "the nearest is 1"
        )
    return Reshape(channels, config.fc_dimensions, config.fc_channels)


class Style(nn.Module):
    """The encoder's output -> [B, N], the style of the g-block: dense layers."""

    def __init__(self, encoder: Encoder, config: Config):
        super().__init__()
        steps, code = _begin(encoder, config)
        for nodes in config.style_nodes:
            steps.append(_Layer(code, nodes, config.fc_gblock_dropout))
            code = nodes
        self.steps = nn.Sequential(*steps)

    def forward(self, code: Tensor) -> Tensor:
        return self.steps(code)

    def describe(self, network: Network, code: Value) -> Value:
        """Add the layers to a graph; their output."""
        return describe(network, self.steps, code)
