"""What stands between two convolutions, in one pass over the pixels: bias, activation, moving.

    activate   y = leaky(x + bias + residual), written into a frame of zeros
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
by program and then over programs in a fixed order.

Shape letters: B faces, C channels, H rows, W columns, R upscale factor, L = C / R channels of a
run, P pixels of a batch, N programs side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import uses_triton

LAUNCHES = {
    "mien::activate": 1,
    "mien::activate_backward": 2,
    "mien::to_image": 1,
    "mien::to_image_backward": 2,
}
"""Kernels that each operation launches on a GPU; backward one fewer where there is no bias."""

_NHWC = torch.channels_last
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _framed_shape(x_bchw: Tensor, factor: int, border: Sequence[int]) -> tuple[int, ...]:
    """Shape of the result of `activate` and `upscale`."""
    batch, channels, rows, columns = x_bchw.shape
    left, right, top, bottom = border
    return (
        batch,
        channels // factor**2,
        rows * factor + top + bottom,
        columns * factor + left + right,
    )


def _new(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_NHWC)


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
    x_bchw: Tensor,
    bias_c: Tensor | None,
    residual_bchw: Tensor | None,
    slope: float,
    factor: int,
    border: Sequence[int],
) -> Tensor:
    y_bchw = _new(x_bchw, _framed_shape(x_bchw, factor, border))
    left, right, top, bottom = border
    for edge in (
        y_bchw[:, :, :top],
        y_bchw[:, :, y_bchw.shape[2] - bottom :],
        y_bchw[..., :left],
        y_bchw[..., y_bchw.shape[3] - right :],
    ):
        edge.zero_()
    x, y = _runs(x_bchw, factor), _places(y_bchw, factor, border)
    residual = None if residual_bchw is None else _runs(residual_bchw, factor)
    wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    bias = 0 if bias_c is None else bias_c.to(wide).view(x.shape[3:])
    if x.dtype == wide:
        torch.add(x, bias, out=y)
        if residual is not None:
            y += residual
        F.leaky_relu_(y, slope)
        return y_bchw
    # Half types: a face at a time through fp32, which stays in the cache, so that the result is
    # rounded once. On (16, 512, 32, 32) bf16, one core, 3.1 ms; all in bf16, rounded twice, 3.1 ms;
    # the whole batch through fp32 18 ms.
    z = torch.empty(x.shape[1:], dtype=wide)
    for i in range(len(x)):
        z.copy_(x[i]).add_(bias)
        if residual is not None:
            z += residual[i]
        y[i] = F.leaky_relu_(z, slope)
    return y_bchw


def _activate_backward_plain(
    grad_bchw: Tensor,
    y_bchw: Tensor | None,
    slope: float,
    factor: int,
    border: Sequence[int],
    grad_x_bchw: Tensor,
) -> None:
    grad, grad_x = _places(grad_bchw, factor, border), _runs(grad_x_bchw, factor)
    if y_bchw is None:
        grad_x.copy_(grad)
        return
    torch.ops.aten.leaky_relu_backward.grad_input(
        grad, _places(y_bchw, factor, border), slope, True, grad_input=grad_x
    )


def _channel_sums(grad_bchw: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of each channel, added up in fp32 at least."""
    grad_pc = grad_bchw.permute(0, 2, 3, 1).flatten(0, 2)
    if grad_pc.dtype.itemsize > 2:
        return grad_pc.sum(0).to(dtype)
    # Parts that stay in the cache as fp32: as fast as a sum in the half type, which rounds it.
    parts = [part_pc.float().sum(0) for part_pc in grad_pc.split(1024)]
    return torch.stack(parts).sum(0).to(dtype)


@torch.library.custom_op("mien::activate", mutates_args=())
def _activate(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    factor: int,
    border: list[int],
) -> Tensor:
    x = x.contiguous(memory_format=_NHWC)
    if residual is not None:
        residual = residual.contiguous(memory_format=_NHWC)
    return _activate_plain(x, bias, residual, slope, factor, border)


@_activate.register_fake
def _(x, bias, residual, slope, factor, border):
    return _new(x, _framed_shape(x, factor, border))


@torch.library.custom_op("mien::activate_backward", mutates_args=())
def _activate_backward(
    grad: Tensor,
    y: Tensor | None,
    slope: float,
    factor: int,
    border: list[int],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=_NHWC)
    grad_x, grad_bias = _new_gradients(grad, factor, border, bias_dtype)
    _activate_backward_plain(grad, y, slope, factor, border, grad_x)
    if bias_dtype is not None:
        grad_bias = _channel_sums(grad_x, bias_dtype)
    return grad_x, grad_bias


def _new_gradients(
    grad_bchw: Tensor, factor: int, border: Sequence[int], bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of x and bias; the latter of no elements where there is no bias."""
    batch, channels, rows, columns = grad_bchw.shape
    left, right, top, bottom = border
    shape = (
        batch,
        channels * factor**2,
        (rows - top - bottom) // factor,
        (columns - left - right) // factor,
    )
    grad_bias = grad_bchw.new_empty(0 if bias_dtype is None else shape[1], dtype=bias_dtype)
    return _new(grad_bchw, shape), grad_bias


@_activate_backward.register_fake
def _(grad, y, slope, factor, border, bias_dtype):
    return _new_gradients(grad, factor, border, bias_dtype)


def _keep_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, residual, ctx.slope, ctx.factor, ctx.border = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(None if ctx.slope == 1 else output)


def _differentiate_activate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    grad_x, grad_bias = _activate_backward(
        grad, y, ctx.slope, ctx.factor, ctx.border, ctx.bias_dtype
    )
    return (
        grad_x,
        None if ctx.bias_dtype is None else grad_bias,
        grad_x if ctx.has_residual else None,
        *(None, None, None),
    )


_activate.register_autograd(_differentiate_activate, setup_context=_keep_activate)


@torch.library.custom_op("mien::to_image", mutates_args=())
def _to_image(x: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    x = x.contiguous(memory_format=_NHWC)
    y = _new(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))
    y.copy_(x[:, :channels])
    if bias is not None:
        y += bias[:channels].to(y.dtype).view(-1, 1, 1)
    return y.sigmoid_()


def _image_dtype(x_bchw: Tensor) -> torch.dtype:
    return torch.float64 if x_bchw.dtype == torch.float64 else torch.float32


@_to_image.register_fake
def _(x, bias, channels):
    return _new(x, (len(x), channels, *x.shape[2:]), _image_dtype(x))


@torch.library.custom_op("mien::to_image_backward", mutates_args=())
def _to_image_backward(
    grad: Tensor, y: Tensor, num_channels: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=_NHWC)
    grad_x, grad_bias = _new_image_gradients(grad, num_channels, dtype, bias_dtype)
    channels = y.shape[1]
    grad_z = torch.ops.aten.sigmoid_backward(grad, y)
    grad_x[:, :channels] = grad_z
    grad_x[:, channels:] = 0
    if bias_dtype is not None:
        grad_bias.zero_()[:channels] = _channel_sums(grad_z, bias_dtype)
    return grad_x, grad_bias


def _new_image_gradients(
    grad_bchw: Tensor, num_channels: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    shape = (len(grad_bchw), num_channels, *grad_bchw.shape[2:])
    grad_bias = grad_bchw.new_empty(0 if bias_dtype is None else num_channels, dtype=bias_dtype)
    return _new(grad_bchw, shape, dtype), grad_bias


@_to_image_backward.register_fake
def _(grad, y, num_channels, dtype, bias_dtype):
    return _new_image_gradients(grad, num_channels, dtype, bias_dtype)


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
) -> Tensor:
    """``leaky(x + bias + residual)`` in a frame of zeros.

    Differentiable in x, bias and residual. Computed in fp32 and rounded once. A tensor that is not
    channels_last is copied first, a gradient too.

    Args:
        x_bchw: Output of a convolution; fp32, bf16 or fp16 (on a CPU also fp64).
        bias_c: One value a channel, x's dtype or fp32; None adds nothing.
        slope: Factor of negative values, 0 (ReLU) to 1 (no activation).
        residual_bchw: Added before the activation; shape and dtype of x.
        border: Pixels of zeros left, right, top and bottom, as `F.pad` takes them.

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
    return _activate(x_bchw, bias_c, residual_bchw, slope, 1, list(border))


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
    return _activate(x_bchw, bias_c, None, slope, factor, [0, 0, 0, 0])


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
    return _to_image(x_bchw, bias_c, channels)


def _words(*facts: object) -> str:
    return " ".join(str(fact).removeprefix("torch.") for fact in facts)


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
