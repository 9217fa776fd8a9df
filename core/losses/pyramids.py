"""Differences at several scales."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .picture import FilteredLoss
from .planes import Separable, filtered, gaussian, halved_sizes, halving, resized

MIN_LAPLACIAN_PX = 32
"""The smallest picture that can be halved five times."""

MIN_MS_SSIM_PX = 48
"""The smallest picture whose fifth scale has room for a window."""


class LaplacianPyramid(FilteredLoss):
    """laploss: |differences| of the levels of Laplacian pyramids (Burt and Adelson 1983).

    Five levels hold what a 5 x 5 Gaussian of sigma 1 takes away, the next picture is the blurred
    one at half the size, and the sixth level is what is left. Each is resized to the full size and
    weighs a quarter of the level before it. Borders are replicated.
    """

    def __init__(self, size_px: int):
        sizes = halved_sizes(size_px, 5, odd="down")
        taps = gaussian(2, 1.0)
        blurs = [filtered(size, taps, border="replicate") for size in sizes[:-1]]
        reductions = [halving(len(blur), odd="down") @ blur for blur in blurs]
        resizes = [resized(size_px, size) for size in sizes[1:]]
        super().__init__("laploss", [*blurs, *reductions, *resizes])
        self.blurs = nn.ModuleList(map(Separable, blurs))
        self.resizes = nn.ModuleList(map(Separable, resizes))

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        # The pyramid is linear: that of the difference is the difference of pyramids.
        x = pred_bchw - target_bchw
        levels = []
        for blur in self.blurs:
            blurred = blur(x)
            levels.append((x - blurred).abs())
            x = F.avg_pool2d(blurred, 2)
        levels.append(x.abs())
        total = levels[0]
        for number, (resize, level) in enumerate(zip(self.resizes, levels[1:], strict=True), 1):
            # A quarter a level, as in faceswap.
            total = total + resize(level) * 4.0**-number
        return total


class MultiScaleSsim(FilteredLoss):
    """ms_ssim: 1 - the product of similarities at five scales (Wang et al. 2003, equation 7).

    Each scale gives its map of contrast and structure, the last one all of SSIM, resized to the
    full size, not below 0, and raised to its exponent. The Gaussian window of sigma 1.5 has 11 taps
    where the last scale has room for them, else the largest odd number that a sixteenth of the
    picture's edge has room for. An odd edge is halved with its last pixel repeated.
    """

    # Found by Wang et al. with people who compared pictures.
    exponents = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

    def __init__(self, size_px: int):
        num_taps = min(11, (size_px // 16 - 1) | 1)  # the largest odd number up to a sixteenth
        sizes = halved_sizes(size_px, len(self.exponents) - 1, odd="up")
        taps = gaussian(num_taps // 2, 1.5)
        blurs = [filtered(size, taps, border="reflect") for size in sizes]
        reductions = [halving(size, odd="up") for size in sizes[:-1]]
        resizes = [resized(size_px, size) for size in sizes[1:]]
        super().__init__("ms_ssim", [*blurs, *reductions, *resizes])
        self.blurs = nn.ModuleList(map(Separable, blurs))
        self.resizes = nn.ModuleList(map(Separable, resizes))

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        x, y = pred_bchw, target_bchw
        last = len(self.exponents) - 1
        product = _power(_similarity(x, y, self.blurs[0], is_whole=False), self.exponents[0])
        for number in range(1, len(self.exponents)):
            x, y = _halved(x), _halved(y)
            similarity = _similarity(x, y, self.blurs[number], is_whole=number == last)
            similarity = self.resizes[number - 1](similarity)
            product = product * _power(similarity, self.exponents[number])
        return 1 - product


def _halved(x_bchw: Tensor) -> Tensor:
    # The mean of what there is of a window at the end is that of the window with repeated pixels.
    return F.avg_pool2d(x_bchw, 2, ceil_mode=True, count_include_pad=False)


def _similarity(x_bchw: Tensor, y_bchw: Tensor, blur: nn.Module, *, is_whole: bool) -> Tensor:
    """The map of contrast and structure of SSIM; with ``is_whole`` times that of luminance."""
    # SSIM's own constants, for pictures in 0..1.
    c1, c2 = 0.01**2, 0.03**2
    x, y = x_bchw, y_bchw
    # The squares of both as one sum, which is all that SSIM needs of them: one blur less.
    mean_x, mean_xy, mean_squares = blur(torch.cat((x, x * y, x * x + y * y))).chunk(3)
    mean_y = blur(y)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    contrast = (2 * (mean_xy - product) + c2) / (F.relu(mean_squares - squares) + c2)
    return contrast * ((2 * product + c1) / (squares + c1)) if is_whole else contrast


def _power(x: Tensor, exponent: float) -> Tensor:
    """max(x, 0)^exponent; below a millionth a line to 0, whose slope is finite."""
    # A power below 1 is infinitely steep at 0.
    least = 1e-6
    curve = x.clamp_min(least).pow(exponent)
    return torch.where(x > least, curve, F.relu(x) * least ** (exponent - 1))
