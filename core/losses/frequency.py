"""The difference of spectra."""

import math

import torch
from torch import Tensor

from .picture import PictureLoss
from .planes import Separable

MAX_PRODUCT_PX = 128
"""The largest edge whose spectrum is a product with a matrix of waves, and no FFT.

Products take 0.8 of the FFT's time at 32 px, 0.6 at 64, 0.9 at 128 and 1.5 at 256, value and
gradient, on one core of an AMD EPYC; unmeasured on a GPU.
"""

_SMALLEST_PEAK = 1e-6


class FocalFrequency(PictureLoss):
    """ffl: the squared error of each frequency, weighted by its own share (Jiang et al. 2021).

    With D the orthonormal 2-D transform of sqrt(weight) * (pred - target), the mean over channels
    and frequencies of (|D| / peak) |D|^2, where the peak is the largest |D| of the channel. The
    weights act on pixels: by Parseval's theorem the mean of |D|^2 is that of weight * difference^2.
    """

    counts: Tensor
    """Frequencies that each of the energies stands for."""

    def __init__(self, size_px: int):
        super().__init__()
        # A real picture's spectrum is even: all waves but the constant and the fastest are pairs.
        counts = torch.full((size_px // 2 + 1,), 2.0, dtype=torch.float64)
        counts[0] = 1
        if size_px % 2 == 0:
            counts[-1] = 1
        self.waves = Separable(_waves(size_px)) if size_px <= MAX_PRODUCT_PX else None
        self.register_buffer("counts", counts[:, None] * counts / 2 if self.waves else counts)

    def forward(self, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor) -> Tensor:
        difference = weight_b1hw.sqrt() * (pred_bchw - target_bchw)
        energy = self._energy(difference)
        # All is written in |D|^2: the slope of |D| itself does not exist where D is 0.
        peak = energy.flatten(2).amax(dim=2).clamp_min(_SMALLEST_PEAK**2).sqrt()
        total = (self.counts * energy.pow(1.5)).flatten(2).sum(dim=2)
        return (total / peak).mean(dim=1) / (difference.shape[-2] * difference.shape[-1])

    def _energy(self, x_bchw: Tensor) -> Tensor:
        """(B, C, ...): |D|^2 of the frequencies that differ; the last axes are as `counts`."""
        if self.waves is None:
            half = torch.view_as_real(torch.fft.rfft2(x_bchw, norm="ortho"))
            return half.square().sum(-1)
        cosines, sines = self.waves(x_bchw).chunk(2, dim=2)
        (cc, cs), (sc, ss) = cosines.chunk(2, dim=3), sines.chunk(2, dim=3)
        # Waves that run down to the right, and those that run up.
        down = (cc - ss).square() + (cs + sc).square()
        up = (cc + ss).square() + (cs - sc).square()
        return torch.stack((down, up), dim=2)


def _waves(size: int) -> Tensor:
    """(2 (size // 2 + 1), size): the cosines and then the sines of an orthonormal transform."""
    # Whole turns are taken off before the angle is rounded.
    turns = torch.arange(size // 2 + 1)[:, None] * torch.arange(size) % size
    angles = turns.double() * (2 * math.pi / size)
    return torch.cat((angles.cos(), angles.sin())) / math.sqrt(size)
