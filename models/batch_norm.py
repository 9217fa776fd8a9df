"""Batch normalisation that keeps the sides of a batch apart.

``y = (x - mean) / sqrt(variance + eps) * weight + bias``, mean and variance (biased) of each
channel over faces, rows and columns (Ioffe and Szegedy 2015). The faces of A and B go through a
shared network as one batch; each side must meet its own statistics, as though it were there alone.

A network may hold a hundred norms, so none moves its running estimates by itself: a forward pass in
training notes the statistics of its batch; `update_running_stats` then moves all of them at once.

Shape letters: S sides, B faces of all sides, 2 (mean, variance), C channels of one norm or of many,
H rows, W columns.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alignment import Runs, runs_of
from .graph import Network, Value


class BatchNorm(nn.Module):
    """[B, C, H, W] -> the same shape, dtype and memory format.

    In training each side is normalised by its own statistics, which `update_running_stats` has yet
    to take up; else the running estimates normalise. Statistics are fp32 whatever the input is.
    """

    running_mean: Tensor
    running_var: Tensor

    seen: tuple[tuple[Tensor, Tensor], ...] = ()
    """Mean and 1 / sqrt(variance + eps), [C] each, of every side of the last batch in training."""

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
        normalised, seen = [], []
        for part in x_bchw.split(faces // self.sides):
            # Not F.batch_norm, which keeps the statistics that it finds to itself.
            part, mean, inverse = torch.native_batch_norm(
                part, weight, bias, None, None, True, 0.0, self.eps
            )
            normalised.append(part)
            seen.append((mean, inverse))
        self.seen = tuple(seen)  # in place of what was there: a guard on it would compile anew
        return normalised[0] if self.sides == 1 else torch.cat(normalised)

    def describe(self, network: Network, x: Value) -> Value:
        """Add the norm, as it is outside training, to a graph; its output."""
        momentum = 1 - self.momentum
        return network.add(
            "BatchNormalization", x, weights=self, axis=-1, epsilon=self.eps, momentum=momentum
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A conversion of the network to 16 bits passes by the running estimates."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            converted = getattr(self, name)
            # In 16 bits their steps, a hundredth of the way each, would mostly be rounded off.
            if converted.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(converted.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, sides={self.sides}, eps={self.eps}, momentum={self.momentum}"


def norms_of(network: nn.Module) -> list[BatchNorm]:
    """Every batch norm of a network, for `update_running_stats`."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


@torch.no_grad()
def update_running_stats(norms: Sequence[BatchNorm]) -> None:
    """Move the running estimates of all norms by what they have seen since the last time.

    The estimates take a step towards the statistics of each side in turn; a channel whose mean or
    variance is not finite stays as it is. Norms with equal settings share their launches, whatever
    their number, and nothing waits for the device.
    """
    alike: dict[tuple[float, float, int], list[BatchNorm]] = defaultdict(list)
    for norm in norms:
        if norm.seen:
            # Grouped, since each group is some launches, whatever its size.
            alike[norm.eps, norm.momentum, len(norm.seen)].append(norm)
    for (eps, momentum, _), group in alike.items():
        _move(group, eps, momentum)


def _move(norms: Sequence[BatchNorm], eps: float, momentum: float) -> None:
    """Update the estimates of norms with equal settings and sides; drop what they have seen."""
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    estimates_2c = torch.cat(running).view(2, -1)
    seen: list[Tensor] = []
    for side in zip(*(norm.seen for norm in norms), strict=True):
        means, inverses = zip(*side, strict=True)
        seen += [*means, *inverses]
    # Compiled for a CPU, a batch norm gives them in its input's format.
    seen_s2c = torch.cat(seen).to(estimates_2c.dtype).view(-1, *estimates_2c.shape)
    seen_s2c[:, 1].pow_(-2).sub_(eps).clamp_(min=0)  # the variance
    is_finite_s1c = seen_s2c.isfinite().all(1, keepdim=True)
    for seen_2c, is_finite_1c in zip(seen_s2c, is_finite_s1c, strict=True):
        moved_2c = estimates_2c.lerp(seen_2c, momentum)
        estimates_2c = torch.where(is_finite_1c, moved_2c, estimates_2c)
    sizes = [estimate.numel() for estimate in running]
    torch._foreach_copy_(running, estimates_2c.view(-1).split(sizes))
    for norm in norms:
        # Statistics that were taken in twice would count twice.
        norm.seen = ()
