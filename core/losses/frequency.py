"""The difference of spectra."""

import torch
from torch import Tensor

from .picture import PictureLoss

_SMALLEST_PEAK = 1e-6


class FocalFrequency(PictureLoss):
    """ffl: the squared error of each frequency, weighted by its own share (Jiang et al. 2021).

    With D the orthonormal 2-D transform of sqrt(weight) * (pred - target), the mean over channels
    and frequencies of (|D| / peak) |D|^2, where the peak is the largest |D| of the channel. The
    weights act on pixels: by Parseval's theorem the mean of |D|^2 is that of weight * difference^2.
    """

    def forward(self, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor) -> Tensor:
        difference = weight_b1hw.sqrt() * (pred_bchw - target_bchw)
        width = difference.shape[-1]
        half = torch.view_as_real(torch.fft.rfft2(difference, norm="ortho"))
        energy = half.square().sum(-1)
        # All is written in |D|^2: the slope of |D| itself does not exist where D is 0.
        peak = energy.amax(dim=(2, 3)).clamp_min(_SMALLEST_PEAK**2).sqrt()
        columns = energy.pow(1.5).sum(dim=2)
        # Of a real picture's spectrum half is kept: all but these columns stand for two.
        alone = columns[..., 0]
        if width % 2 == 0:
            alone = alone + columns[..., -1]
        total = 2 * columns.sum(dim=-1) - alone
        return (total / peak).mean(dim=1) / (difference.shape[-2] * width)
