"""Differences of how pictures change from pixel to pixel."""

import torch
from torch import Tensor, nn

from .picture import FilteredLoss
from .planes import Separable, filtered

# The rows of faceswap's modified Scharr filter.
_OUTER = (0.0007, 0.0052, 0.0370, 0.0052, 0.0007)
_INNER = (0.0037, 0.1187, 0.2589, 0.1187, 0.0037)


class GradientSimilarity(FilteredLoss):
    """gmsd: 1 - similarity of edges, mean over channels and both directions; map of 1 channel.

    The edges e of a picture come of the 5 x 5 filter whose rows are outer, inner, 0, -inner and
    -outer, and of its transpose; the similarity is (2 e e' + c) / (e^2 + e'^2 + c), c = 0.0025 (Xue
    et al. 2014, equation 4, of signed edges). Borders are reflected.
    """

    def __init__(self, size_px: int):
        # The filter is the sum of two that are separable: one of its rows each.
        taps = ((1, 0, 0, 0, -1), _OUTER, (0, 1, 0, -1, 0), _INNER)
        outer, outer_row, inner, inner_row = (
            filtered(size_px, each, border="reflect") for each in taps
        )
        super().__init__("gmsd", [outer, outer_row, inner, inner_row])
        pairs = ((outer, outer_row), (inner, inner_row))
        self.across = nn.ModuleList(Separable(steps, smooth) for steps, smooth in pairs)
        self.along = nn.ModuleList(Separable(smooth, steps) for steps, smooth in pairs)

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        # A constant of the definition, for pictures in 0..1; it keeps flat areas from 0 / 0.
        c = 0.0025
        x, y = self._edges(pred_bchw), self._edges(target_bchw)
        similarity = (2 * x * y + c) / (x.square() + y.square() + c)
        return 1 - similarity.mean(dim=1, keepdim=True)

    def _edges(self, x_bchw: Tensor) -> Tensor:
        """(B, 6, H, W)."""
        return torch.cat([f[0](x_bchw) + f[1](x_bchw) for f in (self.across, self.along)], dim=1)


class PixelGradientDifference(FilteredLoss):
    """pixel_gradient_diff: the general robust loss of the differences of all derivatives.

    (g(D_h) + g(D_w) + g(D_hh) + g(D_ww) + 2 g(D_hw)) / 2 of the central differences by rows and
    columns, the last pixels repeated beyond the ends; g is the general loss (Barron 2019, equation
    1, times c) with alpha 1.9999 and c 1/255.
    """

    first: Tensor
    second: Tensor

    def __init__(self, size_px: int):
        first = filtered(size_px, (-0.5, 0, 0.5), border="replicate")
        second = filtered(size_px, (1, -2, 1), border="replicate")
        super().__init__("pixel_gradient_diff", [first, second])
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        # Derivatives are linear: those of the difference are the differences of derivatives.
        x = pred_bchw - target_bchw
        by_row = self.first @ x
        of_first = _general(by_row) + _general(x @ self.first.T)
        of_second = _general(self.second @ x) + _general(x @ self.second.T)
        return (of_first + of_second) / 2 + _general(by_row @ self.first.T)


def _general(x: Tensor) -> Tensor:
    # Not 2, where the general form divides by 0; c is one grey level.
    alpha, c = 1.9999, 1 / 255
    distance = 2 - alpha
    bent = (x.square() * (1 / (c**2 * distance)) + 1).pow(alpha / 2) - 1
    return (c * distance / alpha) * bent
