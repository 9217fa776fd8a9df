"""What stands between two convolutions, in one pass over the pixels: bias, activation, moving.

    activate   y = leaky(x + bias + residual), written into a frame of zeros or of reflections
    upscale    y = depth_to_space(leaky(x + bias))
    to_image   y = sigmoid(x + bias) of the first channels, in fp32

    leaky(z) = z where z > 0, else slope * z;   d leaky / dz = 1 where z > 0, else slope

As separate operations each of these reads and writes the largest tensors of a model once more;
fused, a step is bound by one read and one write each way. The sign of y is the sign of z, so the
backward pass needs y alone, which the next convolution keeps anyway, and nothing where slope is 1.
(Where y is 0 the gradient takes the slope, also where z > 0 was too small for y's type.)

All tensors are channels_last, NHWC in memory. Input channel (i * R + j) * c + k of a pixel goes to
row i, column j, channel k of its block, so the L = C / R channels of one i stay together, over all
columns j: depth-to-space moves whole runs of L, [B, H, W, R, L] -> [B, H, R, W, L]. With R = 1
that is no move, and `activate` and `upscale` are one kernel. The bias gradient is summed in fp32,
by program and then, by the program that ends last, over programs in a fixed order.

Shape letters: B faces, C channels, H rows, W columns, R upscale factor, L = C / R channels of a
run, P pixels of a batch, N programs side by side.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import uses_triton

LAUNCHES = {
    "mien::activate": 1,
    "mien::activate_backward": 1,
    "mien::to_image": 1,
    "mien::to_image_backward": 1,
}
"""Kernels that each operation launches on a GPU."""

_NHWC = torch.channels_last
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_TILE = 2048  # values of a program's tile: with 4 warps, 16 a thread
_RUN = 64  # channels of a tile at most: 128 bytes of bf16, the length of a cache line
_PROGRAMS = 1056  # of a backward pass at most: 8 for each of 132 SMs. Fixed: sums depend on it
_VALUES = 512  # of a program of `to_image`
_MOST = 2**30  # pixels, or values of `to_image`: kernels count them in 32 bits


@triton.jit
def _forward_kernel(
    x_ptr,         # [B, rows, columns, R, L]
    bias_ptr,      # [R, L], or None
    residual_ptr,  # like x, or None
    y_ptr,         # [B, frame_rows, R, frame_columns, L]
    num_pixels,    # of all frames
    rows, columns, frame_rows, frame_columns, top, left,
    SLOPE: tl.constexpr,
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
    run = program // num_chunks % FACTOR
    channels = program % num_chunks * BLOCK_L + tl.arange(0, BLOCK_L)
    pixels = program // (num_chunks * FACTOR) * BLOCK_P + tl.arange(0, BLOCK_P)

    source = pixels
    inside = pixels < num_pixels
    if HAS_BORDER:
        line = pixels // frame_columns
        row = line % frame_rows - top
        column = pixels % frame_columns - left
        if REFLECTS:
            row = rows - 1 - tl.abs(rows - 1 - tl.abs(row))
            column = columns - 1 - tl.abs(columns - 1 - tl.abs(column))
        else:
            inside = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        source = (line // frame_rows * rows + row) * columns + column
    mask = inside[:, None] & (channels < LENGTH)[None, :]
    x_at = (source.to(tl.int64) * FACTOR + run)[:, None] * LENGTH + channels[None, :]
    z = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + run * LENGTH + channels, mask=channels < LENGTH, other=0.0)
        z += bias.to(tl.float32)[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(z > 0, z, z * SLOPE)

    target = pixels.to(tl.int64)
    if FACTOR > 1:
        line = (pixels // columns).to(tl.int64)
        target = (line * FACTOR + run) * columns + pixels % columns
    if HAS_BORDER:
        y = tl.where(mask, y, 0.0)
        mask = (pixels < num_pixels)[:, None] & (channels < LENGTH)[None, :]
    y_at = target[:, None] * LENGTH + channels[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_up_last(
    partial_ptr,    # [N, NUM_CHANNELS] fp32
    grad_bias_ptr,  # [NUM_CHANNELS]
    arrived_ptr,    # programs that have stored their partial sums, 0 between two kernels
    channels, used,
    num_partials,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The program that arrives last adds up what all have stored, always in the same order: a launch
    # for each bias costs more than the sum. The barrier puts all threads' stores before the
    # counter's release; what other programs stored is read past the L1 cache.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == num_partials - 1:
        total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        for begin in range(0, num_partials, BLOCK_N):
            partials = begin + tl.arange(0, BLOCK_N)
            at = partials.to(tl.int64)[:, None] * NUM_CHANNELS + channels[None, :]
            mask = (partials < num_partials)[:, None] & used[None, :]
            total += tl.load(partial_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        grad_bias = tl.sum(total, axis=0)
        tl.store(grad_bias_ptr + channels, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=used)
        tl.store(arrived_ptr, 0)


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
def _backward_kernel(
    grad_ptr,     # [B, frame_rows, R, frame_columns, L]
    y_ptr,        # like grad, or None: slope 1
    grad_x_ptr,   # [B, rows, columns, R, L]
    partial_ptr,  # [N, R, L] fp32 sums of grad_x, or None
    grad_bias_ptr, arrived_ptr,  # as `_add_up_last` takes them, by part; None without partial_ptr
    num_pixels,   # of x
    num_tiles,    # of a program: each num_programs-th
    num_programs,
    rows, columns, frame_rows, frame_columns, top, left,
    SLOPE: tl.constexpr,
    HAS_BORDER: tl.constexpr,
    REFLECTS: tl.constexpr,  # the border shows the pixels inside, else zeros
    FACTOR: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_chunks: tl.constexpr = (LENGTH + BLOCK_L - 1) // BLOCK_L
    run = program // num_chunks % FACTOR
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
            place = (line.to(tl.int64) * FACTOR + run) * columns + pixels % columns
        at = place[:, None] * LENGTH + channels[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if REFLECTS:
            face, row, column = (
                pixels // columns // rows,
                pixels // columns % rows,
                pixels % columns,
            )
            bottom, right = frame_rows - rows - top, frame_columns - columns - left
            for shown in tl.static_range(1, 9):
                y_row, is_row = _place_shown(row, rows, top, bottom, shown // 3)
                y_column, is_column = _place_shown(column, columns, left, right, shown % 3)
                line = (face * frame_rows + y_row).to(tl.int64)
                more = (line * frame_columns + y_column)[:, None] * LENGTH + channels[None, :]
                again = mask & (is_row & is_column)[:, None]
                grad += tl.load(grad_ptr + more, mask=again, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(y > 0, grad, grad * SLOPE)
        x_at = (pixels.to(tl.int64) * FACTOR + run)[:, None] * LENGTH + channels[None, :]
        tl.store(grad_x_ptr + x_at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        out = partial_ptr + (first * FACTOR + run) * LENGTH + channels
        tl.store(out, tl.sum(total, axis=0), mask=used)
        _add_up_last(
            partial_ptr, grad_bias_ptr, arrived_ptr + program % (num_chunks * FACTOR),
            run * LENGTH + channels, used, num_programs,
            NUM_CHANNELS=FACTOR * LENGTH, BLOCK_N=BLOCK_P, BLOCK_C=BLOCK_L,
        )  # fmt: skip


@triton.jit
def _image_kernel(
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
    x_at = (at // CHANNELS).to(tl.int64) * NUM_CHANNELS + channel
    z = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, tl.sigmoid(z), mask=inside)


@triton.jit
def _image_backward_kernel(
    grad_ptr, y_ptr,  # [P, CHANNELS] fp32
    grad_x_ptr,       # [P, NUM_CHANNELS]
    partial_ptr,      # [N, NUM_CHANNELS] fp32 sums of grad_x, or None
    grad_bias_ptr, arrived_ptr,  # as `_add_up_last` takes them; None without partial_ptr
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
        mask = inside & (channels < NUM_CHANNELS)[None, :]
        out = grad_x_ptr + place * NUM_CHANNELS + channels[None, :]
        tl.store(out, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        used = channels < NUM_CHANNELS
        out = partial_ptr + first * NUM_CHANNELS + channels
        tl.store(out, tl.sum(total, axis=0), mask=used)
        _add_up_last(
            partial_ptr, grad_bias_ptr, arrived_ptr, channels, used, num_programs,
            NUM_CHANNELS=NUM_CHANNELS, BLOCK_N=BLOCK_P, BLOCK_C=BLOCK_C,
        )  # fmt: skip


def _framed_shape(x_bchw: Tensor, factor: int, border: Sequence[int]) -> tuple[int, ...]:
    """Shape of the result of `activate` and `upscale`."""
    batch, channels, rows, columns = x_bchw.shape
    left, right, top, bottom = border
    frame = (rows * factor + top + bottom, columns * factor + left + right)
    return (batch, channels // factor**2, *frame)


def _unframed_shape(y_bchw: Tensor, factor: int, border: Sequence[int]) -> tuple[int, ...]:
    """Shape of the input that `activate` or `upscale` made ``y_bchw`` of."""
    batch, channels, rows, columns = y_bchw.shape
    left, right, top, bottom = border
    inner = ((rows - top - bottom) // factor, (columns - left - right) // factor)
    return (batch, channels * factor**2, *inner)


def _new(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_NHWC)


def _new_bias_gradient(grad: Tensor, channels: int, dtype: torch.dtype | None) -> Tensor:
    """(C,) of the bias's dtype; no elements where there is no bias."""
    return grad.new_empty(0 if dtype is None else channels, dtype=dtype)


def _geometry(x_bchw: Tensor, factor: int, border: Sequence[int], reflect: bool) -> dict[str, int]:
    """Sizes and tile that the forward and the backward kernel share."""
    _, channels, rows, columns = x_bchw.shape
    left, right, top, bottom = border
    length = channels // factor
    block_l = min(triton.next_power_of_2(length), _RUN)
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
        "BLOCK_P": _TILE // block_l,
        "BLOCK_L": block_l,
    }


def _parts(geometry: dict[str, int]) -> int:
    """Programs that share a block of pixels."""
    return geometry["FACTOR"] * triton.cdiv(geometry["LENGTH"], geometry["BLOCK_L"])


def _shares(num_blocks: int, parts: int) -> tuple[int, int]:
    """Programs side by side, one at least, and blocks of each, for ``num_blocks`` of pixels in
    ``parts``."""
    each = max(triton.cdiv(num_blocks * parts, _PROGRAMS), 1)
    return max(triton.cdiv(num_blocks, each), 1), each


_arrived: dict[tuple[torch.device, int], Tensor] = {}
"""Counters by device and stream: kernels of one stream follow one another, and each leaves 0."""

_MAX_PARTS = 4096  # of a backward pass: some 65,000 channels with a factor of 6


def _arrived_of(device: torch.device) -> Tensor:
    """The counters of `_add_up_last` for the current stream, all 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _arrived.get((device, stream))
    if found is None:
        found = torch.zeros(_MAX_PARTS, dtype=torch.int32, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _arrived[device, stream] = found  # zeros of a capture are there at its replays alone
    return found


def _sums(grad_bias_c: Tensor, num_partials: int) -> tuple[Tensor | None, ...]:
    """Partial sums (N, C), their total and counters, as kernels take them; Nones without a bias."""
    if not len(grad_bias_c):
        return None, None, None
    partial_nc = grad_bias_c.new_empty(num_partials, len(grad_bias_c), dtype=torch.float32)
    return partial_nc, grad_bias_c, _arrived_of(grad_bias_c.device)


def _runs(x_bchw: Tensor, factor: int) -> Tensor:
    """View (B, H, W, R, L) of a channels_last tensor."""
    return x_bchw.permute(0, 2, 3, 1).unflatten(3, (factor, -1))


def _places(y_bchw: Tensor, factor: int, border: Sequence[int]) -> Tensor:
    """View (B, H, W, R, L) of a result of `activate` or `upscale`, without the frame."""
    left, right, top, bottom = border
    batch, channels, rows, columns = y_bchw.shape
    inner_bhwc = y_bchw.permute(0, 2, 3, 1)[:, top : rows - bottom, left : columns - right]
    rows, columns = inner_bhwc.shape[1] // factor, inner_bhwc.shape[2] // factor
    return inner_bhwc.view(batch, rows, factor, columns, factor * channels).transpose(2, 3)


def _activate_plain(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float, y: Tensor
) -> None:
    """Run on the CPU, in as few passes as torch has; x, residual and y are (B, H, W, R, L)."""
    wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    addend = 0 if bias is None else bias.to(wide).view(x.shape[3:])
    if x.dtype == wide:
        torch.add(x, addend, out=y)
        if residual is not None:
            y += residual
        if slope != 1:
            F.leaky_relu_(y, slope)
        return
    # Half types: face by face through fp32, which stays in the cache, so that the result is rounded
    # once. On (16, 512, 32, 32) bf16, one core: 3.1 ms, as much as all in bf16, which rounds
    # twice; the whole batch through fp32: 18 ms.
    z = torch.empty(x.shape[1:], dtype=wide)
    for i in range(len(x)):
        z.copy_(x[i]).add_(addend)
        if residual is not None:
            z += residual[i]
        y[i] = z if slope == 1 else F.leaky_relu_(z, slope)


def _clear_frame(y_bchw: Tensor, border: Sequence[int]) -> None:
    left, right, top, bottom = border
    _, _, rows, columns = y_bchw.shape
    y_bchw[:, :, :top] = 0
    y_bchw[:, :, rows - bottom :] = 0
    y_bchw[..., :left] = 0
    y_bchw[..., columns - right :] = 0


def _mirrors(y_bchw: Tensor, border: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of each line of a frame and of the line that it mirrors: rows, then whole columns."""
    for axis, (before, after) in ((2, border[2:]), (3, border[:2])):
        last = y_bchw.shape[axis] - after - 1
        for i in range(1, before + 1):
            yield y_bchw.select(axis, before - i), y_bchw.select(axis, before + i)
        for i in range(1, after + 1):
            yield y_bchw.select(axis, last + i), y_bchw.select(axis, last - i)


def _reflect_frame(y_bchw: Tensor, border: Sequence[int]) -> None:
    for shown, inside in _mirrors(y_bchw, border):
        shown.copy_(inside)


def _gathered_frame(grad_bchw: Tensor, border: Sequence[int]) -> Tensor:
    """The gradient with that of reflections added to the pixels inside, in fp32 at least."""
    wide = torch.float32 if grad_bchw.dtype.itemsize == 2 else grad_bchw.dtype
    summed_bchw = grad_bchw.to(wide, copy=True)
    for shown, inside in reversed(list(_mirrors(summed_bchw, border))):
        inside.add_(shown)
    return summed_bchw.to(grad_bchw.dtype)


def _sum_channels(grad_bchw: Tensor, grad_bias_c: Tensor) -> None:
    """Sums over all pixels, added up in fp32 at least."""
    grad_pc = grad_bchw.permute(0, 2, 3, 1).flatten(0, 2)
    if grad_pc.dtype.itemsize > 2:
        grad_bias_c.copy_(grad_pc.sum(0))
        return
    # Blocks that stay in the cache as fp32: as fast as a sum in the half type, which rounds it.
    sums_c = torch.zeros(grad_pc.shape[1])
    for block_pc in grad_pc.split(1024):
        sums_c += block_pc.float().sum(0)
    grad_bias_c.copy_(sums_c)


@torch.library.custom_op("mien::activate", mutates_args=())
def _activate(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    factor: int,
    border: list[int],
    reflect: bool,
) -> Tensor:
    x = x.contiguous(memory_format=_NHWC)
    if residual is not None:
        residual = residual.contiguous(memory_format=_NHWC)
    y = _new(x, _framed_shape(x, factor, border))
    if not uses_triton(x):
        runs = None if residual is None else _runs(residual, factor)
        _activate_plain(_runs(x, factor), bias, runs, slope, _places(y, factor, border))
        (_reflect_frame if reflect else _clear_frame)(y, border)
        return y
    geometry = _geometry(x, factor, border, reflect)
    num_pixels = len(x) * geometry["frame_rows"] * geometry["frame_columns"]
    grid = (triton.cdiv(num_pixels, geometry["BLOCK_P"]) * _parts(geometry),)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, bias, residual, y, num_pixels, SLOPE=slope, **geometry)
    return y


@_activate.register_fake
def _(x, bias, residual, slope, factor, border, reflect):
    return _new(x, _framed_shape(x, factor, border))


@torch.library.custom_op("mien::activate_backward", mutates_args=())
def _activate_backward(
    grad: Tensor,
    y: Tensor | None,
    slope: float,
    factor: int,
    border: list[int],
    reflect: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=_NHWC)
    grad_x = _new(grad, _unframed_shape(grad, factor, border))
    grad_bias = _new_bias_gradient(grad, grad_x.shape[1], bias_dtype)
    if not uses_triton(grad):
        if reflect:
            grad = _gathered_frame(grad, border)
        placed, runs = _places(grad, factor, border), _runs(grad_x, factor)
        if y is None:
            runs.copy_(placed)
        else:
            # The True: by the sign of the result, as the kernel does it.
            torch.ops.aten.leaky_relu_backward.grad_input(
                placed, _places(y, factor, border), slope, True, grad_input=runs
            )
        if bias_dtype is not None:
            _sum_channels(grad_x, grad_bias)
        return grad_x, grad_bias
    geometry = _geometry(grad_x, factor, border, reflect)
    num_pixels, parts = len(grad_x) * geometry["rows"] * geometry["columns"], _parts(geometry)
    side_by_side, each = _shares(triton.cdiv(num_pixels, geometry["BLOCK_P"]), parts)
    sums = _sums(grad_bias, side_by_side)
    with torch.cuda.device_of(grad):
        _backward_kernel[(side_by_side * parts,)](
            grad, y, grad_x, *sums, num_pixels, each, side_by_side, SLOPE=slope, **geometry
        )
    return grad_x, grad_bias


@_activate_backward.register_fake
def _(grad, y, slope, factor, border, reflect, bias_dtype):
    grad_x = _new(grad, _unframed_shape(grad, factor, border))
    return grad_x, _new_bias_gradient(grad, grad_x.shape[1], bias_dtype)


def _keep_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, residual, ctx.slope, ctx.factor, ctx.border, ctx.reflect = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(None if ctx.slope == 1 else output)


def _differentiate_activate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    grad_x, grad_bias = _activate_backward(
        grad, y, ctx.slope, ctx.factor, ctx.border, ctx.reflect, ctx.bias_dtype
    )
    grad_residual = grad_x if ctx.has_residual else None
    grad_bias = None if ctx.bias_dtype is None else grad_bias
    return grad_x, grad_bias, grad_residual, None, None, None, None


_activate.register_autograd(_differentiate_activate, setup_context=_keep_activate)


def _image_dtype(x_bchw: Tensor) -> torch.dtype:
    return torch.float64 if x_bchw.dtype == torch.float64 else torch.float32


@torch.library.custom_op("mien::to_image", mutates_args=())
def _to_image(x: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    x = x.contiguous(memory_format=_NHWC)
    y = _new(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))
    if not uses_triton(x):
        # One long run a channel: torch is slow on many runs of three values.
        for channel in range(channels):
            y[:, channel] = x[:, channel]
            if bias is not None:
                y[:, channel] += bias[channel].to(y.dtype)
        return y.sigmoid_()
    grid = (triton.cdiv(y.numel(), _VALUES),)
    with torch.cuda.device_of(x):
        _image_kernel[grid](x, bias, y, y.numel(), x.shape[1], channels, BLOCK=_VALUES)
    return y


@_to_image.register_fake
def _(x, bias, channels):
    return _new(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))


@torch.library.custom_op("mien::to_image_backward", mutates_args=())
def _to_image_backward(
    grad: Tensor, y: Tensor, num_channels: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=_NHWC)
    batch, channels, rows, columns = y.shape
    grad_x = _new(grad, (batch, num_channels, rows, columns), dtype)
    grad_bias = _new_bias_gradient(grad, num_channels, bias_dtype)
    if not uses_triton(grad):
        grad_z = torch.ops.aten.sigmoid_backward(grad, y)
        grad_x.zero_()
        for channel in range(channels):
            grad_x[:, channel] = grad_z[:, channel]
        if bias_dtype is not None:
            grad_bias[channels:] = 0
            _sum_channels(grad_z, grad_bias[:channels])
        return grad_x, grad_bias
    block_c = triton.next_power_of_2(num_channels)
    block_p = triton.cdiv(_TILE, block_c)
    num_pixels = batch * rows * columns
    side_by_side, each = _shares(triton.cdiv(num_pixels, block_p), 1)
    sums = _sums(grad_bias, side_by_side)
    with torch.cuda.device_of(grad):
        _image_backward_kernel[(side_by_side,)](
            grad, y, grad_x, *sums, num_pixels, each, side_by_side, num_channels, channels,
            BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return grad_x, grad_bias


@_to_image_backward.register_fake
def _(grad, y, num_channels, dtype, bias_dtype):
    grad_x = _new(grad, (len(y), num_channels, *y.shape[2:]), dtype)
    return grad_x, _new_bias_gradient(grad, num_channels, bias_dtype)


def _keep_to_image(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _ = inputs
    ctx.num_channels, ctx.dtype = x.shape[1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output)


def _differentiate_to_image(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    grad_x, grad_bias = _to_image_backward(grad, y, ctx.num_channels, ctx.dtype, ctx.bias_dtype)
    return grad_x, None if ctx.bias_dtype is None else grad_bias, None


_to_image.register_autograd(_differentiate_to_image, setup_context=_keep_to_image)


def activate(
    x_bchw: Tensor,
    bias_c: Tensor | None,
    *,
    slope: float,
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
        slope: Factor of negative values, 0 (ReLU) to 1 (no activation).
        residual_bchw: Added before the activation; shape and dtype of x.
        border: Pixels left, right, top and bottom that frame the result, as `F.pad` takes them.
        reflect: The frame shows the pixels inside it, mirrored at the outermost ones, instead of
            zeros; its gradient is added up in a fixed order.

    Returns:
        (B, C, H + top + bottom, W + left + right), dtype of x, channels_last.

    Raises:
        ValueError: On a shape, dtype or value that is not as said above.
    """
    _check(x_bchw, bias_c, slope)
    if residual_bchw is not None:
        found = (tuple(residual_bchw.shape), residual_bchw.dtype, residual_bchw.device)
        wanted = (tuple(x_bchw.shape), x_bchw.dtype, x_bchw.device)
        if found != wanted:
            raise ValueError(f"residual must be like x, {_words(*wanted)}, got {_words(*found)}")
    if len(border) != 4 or min(border) < 0:
        raise ValueError(
            f"border must be four numbers >= 0 (left, right, top, bottom), got {border}"
        )
    rows, columns = x_bchw.shape[2:]
    if reflect and (max(border[:2]) >= columns or max(border[2:]) >= rows):
        raise ValueError(
            f"border must be smaller than the {rows} rows and {columns} columns that it reflects, "
            f"got {border}"
        )
    _check_size(_framed_shape(x_bchw, 1, border), 1, "pixels of the result")
    return _activate(x_bchw, bias_c, residual_bchw, slope, 1, list(border), reflect)


def upscale(x_bchw: Tensor, bias_c: Tensor | None, *, slope: float, factor: int = 2) -> Tensor:
    """``depth_to_space(leaky(x + bias))``; input channel (i*R + j)*c + k is output (i, j, k).

    Differentiable in x and bias. Computed in fp32 and rounded once. A tensor that is not
    channels_last is copied first, a gradient too.

    Args:
        x_bchw: Output of a convolution; fp32, bf16 or fp16 (on a CPU also fp64).
        bias_c: One value a channel of x, x's dtype or fp32; None adds nothing.
        slope: Factor of negative values, 0 (ReLU) to 1 (no activation).
        factor: Rows and columns that a pixel becomes, 2 to 6.

    Returns:
        (B, C / factor^2, H * factor, W * factor), dtype of x, channels_last.

    Raises:
        ValueError: On a shape, dtype or value that is not as said above.
    """
    _check(x_bchw, bias_c, slope)
    if not 2 <= factor <= 6:
        raise ValueError(f"factor must be 2 to 6, got {factor}")
    if x_bchw.shape[1] % factor**2:
        raise ValueError(
            f"channels must be a multiple of factor^2 = {factor**2}, got {x_bchw.shape[1]}"
        )
    _check_size(x_bchw.shape, 1, "pixels of x")
    return _activate(x_bchw, bias_c, None, slope, factor, [0, 0, 0, 0], False)


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
    _check(x_bchw, bias_c, 1)
    if channels not in (1, 3) or channels > x_bchw.shape[1]:
        raise ValueError(
            f"channels must be 1 or 3 and at most x's {x_bchw.shape[1]}, got {channels}"
        )
    _check_size(x_bchw.shape, channels, "values of the result")
    return _to_image(x_bchw, bias_c, channels)


def _words(*facts: object) -> str:
    return " ".join(str(fact).removeprefix("torch.") for fact in facts)


def _check_size(shape: Sequence[int], channels: int, name: str) -> None:
    batch, _, rows, columns = shape
    number = batch * rows * columns * channels
    if number > _MOST:
        raise ValueError(f"{name} must be at most 2^30, got {number}: use a smaller batch")


def _check(x_bchw: Tensor, bias_c: Tensor | None, slope: float) -> None:
    """Refuse what the kernels would misread."""
    types = _TYPES[:3] if uses_triton(x_bchw) else _TYPES
    if x_bchw.ndim != 4 or x_bchw.dtype not in types:
        names = ", ".join(map(_words, types))
        raise ValueError(
            f"x must be (B, C, H, W) of {names}, got {_words(tuple(x_bchw.shape), x_bchw.dtype)}"
        )
    if not 0 <= slope <= 1:
        raise ValueError(f"slope must be 0 to 1, got {slope}")
    if bias_c is None:
        return
    channels = x_bchw.shape[1]
    if tuple(bias_c.shape) != (channels,) or bias_c.dtype not in (x_bchw.dtype, torch.float32):
        raise ValueError(
            f"bias must be ({channels},) of {_words(x_bchw.dtype)} or float32, got "
            f"{_words(tuple(bias_c.shape), bias_c.dtype)}"
        )
    if bias_c.device != x_bchw.device:
        raise ValueError(f"bias must be on {x_bchw.device}, got {bias_c.device}")
