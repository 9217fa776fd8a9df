"""What is minimised: weighted maps of differences between a decoded face and its target.

Every loss is a map (B, 3, H, W); it is multiplied by one weight plane (B, 1, H, W), which is
face * (1 + E eye) * (1 + M mouth) or 1, and averaged over all pixels and channels, not over the
mask's area. A side's loss is the sum over outputs and losses; the model's the sum over sides.
Everything here is fp32 (or float64, if given so), whatever the precision of the network.

Shape letters: B faces, C channels, H rows, W columns, S edge in px.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LossConfig

_C1, _C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for pictures in 0..1
_WINDOW, _SIGMA = 11, 1.5


def mae(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """|target - pred|."""
    return (target_bchw - pred_bchw).abs()


def mse(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """(target - pred)^2."""
    return (target_bchw - pred_bchw).square()


@functools.lru_cache(maxsize=32)
def _window_matrix(size_px: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(S, S): one axis of the 11-tap Gaussian with reflected borders, as a matrix."""
    half = _WINDOW // 2
    if size_px <= half:
        raise ValueError(f"SSIM needs pictures of at least {half + 1} px, got {size_px}")
    taps = [math.exp(-((i - half) ** 2) / (2 * _SIGMA**2)) for i in range(_WINDOW)]
    matrix = torch.zeros(size_px, size_px, dtype=torch.float64)
    for row in range(size_px):
        for offset, tap in enumerate(taps):
            column = abs(row + offset - half)
            column = min(column, 2 * (size_px - 1) - column)
            matrix[row, column] += tap / sum(taps)
    return matrix.to(device, dtype)


class _Blur(torch.autograd.Function):
    """G x G^T. The variance below is a small difference of large numbers, so no product is rounded.

    Its own function because TF32 may be allowed while the rest of the backward pass runs.
    """

    @staticmethod
    def forward(ctx, x_bchw: Tensor, rows_hh: Tensor, columns_ww: Tensor) -> Tensor:
        ctx.save_for_backward(rows_hh, columns_ww)
        return _exact_product(rows_hh, x_bchw, columns_ww.t())

    @staticmethod
    def backward(ctx, grad_bchw: Tensor):
        rows_hh, columns_ww = ctx.saved_tensors
        return _exact_product(rows_hh.t(), grad_bchw, columns_ww), None, None


def _exact_product(left: Tensor, x_bchw: Tensor, right: Tensor) -> Tensor:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        return left @ (x_bchw @ right)
    finally:
        matmul.allow_tf32 = before


def ssim(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """1 - SSIM, 0..2 (Wang et al. 2004, equation 13), with an 11 x 11 Gaussian of sigma 1.5.

    Borders are reflected, so the map keeps the picture's size. Variances are clamped at 0.
    """
    *_, height, width = pred_bchw.shape
    rows_hh = _window_matrix(height, pred_bchw.dtype, pred_bchw.device)
    columns_ww = _window_matrix(width, pred_bchw.dtype, pred_bchw.device)
    x, y = pred_bchw.contiguous(), target_bchw.contiguous()  # matrix products want rows whole
    maps = torch.cat((x, y, x * y, x * x + y * y))
    mean_x, mean_y, mean_xy, mean_squares = _Blur.apply(maps, rows_hh, columns_ww).chunk(4)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (2 * product + _C1) / (squares + _C1)
    contrast = (2 * (mean_xy - product) + _C2) / (F.relu(mean_squares - squares) + _C2)
    return 1 - luminance * contrast


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mae": mae, "mse": mse, "ssim": ssim}


@dataclass(frozen=True)
class SideLoss:
    """The loss of one side of a batch. Scalars on the device; nothing is copied to the host."""

    total: Tensor
    parts: dict[str, Tensor]
    """By name as in the logs, the side left open: `face_{side}` (`face_{side}_0`.. with several
    outputs), `mask_{side}`, `weighted_{side}/ssim`, `unweighted_{side}/ssim`.."""


class Loss:
    """The configured sum of losses of one side."""

    def __init__(self, config: LossConfig):
        slots = [(config.loss_function, 100)]
        slots += [
            (getattr(config, f"loss_function_{n}"), getattr(config, f"loss_weight_{n}"))
            for n in (2, 3, 4)
        ]
        self.weights: dict[str, float] = {}
        for name, percent in slots:
            if name != "none" and percent > 0:  # the same loss twice adds up
                self.weights[name] = self.weights.get(name, 0.0) + percent / 100
        self.mask_loss = FUNCTIONS[config.mask_loss_function]

    def __call__(
        self,
        outputs: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        mask_b1hw: Tensor | None,
    ) -> SideLoss:
        """The loss of one side.

        Args:
            outputs: Faces (B, 3, S, S), one a size, 0..1; then the mask (B, 1, S, S) if learned.
            targets: As the faces of ``outputs``.
            weights: (B, 1, S, S) weight of each pixel, one a size.
            mask_b1hw: The face mask to be learned; None where none is.
        """
        parts: dict[str, Tensor] = {}
        total = targets[0].new_zeros((), dtype=outputs[0].dtype)
        for number, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            face = total.new_zeros(())
            for name, share in self.weights.items():
                error = FUNCTIONS[name](outputs[number], target.to(outputs[number].dtype))
                mean = (error * weight).mean()
                _add(parts, "unweighted_{side}/" + name, mean)
                _add(parts, "weighted_{side}/" + name, mean * share)
                face = face + mean * share
            parts["face_{side}" + (f"_{number}" if len(targets) > 1 else "")] = face.detach()
            total = total + face
        if mask_b1hw is not None:
            mask = self.mask_loss(outputs[-1], mask_b1hw.to(outputs[-1].dtype)).mean()
            parts["mask_{side}"] = mask.detach()
            total = total + mask
        return SideLoss(total, parts)


def _add(parts: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    parts[name] = parts[name] + value if name in parts else value
