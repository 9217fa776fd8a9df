"""Bilinear enlargement by a whole factor, between centres of pixels.

    y[o] = (1 - f) x[i] + f x[i + 1],   i + f = (o + 0.5) / R - 0.5,   both held inside the picture

along each axis. Its gradient is gathered: each pixel of x adds up the results that it is a part of,
always in the same order, where PyTorch's kernel adds them with atomics, in bf16 and in an order of
chance. Both ways keep channels_last, NHWC in memory, and compute in fp32.

Shape letters: B faces, C channels, H rows, W columns, R factor.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import MAX_BLOCK_CHANNELS, NHWC, TILE, new_image
from .checks import check_count, check_image, check_range
from .dispatch import uses_triton

LAUNCHES = {"mien::enlarge": 1, "mien::enlarge_backward": 1}
"""Kernels that each operation launches on a GPU."""

_MAX_FACTOR = 16  # the largest that a model asks for: 4 doublings of a code of few pixels


@triton.jit
def _tile(
    num_pixels, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    # The pixels and channels of this program's tile of a result, and which of them there are.
    num_chunks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channels = program % num_chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = program // num_chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    return pixels, channels, (pixels < num_pixels)[:, None] & (channels < CHANNELS)[None, :]


@triton.jit
def _between(number, size, FACTOR: tl.constexpr):
    # The pixel before the centre of number ``number`` of the result, the one after, and its share.
    centre = tl.maximum((number.to(tl.float32) + 0.5) / FACTOR - 0.5, 0.0)
    before = tl.minimum(centre.to(tl.int32), size - 1)
    return before, tl.minimum(before + 1, size - 1), centre - before


@triton.jit
def _share(number, pixel, size, FACTOR: tl.constexpr):
    # The share that ``pixel`` has in number ``number`` of the result; 0 outside of it.
    before, after, share = _between(number, size, FACTOR)
    # At an edge both are one pixel, which then has both shares.
    sum_of_both = tl.where(before == pixel, 1.0 - share, 0.0) + tl.where(after == pixel, share, 0.0)
    return tl.where((number >= 0) & (number < size * FACTOR), sum_of_both, 0.0)


@triton.jit
def _forward_kernel(
    x_ptr,       # [B, rows, columns, CHANNELS]
    y_ptr,       # [B, rows * FACTOR, columns * FACTOR, CHANNELS]
    num_pixels,  # of y
    rows, columns,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels, channels, mask = _tile(num_pixels, CHANNELS, BLOCK_P, BLOCK_C)
    line, column = pixels // (columns * FACTOR), pixels % (columns * FACTOR)
    # In 64 bits from here on: times channels, places may leave 32.
    first = (line // (rows * FACTOR) * rows).to(tl.int64)
    up, down, share_row = _between(line % (rows * FACTOR), rows, FACTOR)
    left, right, share_column = _between(column, columns, FACTOR)

    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for corner in tl.static_range(4):
        row = up if corner < 2 else down
        place = left if corner % 2 == 0 else right
        weight = (1.0 - share_row if corner < 2 else share_row) * (
            1.0 - share_column if corner % 2 == 0 else share_column
        )
        at = ((first + row) * columns + place)[:, None] * CHANNELS + channels[None, :]
        total += weight[:, None] * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y_at = pixels.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
    tl.store(y_ptr + y_at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr,    # [B, rows * FACTOR, columns * FACTOR, CHANNELS]
    grad_x_ptr,  # [B, rows, columns, CHANNELS]
    num_pixels,  # of x
    rows, columns,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels, channels, mask = _tile(num_pixels, CHANNELS, BLOCK_P, BLOCK_C)
    line, column = pixels // columns, pixels % columns
    row = line % rows
    first = (line // rows * (rows * FACTOR)).to(tl.int64)

    # A pixel is a part of the results from FACTOR / 2 before its own to FACTOR / 2 after them.
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    # Not unrolled: with a factor of 16 there are 33 x 33 turns.
    for i in range(2 * FACTOR + 1):
        y_row = row * FACTOR + i - (FACTOR + 1) // 2
        share_row = _share(y_row, row, rows, FACTOR)
        for j in range(2 * FACTOR + 1):
            y_column = column * FACTOR + j - (FACTOR + 1) // 2
            share = share_row * _share(y_column, column, columns, FACTOR)
            at = ((first + y_row) * (columns * FACTOR) + y_column)[:, None] * CHANNELS
            # Where the share is 0 the place may lie outside the picture, so nothing is read there.
            counts = mask & (share > 0)[:, None]
            grad = tl.load(grad_ptr + at + channels[None, :], mask=counts, other=0.0)
            total += share[:, None] * grad.to(tl.float32)
    x_at = pixels.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
    tl.store(grad_x_ptr + x_at, total.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _tiles(result_bchw: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid over a result, and the sizes that a kernel takes with it."""
    batch, channels, rows, columns = result_bchw.shape
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    block_p, num_pixels = TILE // block_c, batch * rows * columns
    grid = (triton.cdiv(num_pixels, block_p) * triton.cdiv(channels, block_c),)
    sizes = {"CHANNELS": channels, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return grid, {"num_pixels": num_pixels, **sizes}


def _new(like: Tensor, rows: int, columns: int) -> Tensor:
    return new_image(like, (*like.shape[:2], rows, columns))


def _laid_out(found: Tensor, promised: Tensor) -> Tensor:
    """What PyTorch found in the layout that the operation promises, whichever it chose itself."""
    return found if found.stride() == promised.stride() else promised.copy_(found)


@torch.library.custom_op("mien::enlarge", mutates_args=())
def _enlarge(x: Tensor, factor: int) -> Tensor:
    rows, columns = x.shape[2:]
    x = x.contiguous(memory_format=NHWC)
    y = _new(x, rows * factor, columns * factor)
    if not uses_triton(x):
        found = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return _laid_out(found, y)
    if y.numel():
        grid, sizes = _tiles(y)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, y, rows=rows, columns=columns, FACTOR=factor, **sizes)
    return y


@_enlarge.register_fake
def _(x, factor):
    return _new(x, x.shape[2] * factor, x.shape[3] * factor)


@torch.library.custom_op("mien::enlarge_backward", mutates_args=())
def _enlarge_backward(grad: Tensor, factor: int) -> Tensor:
    rows, columns = grad.shape[2] // factor, grad.shape[3] // factor
    grad = grad.contiguous(memory_format=NHWC)
    grad_x = _new(grad, rows, columns)
    if not uses_triton(grad):
        size = (*grad.shape[:2], rows, columns)
        output = list(grad.shape[2:])
        found = torch.ops.aten.upsample_bilinear2d_backward(
            grad, output, size, False, factor, factor
        )
        return _laid_out(found, grad_x)
    if grad_x.numel():
        grid, sizes = _tiles(grad_x)
        with torch.cuda.device_of(grad):
            _backward_kernel[grid](grad, grad_x, rows=rows, columns=columns, FACTOR=factor, **sizes)
    return grad_x


@_enlarge_backward.register_fake
def _(grad, factor):
    return _new(grad, grad.shape[2] // factor, grad.shape[3] // factor)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.factor = inputs


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _enlarge_backward(grad, ctx.factor), None


_enlarge.register_autograd(_differentiate, setup_context=_keep)


def enlarge(x_bchw: Tensor, factor: int = 2) -> Tensor:
    """[B, C, H, W] -> [B, C, R H, R W], bilinear, between centres of pixels.

    Differentiable; computed in fp32 and rounded once. A tensor that is not channels_last is copied
    first, a gradient too.

    Args:
        x_bchw: fp32, bf16 or fp16 (on a CPU also fp64), with one pixel at least.
        factor: Rows and columns that a pixel becomes, 2 to 16.

    Returns:
        Dtype of x, channels_last.

    Raises:
        ValueError: On a shape, dtype or factor that is not as said above.
    """
    check_image(x_bchw)
    if not min(x_bchw.shape[1:]):
        raise ValueError(f"x must have a pixel at least, got {tuple(x_bchw.shape)}")
    check_range(factor, "factor", 2, _MAX_FACTOR)
    batch, _, rows, columns = x_bchw.shape
    check_count(batch * rows * columns * factor**2, "pixels of the result")
    return _enlarge(x_bchw, factor)
