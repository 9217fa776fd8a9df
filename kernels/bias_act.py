"""What stands between two convolutions, in one pass over the pixels: bias, activation, moving.

    bias_act                  y = leaky(x + bias + residual), in a frame of zeros or of reflections
    bias_act_depth_to_space   y = depth_to_space(leaky(x + bias))

    leaky(z) = z where z > 0, else negative_slope * z
    d leaky / dz = 1 where z > 0, else negative_slope

As separate operations each of these reads and writes the largest tensors of a model once more;
fused, a step is bound by one read and one write each way. The sign of y is the sign of z, so the
backward pass needs y alone, which the next convolution keeps anyway, and nothing where the slope is
1. (Where y is 0 the gradient takes the slope, also where z > 0 was too small for y's type.)

All tensors are channels_last, NHWC in memory. Input channel (i * R + j) * c + k of a pixel goes to
row i, column j, channel k of its block: TensorFlow's order, which the models have, not that of
PyTorch's pixel_shuffle. So the L = C / R channels of one i stay together, over all columns j:
depth-to-space moves whole groups of L, [B, H, W, R, L] -> [B, H, R, W, L]. With R = 1 that is no
move, and both operations are one kernel. The bias gradient is summed as `channels_last` says.

Shape letters: B faces, C channels, H rows, W columns, R upscale factor, L = C / R channels of a
group, P pixels of a batch, N programs side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act_cpu import framed_shape, run_backward, run_forward, unframed_shape
from .channels_last import (
    MAX_BLOCK_CHANNELS,
    NHWC,
    TILE,
    add_up_last,
    bias_sums,
    new_bias_gradient,
    new_image,
    programs_and_tiles,
    sum_channels,
)
from .checks import check_count, check_image, check_range, check_tensor
from .dispatch import uses_triton

LAUNCHES = {"mien::bias_act": 1, "mien::bias_act_backward": 1}
"""Kernels that each operation launches on a GPU."""


@triton.jit
def _forward_kernel(
    x_ptr,         # [B, rows, columns, R, L]
    bias_ptr,      # [R, L], or None
    residual_ptr,  # like x, or None
    y_ptr,         # [B, frame_rows, R, frame_columns, L]
    num_pixels,    # of all frames
    rows, columns, frame_rows, frame_columns, top, left,
    NEGATIVE_SLOPE: tl.constexpr,
    HAS_BORDER: tl.constexpr,
    REFLECTS: tl.constexpr,  # the border shows the pixels inside, else zeros
    FACTOR: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take neighbouring channels, then the next pixels.
    program = tl.program_id(0)
    num_chunks: tl.constexpr = (LENGTH + BLOCK_L - 1) // BLOCK_L
    group = program // num_chunks % FACTOR
    channels = program % num_chunks * BLOCK_L + tl.arange(0, BLOCK_L)
    pixels = program // (num_chunks * FACTOR) * BLOCK_P + tl.arange(0, BLOCK_P)

    source = pixels
    inside = pixels < num_pixels
    if HAS_BORDER:
        line = pixels // frame_columns
        row = line % frame_rows - top
        column = pixels % frame_columns - left
        if REFLECTS:
            # Mirrors at both ends, once at each: `bias_act` refuses a border that would need more.
            row = rows - 1 - tl.abs(rows - 1 - tl.abs(row))
            column = columns - 1 - tl.abs(columns - 1 - tl.abs(column))
        else:
            inside = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        source = (line // frame_rows * rows + row) * columns + column
    mask = inside[:, None] & (channels < LENGTH)[None, :]
    # `check_count` holds pixels to 32 bits; times their channels they need 64.
    x_at = (source.to(tl.int64) * FACTOR + group)[:, None] * LENGTH + channels[None, :]
    z = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * LENGTH + channels, mask=channels < LENGTH, other=0.0)
        z += bias.to(tl.float32)[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(z > 0, z, z * NEGATIVE_SLOPE)

    target = pixels.to(tl.int64)
    if FACTOR > 1:
        line = (pixels // columns).to(tl.int64)
        target = (line * FACTOR + group) * columns + pixels % columns
    if HAS_BORDER:
        # Outside the picture z is the bias. The memory of y was never cleared, so zeros are stored.
        y = tl.where(mask, y, 0.0)
        mask = (pixels < num_pixels)[:, None] & (channels < LENGTH)[None, :]
    y_at = target[:, None] * LENGTH + channels[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place_shown(number, size, before, after, which: tl.constexpr):
    # Where a frame shows row or column ``number`` of ``size``, and whether it does: at its place
    # (0), mirrored before the first (1) or after the last (2).
    if which == 0:
        return number + before, number >= 0
    if which == 1:
        return before - number, (number >= 1) & (number <= before)
    return before + 2 * (size - 1) - number, (number <= size - 2) & (number >= size - 1 - after)


@triton.jit
def _with_reflections(
    grad, grad_ptr, pixels, channels, mask, rows, columns, frame_rows, frame_columns, top, left,
    LENGTH: tl.constexpr,
):  # fmt: skip
    # The gradient and those of all places of the frame that mirror these pixels, in a fixed order.
    face, row, column = pixels // columns // rows, pixels // columns % rows, pixels % columns
    bottom, right = frame_rows - rows - top, frame_columns - columns - left
    # 0 of the nine is the pixel's own place, whose gradient the caller has read. Gathering needs no
    # atomics, which would add in an order of chance.
    for shown in tl.static_range(1, 9):
        y_row, is_row = _place_shown(row, rows, top, bottom, shown // 3)
        y_column, is_column = _place_shown(column, columns, left, right, shown % 3)
        line = (face * frame_rows + y_row).to(tl.int64)
        more = (line * frame_columns + y_column)[:, None] * LENGTH + channels[None, :]
        again = mask & (is_row & is_column)[:, None]
        grad += tl.load(grad_ptr + more, mask=again, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _backward_kernel(
    grad_ptr,     # [B, frame_rows, R, frame_columns, L]
    y_ptr,        # like grad, or None: negative_slope 1
    grad_x_ptr,   # [B, rows, columns, R, L]
    partial_ptr,  # [N, R, L] fp32 sums of grad_x, or None
    grad_bias_ptr, arrived_ptr,  # as `add_up_last` takes them, by part; None without partial_ptr
    num_pixels,   # of x
    num_tiles,    # of a program: each num_programs-th
    num_programs,
    rows, columns, frame_rows, frame_columns, top, left,
    NEGATIVE_SLOPE: tl.constexpr,
    HAS_BORDER: tl.constexpr,
    REFLECTS: tl.constexpr,  # the border shows the pixels inside, else zeros
    FACTOR: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_chunks: tl.constexpr = (LENGTH + BLOCK_L - 1) // BLOCK_L
    group = program // num_chunks % FACTOR
    channels = program % num_chunks * BLOCK_L + tl.arange(0, BLOCK_L)
    first = program // (num_chunks * FACTOR)
    used = channels < LENGTH

    total = tl.zeros((BLOCK_P, BLOCK_L), dtype=tl.float32)
    for tile in range(num_tiles):
        pixels = (tile * num_programs + first) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (pixels < num_pixels)[:, None] & used[None, :]
        place = pixels.to(tl.int64)
        if HAS_BORDER:
            line = pixels // columns
            frame_line = line // rows * frame_rows + line % rows + top
            place = frame_line.to(tl.int64) * frame_columns + pixels % columns + left
        if FACTOR > 1:
            line = pixels // columns
            place = (line.to(tl.int64) * FACTOR + group) * columns + pixels % columns
        at = place[:, None] * LENGTH + channels[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if REFLECTS:
            grad = _with_reflections(
                grad, grad_ptr, pixels, channels, mask, rows, columns, frame_rows, frame_columns,
                top, left, LENGTH,
            )  # fmt: skip
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(y > 0, grad, grad * NEGATIVE_SLOPE)
        x_at = (pixels.to(tl.int64) * FACTOR + group)[:, None] * LENGTH + channels[None, :]
        tl.store(grad_x_ptr + x_at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        # Places outside were loaded as 0, so they add nothing.
        total += grad
    if partial_ptr is not None:
        out = partial_ptr + (first * FACTOR + group) * LENGTH + channels
        tl.store(out, tl.sum(total, axis=0), mask=used)
        # A counter for each part of the channels, since only programs of one part add to one sum.
        add_up_last(
            partial_ptr, grad_bias_ptr, arrived_ptr + program % (num_chunks * FACTOR),
            group * LENGTH + channels, used, num_programs,
            NUM_CHANNELS=FACTOR * LENGTH, BLOCK_N=BLOCK_P, BLOCK_C=BLOCK_L,
        )  # fmt: skip


def _geometry(x_bchw: Tensor, factor: int, border: Sequence[int], reflect: bool) -> dict[str, int]:
    """Sizes and tile that the forward and the backward kernel share."""
    _, channels, rows, columns = x_bchw.shape
    left, right, top, bottom = border
    length = channels // factor
    # tl.arange takes powers of 2 alone: channels beyond the length are masked.
    block_l = min(triton.next_power_of_2(length), MAX_BLOCK_CHANNELS)
    return {
        "rows": rows,
        "columns": columns,
        "frame_rows": rows + top + bottom,
        "frame_columns": columns + left + right,
        "top": top,
        "left": left,
        "HAS_BORDER": any(border),
        "REFLECTS": reflect and any(border),
        "FACTOR": factor,
        "LENGTH": length,
        "BLOCK_P": TILE // block_l,
        "BLOCK_L": block_l,
    }


def _parts(geometry: dict[str, int]) -> int:
    """Programs that share a block of pixels."""
    return geometry["FACTOR"] * triton.cdiv(geometry["LENGTH"], geometry["BLOCK_L"])


# An operation of its own: torch.compile takes it whole, and the launches of a step are counted by
# what PyTorch dispatches.
@torch.library.custom_op("mien::bias_act", mutates_args=())
def _bias_act(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float,
    factor: int,
    border: list[int],
    reflect: bool,
) -> Tensor:
    x = x.contiguous(memory_format=NHWC)
    if residual is not None:
        residual = residual.contiguous(memory_format=NHWC)
    y = new_image(x, framed_shape(x, factor, border))
    if not uses_triton(x):
        run_forward(x, bias, residual, negative_slope, factor, y, border, reflect)
        return y
    geometry = _geometry(x, factor, border, reflect)
    num_pixels = len(x) * geometry["frame_rows"] * geometry["frame_columns"]
    grid = (triton.cdiv(num_pixels, geometry["BLOCK_P"]) * _parts(geometry),)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, bias, residual, y, num_pixels, NEGATIVE_SLOPE=negative_slope, **geometry
        )
    return y


@_bias_act.register_fake
def _(x, bias, residual, negative_slope, factor, border, reflect):
    return new_image(x, framed_shape(x, factor, border))


@torch.library.custom_op("mien::bias_act_backward", mutates_args=())
def _bias_act_backward(
    grad: Tensor,
    y: Tensor | None,
    negative_slope: float,
    factor: int,
    border: list[int],
    reflect: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=NHWC)
    grad_x = new_image(grad, unframed_shape(grad, factor, border))
    grad_bias = new_bias_gradient(grad, grad_x.shape[1], bias_dtype)
    if not uses_triton(grad):
        run_backward(grad, y, negative_slope, factor, grad_x, border, reflect)
        if bias_dtype is not None:
            sum_channels(grad_x, grad_bias)
        return grad_x, grad_bias
    geometry = _geometry(grad_x, factor, border, reflect)
    num_pixels, parts = len(grad_x) * geometry["rows"] * geometry["columns"], _parts(geometry)
    side_by_side, each = programs_and_tiles(triton.cdiv(num_pixels, geometry["BLOCK_P"]), parts)
    sums = bias_sums(grad_bias, side_by_side)
    with torch.cuda.device_of(grad):
        _backward_kernel[(side_by_side * parts,)](
            grad, y, grad_x, *sums, num_pixels, each, side_by_side,
            NEGATIVE_SLOPE=negative_slope, **geometry,
        )  # fmt: skip
    return grad_x, grad_bias


@_bias_act_backward.register_fake
def _(grad, y, negative_slope, factor, border, reflect, bias_dtype):
    grad_x = new_image(grad, unframed_shape(grad, factor, border))
    return grad_x, new_bias_gradient(grad, grad_x.shape[1], bias_dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, residual, ctx.negative_slope, ctx.factor, ctx.border, ctx.reflect = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(None if ctx.negative_slope == 1 else output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    grad_x, grad_bias = _bias_act_backward(
        grad, y, ctx.negative_slope, ctx.factor, ctx.border, ctx.reflect, ctx.bias_dtype
    )
    # x and residual are summands of one sum, so one tensor is the gradient of both.
    grad_residual = grad_x if ctx.has_residual else None
    # The operation gives a tensor in any case; autograd wants None where there is no bias.
    grad_bias = None if ctx.bias_dtype is None else grad_bias
    return grad_x, grad_bias, grad_residual, None, None, None, None


_bias_act.register_autograd(_differentiate, setup_context=_keep)


def bias_act(
    x_bchw: Tensor,
    bias_c: Tensor | None,
    *,
    negative_slope: float,
    residual_bchw: Tensor | None = None,
    border: Sequence[int] = (0, 0, 0, 0),
    reflect: bool = False,
) -> Tensor:
    """``leaky(x + bias + residual)`` in a frame of zeros, or of its own reflection.

    Differentiable in x, bias and residual. Computed in fp32 and rounded once. A tensor that is not
    channels_last is copied first, a gradient too.

    Args:
        x_bchw: Output of a convolution; fp32, bf16 or fp16 (on a CPU also fp64).
        bias_c: One value a channel, x's dtype or fp32; None adds nothing.
        negative_slope: Factor of negative values, 0 (ReLU) to 1 (no activation).
        residual_bchw: Added before the activation; shape and dtype of x.
        border: Pixels left, right, top and bottom that frame the result, as `F.pad` takes them.
        reflect: The frame shows the pixels inside it, mirrored at the outermost ones, instead of
            zeros; its gradient is added up in a fixed order.

    Returns:
        (B, C, H + top + bottom, W + left + right), dtype of x, channels_last.

    Raises:
        ValueError: On a shape, dtype or value that is not as said above.
    """
    check_image(x_bchw, bias_c)
    check_range(negative_slope, "negative_slope", 0, 1)
    if residual_bchw is not None:
        shape, dtypes = tuple(x_bchw.shape), (x_bchw.dtype,)
        check_tensor(residual_bchw, "residual", shape, dtypes, x_bchw.device)
    if len(border) != 4 or min(border) < 0:
        raise ValueError(
            f"border must be four numbers >= 0 (left, right, top, bottom), got {border}"
        )
    rows, columns = x_bchw.shape[2:]
    # As with F.pad: a frame shows pixels inside it, and each of them once at a side.
    if reflect and (max(border[:2]) >= columns or max(border[2:]) >= rows):
        raise ValueError(
            f"border must be smaller than the {rows} rows and {columns} columns that it reflects, "
            f"got {border}"
        )
    batch, _, framed_rows, framed_columns = framed_shape(x_bchw, 1, border)
    check_count(batch * framed_rows * framed_columns, "pixels of the result")
    return _bias_act(x_bchw, bias_c, residual_bchw, negative_slope, 1, list(border), reflect)


def bias_act_depth_to_space(
    x_bchw: Tensor, bias_c: Tensor | None, *, negative_slope: float, factor: int = 2
) -> Tensor:
    """``depth_to_space(leaky(x + bias))``; input channel (i*R + j)*c + k is output (i, j, k).

    Differentiable in x and bias. Computed in fp32 and rounded once. A tensor that is not
    channels_last is copied first, a gradient too.

    Args:
        x_bchw: Output of a convolution; fp32, bf16 or fp16 (on a CPU also fp64).
        bias_c: One value a channel of x, x's dtype or fp32; None adds nothing.
        negative_slope: Factor of negative values, 0 (ReLU) to 1 (no activation).
        factor: Rows and columns that a pixel becomes, 2 to 6.

    Returns:
        (B, C / factor^2, H * factor, W * factor), dtype of x, channels_last.

    Raises:
        ValueError: On a shape, dtype or value that is not as said above.
    """
    check_image(x_bchw, bias_c)
    check_range(negative_slope, "negative_slope", 0, 1)
    check_range(factor, "factor", 2, 6)
    if x_bchw.shape[1] % factor**2:
        raise ValueError(
            f"channels must be a multiple of factor^2 = {factor**2}, got {x_bchw.shape[1]}"
        )
    batch, _, rows, columns = x_bchw.shape
    check_count(batch * rows * columns, "pixels of x")
    return _bias_act(x_bchw, bias_c, None, negative_slope, factor, [0, 0, 0, 0], False)
