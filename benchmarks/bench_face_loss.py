"""The picture losses of both sides, value and gradient: SSIM and MSE, as by default.

Then, for one size, the losses that autograd differentiates, one by one, as training runs them and
as torch.compile makes them, and how many times as long they take as SSIM and MSE.

The pictures change from call to call, over more than 64 MiB on a GPU, so that its cache does not
help.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.losses import MADE_FOR_A_SIZE
from ..core.precision import exact_products
from ..kernels import reference
from ..kernels.face_loss import face_loss
from ..kernels.filtered_loss import LOSSES as FILTERED

SIZES = ((8, 64), (16, 64), (16, 128), (16, 256))
"""Faces of a side and their edge in px."""

LOSSES = (("ssim", 1.0), ("mse", 1.0))

OTHERS_SIZE = (16, 128)
"""The same, for the losses that autograd differentiates."""

_ROTATED_BYTES = 64 * 2**20
_FLOPS = 2 * (4 + 3) * 22  # of an element: 11 taps each way, of 4 maps and of 3 derivatives


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    """Yield (what it is, function to time)."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    sizes = SIZES if on_gpu else SIZES[:2]
    for (batch, edge), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        elements = 2 * batch * 3 * edge * edge
        what = {
            "kernel": "face_loss",
            "batch": batch,
            "edge_px": edge,
            "dtype": str(dtype).removeprefix("torch."),
            # Prediction, target and gradient once, and the weight of each pixel.
            "bytes": elements * 3 * dtype.itemsize + elements // 3 * 4,
            "flops": elements * _FLOPS,
        }
        sets = _pictures(batch, edge, dtype, device)
        variants: dict[str, Callable[..., object]] = {
            "mien": face_loss,
            "torch-eager": _by_autograd,
        }
        if importlib.util.find_spec("pytorch_msssim"):
            variants["torch-msssim"] = _by_msssim
        if on_gpu:
            torch.compiler.reset()  # else the sizes before make these dynamic
            compiled = torch.compile(_total, dynamic=False)
            variants["torch-compile"] = partial(_by_autograd, total_of=compiled)
        for variant, function in variants.items():
            yield {**what, "variant": variant}, _rotating(function, sets)
    yield from _others(device)


def _others(device: str) -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    batch, edge = OTHERS_SIZE
    elements = 2 * batch * 3 * edge * edge
    sets = planar(batch, edge, device)
    for name in sorted({*MADE_FOR_A_SIZE} - {*FILTERED}):
        what = {
            "kernel": "face_loss",
            "losses": name,
            "batch": batch,
            "edge_px": edge,
            "dtype": "float32",
            "bytes": elements * 3 * 4 + elements // 3 * 4,
        }
        loss = MADE_FOR_A_SIZE[name](edge).to(device, torch.float32)
        variants: dict[str, Callable[..., Any]] = {"mien": loss}
        if device == "cuda":
            torch.compiler.reset()
            variants["torch-compile"] = torch.compile(loss, dynamic=False)
        for variant, function in variants.items():
            row = what | {"variant": variant, "beside": ssim_and_mse(batch, edge, device)}
            yield row, differentiated(function, sets)


def planar(batch: int, edge: int, device: str) -> list[list[Tensor]]:
    """Sets of predictions, targets and weights of both sides as one, contiguous, in fp32."""
    return [
        [torch.cat((a, b)).contiguous(), target.contiguous(), weight]
        for a, b, target, weight in _pictures(batch, edge, torch.float32, device)
    ]


def ssim_and_mse(batch: int, edge: int, device: str) -> Callable[[], object]:
    """The default losses of so many pictures."""
    return _rotating(face_loss, _pictures(batch, edge, torch.float32, device))


def differentiated(
    loss: Callable[..., Tensor], sets: list[list[Tensor]]
) -> Callable[[], tuple[Tensor, ...]]:
    """Value and gradient of a loss for one set of pictures after the other."""
    order = itertools.cycle(sets)

    def run() -> tuple[Tensor, ...]:
        pred, target, weight = next(order)
        pred = pred.detach().requires_grad_()
        with exact_products():
            return torch.autograd.grad(loss(pred, target, weight).sum(), pred)

    return run


def _rotating(function: Callable[..., object], sets: list[list[Tensor]]) -> Callable[[], object]:
    order = itertools.cycle(sets)
    return lambda: function(*next(order), losses=LOSSES)


def _total(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    weight_n1hw: Tensor,
    losses: tuple[tuple[str, float], ...],
) -> Tensor:
    """The sum of all losses with PyTorch's operations, statistics in fp32."""
    pred = torch.cat((pred_a, pred_b)).float()
    total = pred.new_zeros(())
    for name, share in losses:
        error = reference.LOSS_MAPS[name](pred, target_nchw.float())
        total = total + share * (error * weight_n1hw).mean()
    return 2 * total


def _by_autograd(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    weight_n1hw: Tensor,
    *,
    losses: tuple[tuple[str, float], ...],
    total_of: Callable[..., Tensor] = _total,
) -> tuple[Tensor, ...]:
    """Value and gradient by autograd."""
    preds = [pred.detach().requires_grad_() for pred in (pred_a, pred_b)]
    return torch.autograd.grad(total_of(*preds, target_nchw, weight_n1hw, losses), preds)


def _by_msssim(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    _weight_n1hw: Tensor,
    *,
    losses: tuple[tuple[str, float], ...],
) -> tuple[Tensor, ...]:
    """SSIM of the package pytorch-msssim, and MSE: less work, for it drops borders and weights."""
    from pytorch_msssim import ssim

    preds = [pred.detach().requires_grad_() for pred in (pred_a, pred_b)]
    pred, target = torch.cat(preds).float(), target_nchw.float()
    total = 1 - ssim(pred, target, data_range=1.0) + (pred - target).square().mean()
    return torch.autograd.grad(2 * total, preds)


def _pictures(batch: int, edge: int, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """Sets of predictions, targets and weights, as many as outgrow a GPU's cache."""

    def picture(count: int) -> Tensor:
        random = torch.rand(count, 3, edge, edge, device=device, dtype=dtype)
        return random.contiguous(memory_format=torch.channels_last)

    one = 4 * batch * 3 * edge * edge * dtype.itemsize
    count = 2 + _ROTATED_BYTES // one if device == "cuda" else 2
    return [
        [
            picture(batch),
            picture(batch),
            picture(2 * batch),
            torch.rand(2 * batch, 1, edge, edge, device=device),
        ]
        for _ in range(count)
    ]
