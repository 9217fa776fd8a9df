"""Bias, activation and moving on a CPU, in as few passes as plain PyTorch has.

It does what the kernels of `bias_act` do, whose frame round an image is of zeros or of the image's
own reflection.

A border is (left, right, top, bottom) in pixels, as `torch.nn.functional.pad` takes them.

Shape letters: B faces, H rows, W columns, R upscale factor, L channels of a group.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def framed_shape(x_bchw: Tensor, factor: int, border: Sequence[int]) -> tuple[int, ...]:
    """Shape of the result of `bias_act` with this factor."""
    batch, channels, rows, columns = x_bchw.shape
    left, right, top, bottom = border
    frame = (rows * factor + top + bottom, columns * factor + left + right)
    return (batch, channels // factor**2, *frame)


def unframed_shape(y_bchw: Tensor, factor: int, border: Sequence[int]) -> tuple[int, ...]:
    """Shape of the input that `bias_act` made ``y_bchw`` of."""
    batch, channels, rows, columns = y_bchw.shape
    left, right, top, bottom = border
    inner = ((rows - top - bottom) // factor, (columns - left - right) // factor)
    return (batch, channels * factor**2, *inner)


def run_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float,
    factor: int,
    y: Tensor,
    border: Sequence[int],
    reflect: bool,
) -> None:
    """Write the result into ``y``; images are channels_last."""
    x, placed = _channel_groups(x, factor), _placed_groups(y, factor, border)
    residual = None if residual is None else _channel_groups(residual, factor)
    wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    addend = 0 if bias is None else bias.to(wide).view(x.shape[3:])
    if x.dtype == wide:
        # Right into its place in the frame, which a pad afterwards would copy once more.
        torch.add(x, addend, out=placed)
        if residual is not None:
            placed += residual
        if negative_slope != 1:
            F.leaky_relu_(placed, negative_slope)
    else:
        # Half types: face by face through fp32, which stays in the cache, so that the result is
        # rounded once. On (16, 512, 32, 32) bf16, one core: 3.1 ms, as much as all in bf16, which
        # rounds twice; the whole batch through fp32: 18 ms.
        z = x.new_empty(x.shape[1:], dtype=wide)
        for i in range(len(x)):
            z.copy_(x[i]).add_(addend)
            if residual is not None:
                z += residual[i]
            placed[i] = z if negative_slope == 1 else F.leaky_relu_(z, negative_slope)
    (_reflect_frame if reflect else _clear_frame)(y, border)


def run_backward(
    grad: Tensor,
    y: Tensor | None,
    negative_slope: float,
    factor: int,
    grad_x: Tensor,
    border: Sequence[int],
    reflect: bool,
) -> None:
    """Write the gradient by x into ``grad_x``; ``y`` is the result, None where the slope is 1."""
    if reflect:
        grad = _gathered_frame(grad, border)
    placed, groups = _placed_groups(grad, factor, border), _channel_groups(grad_x, factor)
    if y is None:
        groups.copy_(placed)
    else:
        # The True: by the sign of the result, as the kernel does it.
        torch.ops.aten.leaky_relu_backward.grad_input(
            placed, _placed_groups(y, factor, border), negative_slope, True, grad_input=groups
        )


def _channel_groups(x_bchw: Tensor, factor: int) -> Tensor:
    """View (B, H, W, R, L) of a channels_last tensor."""
    return x_bchw.permute(0, 2, 3, 1).unflatten(3, (factor, -1))


def _placed_groups(y_bchw: Tensor, factor: int, border: Sequence[int]) -> Tensor:
    """View (B, H, W, R, L) of a result of `bias_act`, without the frame."""
    left, right, top, bottom = border
    batch, channels, rows, columns = y_bchw.shape
    inner_bhwc = y_bchw.permute(0, 2, 3, 1)[:, top : rows - bottom, left : columns - right]
    rows, columns = inner_bhwc.shape[1] // factor, inner_bhwc.shape[2] // factor
    return inner_bhwc.view(batch, rows, factor, columns, factor * channels).transpose(2, 3)


def _clear_frame(y_bchw: Tensor, border: Sequence[int]) -> None:
    """Fill the frame with zeros."""
    left, right, top, bottom = border
    _, _, rows, columns = y_bchw.shape
    # The new image holds anything, and the next convolution reads the frame.
    y_bchw[:, :, :top] = 0
    y_bchw[:, :, rows - bottom :] = 0
    y_bchw[..., :left] = 0
    y_bchw[..., columns - right :] = 0


def _mirrors(y_bchw: Tensor, border: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of each line of a frame and of the line that it mirrors: rows, then whole columns."""
    # Whole columns after the rows: so a corner shows what is mirrored twice.
    for axis, (before, after) in ((2, border[2:]), (3, border[:2])):
        last = y_bchw.shape[axis] - after - 1
        for i in range(1, before + 1):
            yield y_bchw.select(axis, before - i), y_bchw.select(axis, before + i)
        for i in range(1, after + 1):
            yield y_bchw.select(axis, last + i), y_bchw.select(axis, last - i)


def _reflect_frame(y_bchw: Tensor, border: Sequence[int]) -> None:
    """Fill the frame with what it mirrors."""
    for shown, inside in _mirrors(y_bchw, border):
        shown.copy_(inside)


def _gathered_frame(grad_bchw: Tensor, border: Sequence[int]) -> Tensor:
    """The gradient with that of reflections added to the pixels inside, in fp32 at least."""
    wide = torch.float32 if grad_bchw.dtype.itemsize == 2 else grad_bchw.dtype
    # A copy also of fp32: an operation must not change the gradient that it was given.
    summed_bchw = grad_bchw.to(wide, copy=True)
    # Back in the order of filling, so that what a corner gave a row goes on from there inside.
    for shown, inside in reversed(list(_mirrors(summed_bchw, border))):
        inside.add_(shown)
    return summed_bchw.to(grad_bchw.dtype)
