"""Normalisations whose statistics are of one face. All compute in fp32, in eager operations.

Each has the runs of channels that it takes together, ``normal_channels``: none may be padded.

Shape letters: B faces, C channels, H rows, W columns.
"""

import torch
from torch import Tensor, nn

from .alignment import Runs, runs_of
from .graph import Network, Value

_TINY = 1e-12  # keeps the gradient of a root finite where a face is all one value


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class InstanceNorm(nn.Module):
    """``gain * (x - mean) / (deviation + 0.001) + bias``, both over all values of one face."""

    def __init__(self, channels: int | Runs):
        super().__init__()
        self.normal_channels = runs_of(channels)
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = _wide(x_bchw)
        # Over all channels: a run of padding would count as zeros, hence `normal_channels`.
        variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = self.weight / (variance.clamp_min(_TINY).sqrt() + 1e-3)
        return torch.addcmul(self.bias - mean * scale, x, scale).to(x_bchw.dtype)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the norm to a graph; its output."""
        return network.add(
            "InstanceNormalization",
            x,
            weights=self,
            axis=None,
            epsilon=1e-3,
            center=True,
            scale=True,
        )


class AdaptiveInstanceNorm(nn.Module):
    """Normalisation of each channel of a face by itself, then gain and bias from elsewhere (Huang
    and Belongie 2017): ``gain * (x - mean) / (deviation + 0.001) + bias``."""

    def forward(self, x_bchw: Tensor, gain_bc11: Tensor, bias_bc11: Tensor) -> Tensor:
        x = _wide(x_bchw)
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        scale = gain_bc11.to(x.dtype) / (variance.clamp_min(_TINY).sqrt() + 1e-3)
        return torch.addcmul(bias_bc11.to(x.dtype) - mean * scale, x, scale).to(x_bchw.dtype)


class GroupNorm(nn.Module):
    """Normalisation over 32 groups of consecutive channels of one face (Wu and He 2018); epsilon
    1e-6."""

    def __init__(self, channels: int | Runs):
        super().__init__()
        self.normal_channels = runs_of(channels)
        # At once: PyTorch refuses it only when the first batch comes.
        if sum(self.normal_channels) % 32:
            raise ValueError(
                f"group norm needs a multiple of 32 channels, got {sum(self.normal_channels)}"
            )
        self.weight = nn.Parameter(torch.ones(sum(self.normal_channels)))
        self.bias = nn.Parameter(torch.zeros(sum(self.normal_channels)))

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = _wide(x_bchw)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return nn.functional.group_norm(x, 32, weight, bias, 1e-6).to(x_bchw.dtype)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the norm to a graph; its output."""
        return network.add("GroupNormalization", x, weights=self, axis=-1, epsilon=1e-6, group=32)

    def keras_shape(self) -> tuple[int, ...]:
        """Shape under which both parameters are stored elsewhere."""
        return 1, 1, 1, len(self.weight)


class LayerNorm(nn.Module):
    """Normalisation over the channels of each pixel (Ba et al. 2016); epsilon 1e-3."""

    def __init__(self, channels: int | Runs):
        super().__init__()
        self.normal_channels = runs_of(channels)
        self.weight = nn.Parameter(torch.ones(sum(self.normal_channels)))
        self.bias = nn.Parameter(torch.zeros(sum(self.normal_channels)))

    def forward(self, x_bchw: Tensor) -> Tensor:
        # Channels last in memory: the permutation is a view, no copy.
        x = _wide(x_bchw).permute(0, 2, 3, 1)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-3)
        return y.permute(0, 3, 1, 2).to(x_bchw.dtype)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the norm to a graph; its output."""
        return network.add("LayerNormalization", x, weights=self, axis=-1, epsilon=1e-3)


class RmsNorm(nn.Module):
    """``gain * x / root of the mean square`` over the channels of each pixel (Zhang et al. 2019);
    epsilon 1e-8."""

    def __init__(self, channels: int | Runs):
        super().__init__()
        self.normal_channels = runs_of(channels)
        self.weight = nn.Parameter(torch.ones(sum(self.normal_channels)))

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = _wide(x_bchw).permute(0, 2, 3, 1)
        y = nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-8)
        return y.permute(0, 3, 1, 2).to(x_bchw.dtype)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the norm to a graph; its output."""
        return network.add("RMSNormalization", x, weights=self, axis=-1, epsilon=1e-8)
