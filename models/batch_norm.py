"""Batch normalisation that keeps the sides of a batch apart.

``y = (x - mean) / sqrt(variance + eps) * weight + bias``, mean and variance (biased) of each
channel over faces, rows and columns (Ioffe and Szegedy 2015). The faces of A and B go through a
shared network as one batch; each side must meet its own statistics, as though it were there alone.

Shape letters: B faces of all sides, C channels, H rows, W columns.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alignment import Runs, runs_of


class BatchNorm(nn.Module):
    """[B, C, H, W] -> the same shape, dtype and memory format.

    In training each side is normalised by its own statistics, and the running estimates take a step
    towards each side's in turn; else the running estimates normalise. Statistics are fp32 whatever
    the input is, and a batch that is not finite leaves the estimates as they are.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int | Runs, *, sides: int = 2, eps: float = 1e-3, momentum: float = 0.01
    ):
        """``sides``: equal parts of a batch, one behind the other, that are kept apart."""
        super().__init__()
        self.normal_channels = runs_of(channels)  # a run that is padded has no statistics there
        self.channels = channels = sum(self.normal_channels)
        self.sides, self.eps, self.momentum = sides, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """The normalised input.

        Raises:
            ValueError: In training, the sides of the batch are not equally large.
        """
        # A 16-bit input goes with fp32 weights and statistics; 16-bit weights go with neither.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        if not self.training:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(x_bchw, mean, variance, weight, bias, False, 0.0, self.eps)
        faces = x_bchw.shape[0]
        if faces % self.sides:
            raise ValueError(f"the batch must be a multiple of {self.sides} (sides), got {faces}")
        normalised = []
        for part in x_bchw.split(faces // self.sides):
            part, mean, inverse = torch.native_batch_norm(
                part, weight, bias, None, None, True, 0.0, self.eps
            )
            self._remember(mean, inverse)
            normalised.append(part)
        return normalised[0] if self.sides == 1 else torch.cat(normalised)

    @torch.no_grad()
    def _remember(self, mean_c: Tensor, inverse_c: Tensor) -> None:
        """Move the running estimates towards one side's statistics; nothing waits for the device.

        ``inverse_c`` is 1 / sqrt(variance + eps).
        """
        variance_c = (inverse_c**-2 - self.eps).clamp(min=0)
        finite = (mean_c.isfinite() & variance_c.isfinite()).all()
        for running, seen in ((self.running_mean, mean_c), (self.running_var, variance_c)):
            running.copy_(torch.where(finite, running.lerp(seen, self.momentum), running))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A conversion of the network to 16 bits passes by the running estimates."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            converted = getattr(self, name)
            if converted.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(converted.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, sides={self.sides}, eps={self.eps}, momentum={self.momentum}"
