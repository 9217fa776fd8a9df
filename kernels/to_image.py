"""The last step of a decoder: bias and sigmoid of the first channels of a convolution, in fp32.

    to_image   y = sigmoid(x + bias)

Convolutions give 8 channels or more, as tensor cores want them; one pass takes 3 of them, or 1 of a
mask, widens and maps them. They stay in their order, which is BGR in mien, hence no "to_rgb".

Shape letters: B faces, C channels, H rows, W columns, P pixels of a batch, N programs side by side.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import (
    NHWC,
    TILE,
    add_up_last,
    bias_sums,
    new_bias_gradient,
    new_image,
    programs_and_tiles,
    sum_channels,
)
from .checks import check_count, check_image
from .dispatch import uses_triton

LAUNCHES = {"mien::to_image": 1, "mien::to_image_backward": 1}
"""Kernels that each operation launches on a GPU."""

_BLOCK = 512
"""Values of a program of the forward kernel. Chosen on the CPU, unmeasured on a GPU."""


@triton.jit
def _forward_kernel(
    x_ptr,       # [P, NUM_CHANNELS]
    bias_ptr,    # [NUM_CHANNELS], or None
    y_ptr,       # [P, CHANNELS] fp32
    num_values,  # of y
    NUM_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    channel = at % CHANNELS
    # `check_count` holds the values of y to 32 bits; x may have more channels than y.
    x_at = (at // CHANNELS).to(tl.int64) * NUM_CHANNELS + channel
    z = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, tl.sigmoid(z), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, y_ptr,  # [P, CHANNELS] fp32
    grad_x_ptr,       # [P, NUM_CHANNELS]
    partial_ptr,      # [N, NUM_CHANNELS] fp32 sums of grad_x, or None
    grad_bias_ptr, arrived_ptr,  # as `add_up_last` takes them; None without partial_ptr
    num_pixels,
    num_tiles,        # of a program: each num_programs-th
    num_programs,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    channels = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tile in range(num_tiles):
        pixels = (tile * num_programs + first) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixels < num_pixels)[:, None]
        place = pixels.to(tl.int64)[:, None]
        at = place * CHANNELS + channels[None, :]
        shown = inside & (channels < CHANNELS)[None, :]
        grad = tl.load(grad_ptr + at, mask=shown, other=0.0)
        y = tl.load(y_ptr + at, mask=shown, other=0.0)
        grad = grad * y * (1 - y)
        # All channels of grad_x are written: those that are not shown were loaded as 0.
        mask = inside & (channels < NUM_CHANNELS)[None, :]
        out = grad_x_ptr + place * NUM_CHANNELS + channels[None, :]
        tl.store(out, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        used = channels < NUM_CHANNELS
        out = partial_ptr + first * NUM_CHANNELS + channels
        tl.store(out, tl.sum(total, axis=0), mask=used)
        add_up_last(
            partial_ptr, grad_bias_ptr, arrived_ptr, channels, used, num_programs,
            NUM_CHANNELS=NUM_CHANNELS, BLOCK_N=BLOCK_P, BLOCK_C=BLOCK_C,
        )  # fmt: skip


def _image_dtype(x_bchw: Tensor) -> torch.dtype:
    return torch.float64 if x_bchw.dtype == torch.float64 else torch.float32


@torch.library.custom_op("mien::to_image", mutates_args=())
def _to_image(x: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    x = x.contiguous(memory_format=NHWC)
    y = new_image(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))
    if not uses_triton(x):
        # One long run a channel: torch is slow on many runs of three values.
        for channel in range(channels):
            y[:, channel] = x[:, channel]
            if bias is not None:
                y[:, channel] += bias[channel].to(y.dtype)
        return y.sigmoid_()
    grid = (triton.cdiv(y.numel(), _BLOCK),)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, bias, y, y.numel(), x.shape[1], channels, BLOCK=_BLOCK)
    return y


@_to_image.register_fake
def _(x, bias, channels):
    return new_image(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))


@torch.library.custom_op("mien::to_image_backward", mutates_args=())
def _to_image_backward(
    grad: Tensor, y: Tensor, num_channels: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=NHWC)
    batch, channels, rows, columns = y.shape
    grad_x = new_image(grad, (batch, num_channels, rows, columns), dtype)
    grad_bias = new_bias_gradient(grad, num_channels, bias_dtype)
    if not uses_triton(grad):
        grad_z = torch.ops.aten.sigmoid_backward(grad, y)
        # Channel by channel, as on the way forward; the memory held anything before.
        grad_x.zero_()
        for channel in range(channels):
            grad_x[:, channel] = grad_z[:, channel]
        if bias_dtype is not None:
            grad_bias[channels:] = 0
            sum_channels(grad_z, grad_bias[:channels])
        return grad_x, grad_bias
    block_c = triton.next_power_of_2(num_channels)
    block_p = triton.cdiv(TILE, block_c)
    num_pixels = batch * rows * columns
    side_by_side, each = programs_and_tiles(triton.cdiv(num_pixels, block_p), 1)
    sums = bias_sums(grad_bias, side_by_side)
    with torch.cuda.device_of(grad):
        _backward_kernel[(side_by_side,)](
            grad, y, grad_x, *sums, num_pixels, each, side_by_side, num_channels, channels,
            BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return grad_x, grad_bias


@_to_image_backward.register_fake
def _(grad, y, num_channels, dtype, bias_dtype):
    grad_x = new_image(grad, (len(y), num_channels, *y.shape[2:]), dtype)
    return grad_x, new_bias_gradient(grad, num_channels, bias_dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _ = inputs
    ctx.num_channels, ctx.dtype = x.shape[1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    grad_x, grad_bias = _to_image_backward(grad, y, ctx.num_channels, ctx.dtype, ctx.bias_dtype)
    return grad_x, None if ctx.bias_dtype is None else grad_bias, None


_to_image.register_autograd(_differentiate, setup_context=_keep)


def to_image(x_bchw: Tensor, bias_c: Tensor | None, *, channels: int) -> Tensor:
    """``sigmoid(x + bias)`` of the first ``channels``, in fp32.

    Differentiable in x and bias; both gradients are 0 for channels after the first ``channels``.

    Args:
        x_bchw: Output of a convolution; fp32, bf16 or fp16 (on a CPU also fp64).
        bias_c: One value a channel of x, x's dtype or fp32; None adds nothing.
        channels: 3 for a picture, 1 for a mask.

    Returns:
        (B, channels, H, W) in 0..1, fp32 (of fp64, fp64), channels_last.

    Raises:
        ValueError: On a shape, dtype or value that is not as said above.
    """
    check_image(x_bchw, bias_c)
    if channels not in (1, 3) or channels > x_bchw.shape[1]:
        raise ValueError(
            f"channels must be 1 or 3 and at most x's {x_bchw.shape[1]}, got {channels}"
        )
    batch, _, rows, columns = x_bchw.shape
    check_count(batch * channels * rows * columns, "values of the result")
    return _to_image(x_bchw, bias_c, channels)
