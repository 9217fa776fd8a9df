"""A 3x3 convolution of stride 1 on the CPU, by Winograd's products in fp32.

Four neighbouring results of F(2x2, 3x3) take 16 multiplications a channel in place of 36 (Lavin and
Gray, arXiv 1509.09308). With d a 4x4 tile of the picture, g a kernel and y its 2x2 results,

    y = A^T ((G g G^T) * (B^T d B)) A

summed over the input channels, so that all tiles and channels are 16 products of matrices, which
a library does (`mien.kernels.matrix_products`); libmien does the transforms around them. The
gradient of the picture is the same with the turned kernel; that of the kernel is
G^T (sum over tiles (B^T d B) * (A dy A^T)) G.

Chosen on the CPU: against oneDNN's direct convolution on one thread of a Zen 4 or a Zen 5, forward
and backward, 512 to 1,024 channels of 16 px take 0.54 to 0.57 of the time. A GPU's library chooses
such products by itself.

Shape letters: B faces, H rows, W columns, I and O channels in and out, T tiles.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native
from .channels_last import NHWC
from .checks import check_tensor
from .matrix_products import has_wider_library, multiply_all

LAUNCHES = {
    "mien::conv3x3": 1,
    "mien::conv3x3_input_gradient": 1,
    "mien::conv3x3_weight_gradient": 1,
}
"""Kernels that each operation stands for on a GPU, where a library's convolution has its place."""

_LEAST_CHANNELS = 96 if has_wider_library() else 64
"""Channels in and out from which it pays. With vectors of 256 bits and 64 of each the transforms
cost what they save, with 32 more; with vectors of 512 bits so do 96 (on one thread of a Zen 5 0.97
of the time, 64 of each 1.2, 128 0.9)."""

_ROOM_BYTES = 32 * 2**20
"""Size from which tiles are made of a part of the faces at a time: about what a core has of the
last cache. Chosen on the CPU."""


# Of a thread by itself: two that convolve at once would write into one room.
class _Rooms(threading.local):
    """Memory for tiles, kept from call to call: fresh pages cost as much as the transforms."""

    def __init__(self) -> None:
        self.rooms: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Numbers of this shape, which hold anything."""
        size = torch.Size(shape).numel()
        room = self.rooms.get(name)
        if room is None or room.numel() < size:
            # A tensor of inference mode could be written to in no later call outside it.
            with torch.inference_mode(False):
                # Type and device by name: libmien writes fp32, whatever PyTorch makes by default.
                room = self.rooms[name] = torch.empty(size, dtype=torch.float32, device="cpu")
        return room[:size].view(shape)


_rooms = _Rooms()


def pays(x_bchw: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether a convolution of stride 1 is one that this can do, and faster than the library.

    That is so of 3x3 in fp32 on a CPU, outside autocast, with an even number of rows and columns.
    """
    rows, columns = (size + 2 * padding for size in x_bchw.shape[2:])
    return (
        weight.shape[2:] == (3, 3)
        and not (x_bchw.is_cuda or x_bchw.is_meta)
        and x_bchw.dtype == weight.dtype == torch.float32
        # Autocast does not reach into an operation of our own, which would stay in fp32.
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and rows % 2 == columns % 2 == 0
        and min(rows, columns) >= 4
        # Without faces the weight's gradient would be whatever its room held.
        and x_bchw.numel() > 0
    )


def _empty(size: tuple[int, ...]) -> Tensor:
    """Numbers that libmien is to write: fp32 on the CPU, whatever the caller's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu", memory_format=NHWC)


def _transform(
    kind: str, pixels: Tensor, tiles: Tensor, *, padding: int = 0, is_turned: bool = False
) -> None:
    """Carry out one transform of `mien_winograd_transform`, between memory NHWC and tiles."""
    ffi, lib = native.library()
    count, channels, rows, columns = pixels.shape
    job = ffi.new(
        "mien_winograd_job *",
        {
            "pixels": ffi.cast("float *", pixels.data_ptr()),
            "tiles": ffi.cast("float *", tiles.data_ptr()),
            "count": count,
            "rows": rows,
            "columns": columns,
            "channels": channels,
            "padding": padding,
            "transform": getattr(lib, f"MIEN_WINOGRAD_{kind}"),
            "is_turned": is_turned,
            # What PyTorch was told holds here too; 0 would mean every core.
            "num_threads": torch.get_num_threads(),
        },
    )
    native.call("winograd_cpu", job)


def _tiles_of(kind: str, room: str, pixels: Tensor, num_tiles: int, **settings: Any) -> Tensor:
    """The tiles [16, T, C] of pictures or kernels."""
    tiles = _rooms.take(room, 16, num_tiles, pixels.shape[1])
    _transform(kind, pixels, tiles, **settings)
    return tiles


def _parts(batch: int, tiles: int, channels: int) -> Iterator[slice]:
    """The faces whose tiles, so many a face, are made at once."""
    size = max(1, _ROOM_BYTES // (16 * tiles * channels * 4))
    return (slice(first, first + size) for first in range(0, batch, size))


def _convolve(x_bchw: Tensor, weight: Tensor, padding: int, *, is_turned: bool = False) -> Tensor:
    """The convolution, or with ``is_turned`` the one that leads back from O to I channels."""
    batch, inputs, rows, columns = x_bchw.shape
    outputs = weight.shape[1 if is_turned else 0]
    size = (batch, outputs, rows + 2 * padding - 2, columns + 2 * padding - 2)
    y_bchw = _empty(size)
    kernels = _tiles_of("KERNEL", "kernels", weight, len(weight), is_turned=is_turned)
    # The tiles are [16, O, I], as the way back from O to I takes them.
    kernels = kernels if is_turned else kernels.transpose(1, 2)
    face_tiles = size[2] * size[3] // 4
    for part in _parts(batch, face_tiles, max(inputs, outputs)):
        x, y = x_bchw[part], y_bchw[part]
        pixels = _tiles_of("INPUT", "pixels", x, len(x) * face_tiles, padding=padding)
        results = _rooms.take("results", 16, len(x) * face_tiles, outputs)
        multiply_all(pixels, kernels, results)
        _transform("OUTPUT", y, results)
    return y_bchw


@torch.library.custom_op("mien::conv3x3", mutates_args=(), device_types="cpu")
def _conv3x3(x_bchw: Tensor, weight: Tensor, padding: int) -> Tensor:
    x_bchw, weight = (each.contiguous(memory_format=NHWC) for each in (x_bchw, weight))
    return _convolve(x_bchw, weight, padding)


@_conv3x3.register_fake
def _(x_bchw, weight, padding):
    batch, _, rows, columns = x_bchw.shape
    size = (batch, len(weight), rows + 2 * padding - 2, columns + 2 * padding - 2)
    # In the layout of the real result, as what is planned without memory goes by its strides.
    return x_bchw.new_empty(size).to(memory_format=NHWC)


@torch.library.custom_op("mien::conv3x3_input_gradient", mutates_args=(), device_types="cpu")
def _input_gradient(grad_bchw: Tensor, weight: Tensor, padding: int) -> Tensor:
    grad_bchw, weight = (each.contiguous(memory_format=NHWC) for each in (grad_bchw, weight))
    # The way back from a 3x3 kernel with a padding of p is one with 2 - p, of the turned kernel.
    return _convolve(grad_bchw, weight, 2 - padding, is_turned=True)


@_input_gradient.register_fake
def _(grad_bchw, weight, padding):
    batch, _, rows, columns = grad_bchw.shape
    size = (batch, weight.shape[1], rows - 2 * padding + 2, columns - 2 * padding + 2)
    return grad_bchw.new_empty(size).to(memory_format=NHWC)


@torch.library.custom_op("mien::conv3x3_weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(grad_bchw: Tensor, x_bchw: Tensor, padding: int) -> Tensor:
    grad_bchw, x_bchw = (each.contiguous(memory_format=NHWC) for each in (grad_bchw, x_bchw))
    batch, outputs, rows, columns = grad_bchw.shape
    inputs, face_tiles = x_bchw.shape[1], rows * columns // 4
    kernels = _rooms.take("kernels", 16, outputs, inputs)
    for part in _parts(batch, face_tiles, max(inputs, outputs)):
        x, grad = x_bchw[part], grad_bchw[part]
        pixels = _tiles_of("INPUT", "pixels", x, len(x) * face_tiles, padding=padding)
        grads = _tiles_of("GRADIENT", "results", grad, len(x) * face_tiles).transpose(1, 2)
        # The first product overwrites the room, which holds anything.
        multiply_all(grads, pixels, kernels, adds=part.start > 0)
    weight = _empty((outputs, inputs, 3, 3))
    _transform("KERNEL_GRADIENT", weight, kernels)
    return weight


@_weight_gradient.register_fake
def _(grad_bchw, x_bchw, padding):
    size = (grad_bchw.shape[1], x_bchw.shape[1], 3, 3)
    return x_bchw.new_empty(size).to(memory_format=NHWC)


def gradients(
    grad_bchw: Tensor,
    x_bchw: Tensor,
    weight: Tensor,
    padding: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the picture and of the kernel, as far as they are needed; see `conv3x3`."""
    return (
        _input_gradient(grad_bchw, weight, padding) if needs_x else None,
        _weight_gradient(grad_bchw, x_bchw, padding) if needs_weight else None,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_bchw, weight, ctx.padding = inputs
    ctx.save_for_backward(x_bchw, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs_x, needs_weight, _ = ctx.needs_input_grad
    x_bchw, weight = ctx.saved_tensors
    return *gradients(grad, x_bchw, weight, ctx.padding, needs_x, needs_weight), None


_conv3x3.register_autograd(_differentiate, setup_context=_keep)


def conv3x3(x_bchw: Tensor, weight: Tensor, padding: int = 1) -> Tensor:
    """[B, I, H, W] -> [B, O, H + 2 padding - 2, W + 2 padding - 2]: products without a bias.

    Differentiable; the results are those of a direct convolution within 1e-5 of their size.

    Args:
        x_bchw: fp32, on the CPU, of one face or more; its rows and columns are even and, with the
            padding, at least 4.
        weight: [O, I, 3, 3] fp32.
        padding: Zeros before and after each axis, 0 or 1.

    Returns:
        fp32, channels_last.

    Raises:
        ValueError: On a shape, dtype or padding that is not as said above.
    """
    cpu = torch.device("cpu")
    if x_bchw.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"x and weight must have 4 axes, got {x_bchw.ndim} and {weight.ndim}")
    check_tensor(x_bchw, "x", tuple(x_bchw.shape), (torch.float32,), cpu)
    check_tensor(weight, "weight", (len(weight), x_bchw.shape[1], 3, 3), (torch.float32,), cpu)
    batch, inputs, rows, columns = x_bchw.shape
    if not batch or not inputs or not len(weight):
        raise ValueError(
            "x must have at least 1 face, and both at least 1 channel, got "
            f"{tuple(x_bchw.shape)} and {tuple(weight.shape)}"
        )
    if padding not in (0, 1) or rows % 2 or columns % 2 or min(rows, columns) + 2 * padding < 4:
        raise ValueError(
            "rows and columns must be even and, with padding 0 or 1, at least 4, "
            f"got {rows}x{columns} and {padding}"
        )
    return _conv3x3(x_bchw, weight, padding)
