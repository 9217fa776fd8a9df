"""The losses that compare filtered pictures, and their gradients, in one launch.

    values_b = filtered_loss("gmsd", pred_bchw, target_bchw, weight_b1hw, filters)

gives of each face the mean of weight * map(pred, target); `core.losses` has the maps. Each of them
is pointwise functions between linear maps along the axes of a picture: filters with their borders,
halving, enlargement. Such a map is a matrix whose rows are short runs of numbers, and its
transpose, which the gradient takes, is another one. So there is no code for borders, sizes or
transposes: the matrices are packed (`pack`) when the loss is made.

One team works on a plane (one channel of one face) from its pixels to its gradient, and keeps what
lies between in a room of its own: on a GPU a block, with barriers between the stages, on a CPU a
thread, which has eight planes in the lanes of its vectors. Sums are taken in a fixed order, so the
bits are the same on every run, whatever the number of teams. With PyTorch's operations the same is
some dozens of passes over all pictures, most of them products with dense matrices, in autograd.

Shape letters: B faces, C channels, H rows, W columns, as many as rows; F filters.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native
from .checks import check_choice, check_memory, check_tensor

LOSSES = ("pixel_gradient_diff", "gmsd", "laploss", "ms_ssim")
"""Names of the losses; a name's place is its number in mien.h."""

LAUNCHES: dict[str, int] = {"mien::filtered_loss": 1}
"""Kernels that each operation launches on a GPU."""

MAX_PX = 4096
_PLANES_AT_ONCE = 8
"""Planes of a thread of the CPU: the lanes of an AVX2 vector of fp32."""

_BLOCKS = 132
"""Teams of a GPU: the multiprocessors of an H100. Chosen on the CPU, unmeasured on a GPU."""


class Filters(NamedTuple):
    """Packed matrices, each followed by its transpose; see `pack`."""

    firsts: Tensor
    """int32: of each row where its run begins."""

    taps: Tensor
    """fp32, or fp64 until it is moved: the runs, those of a matrix of one length."""

    shapes: tuple[tuple[int, int, int, int], ...]
    """(F, 4): rows and columns, numbers in a run of the matrix and of its transpose."""


def pack(matrices: Sequence[Tensor]) -> Filters:
    """The filters of a loss, in the order that mien.h states; matrices are (outputs, inputs)."""
    firsts, taps, shapes = [], [], []
    for matrix in matrices:
        runs = [_runs(each) for each in (matrix, matrix.T)]
        firsts += [first for first, _ in runs]
        taps += [run.flatten() for _, run in runs]
        shapes.append((*matrix.shape, *(run.shape[1] for _, run in runs)))
    return Filters(torch.cat(firsts), torch.cat(taps), tuple(shapes))


def _runs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Columns where the runs of the rows begin, int32, and the runs, as long as the longest."""
    columns = torch.arange(matrix.shape[1])
    is_tap = matrix != 0
    begin = columns.expand_as(matrix).where(is_tap, matrix.shape[1]).amin(dim=1)
    end = (columns + 1).expand_as(matrix).where(is_tap, 0).amax(dim=1)
    # At least one number, also where a matrix is all zeros.
    length = max(1, int((end - begin).max()))
    # All runs of a matrix are of one length: near the end one begins earlier, with taps of 0.
    first = begin.clamp(max=matrix.shape[1] - length)
    return first.int(), matrix.gather(1, first[:, None] + torch.arange(length))


@torch.library.custom_op("mien::filtered_loss", mutates_args=())
def _op(
    pred: Tensor,
    target: Tensor,
    weight: Tensor,
    firsts: Tensor,
    taps: Tensor,
    kind: int,
    shapes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    faces, channels, size, _ = pred.shape
    uses_cuda = dispatch.uses_cuda(pred.device)
    values = pred.new_empty((faces, channels))
    gradient = torch.empty_like(pred, memory_format=torch.contiguous_format)
    ffi, lib = native.library()

    def pointer(tensor: Tensor, kind: str = "float *") -> Any:
        return ffi.cast(kind, tensor.data_ptr())

    job = ffi.new(
        "mien_filtered_loss_job *",
        {
            "pred": pointer(pred),
            "target": pointer(target),
            "weight": pointer(weight),
            "values": pointer(values),
            "gradient": pointer(gradient),
            "faces": faces,
            "channels": channels,
            "size": size,
            "kind": kind,
            "num_filters": len(shapes) // 4,
            "filters": [shapes[i : i + 4] for i in range(0, len(shapes), 4)],
            "firsts": pointer(firsts, "int32_t *"),
            "taps": pointer(taps),
            "num_teams": _num_teams(faces * channels, uses_cuda),
        },
    )
    num_bytes = lib.mien_filtered_loss_workspace_bytes(job)
    # PyTorch's memory, which a CUDA graph keeps where one is captured; named, to outlive the call.
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=pred.device)
    room = pointer(workspace, "void *"), num_bytes
    if uses_cuda:
        native.launch("filtered_loss", pred.device, job, *room)
    else:
        native.call("filtered_loss_cpu", job, *room)
    return values, gradient


def _num_teams(num_planes: int, uses_cuda: bool) -> int:
    """Teams that the processor can have at work, and no more than have a plane."""
    if uses_cuda:
        return min(num_planes, _BLOCKS)
    threads = min(torch.get_num_threads(), math.ceil(num_planes / _PLANES_AT_ONCE))
    return threads * _PLANES_AT_ONCE


@_op.register_fake
def _(pred, target, weight, firsts, taps, kind, shapes):
    return pred.new_empty(pred.shape[:2]), torch.empty_like(pred)


class _Differentiable(torch.autograd.Function):
    """The operation, whose gradient is made with its values and waits for its factor."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, *arguments: Any) -> Tensor:
        values, gradient = _op(pred, *arguments)
        ctx.save_for_backward(gradient)
        return values.mean(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0][:, None, None, None] * gradient, *[None] * 6


def filtered_loss(
    name: str, pred_bchw: Tensor, target_bchw: Tensor, weight_b1hw: Tensor, filters: Filters
) -> Tensor:
    """(B,): of each face the mean of weight * map; autograd differentiates it by ``pred_bchw``.

    Args:
        name: Name of the loss, in `LOSSES`.
        pred_bchw: Decoded faces, (B, 1 to 4, S, S), contiguous fp32, 0..1.
        target_bchw: Faces to match, the same.
        weight_b1hw: Weight of each pixel, (B, 1, S, S) contiguous fp32.
        filters: Packed for pictures of S px.

    Raises:
        ValueError: On tensors that do not fit, or that need a gradient which there is none of.
    """
    check_choice(name, "loss", LOSSES)
    _check(pred_bchw, target_bchw, weight_b1hw, filters)
    shapes = [number for shape in filters.shapes for number in shape]
    kind = LOSSES.index(name)
    return _Differentiable.apply(
        pred_bchw, target_bchw, weight_b1hw, filters.firsts, filters.taps, kind, shapes
    )


def _check(pred: Tensor, target: Tensor, weight: Tensor, filters: Filters) -> None:
    """Refuse tensors that the kernels would misread."""
    shape = tuple(pred.shape)
    if len(shape) != 4 or 0 in shape or shape[1] > 4 or shape[2] != shape[3] or shape[2] > MAX_PX:
        raise ValueError(
            f"pred must be (B, 1 to 4, S, S), not empty and of at most {MAX_PX} px, got {shape}"
        )
    rows = sum(rows + columns for rows, columns, *_ in filters.shapes)
    taps = sum(rows * run + columns * turned for rows, columns, run, turned in filters.shapes)
    fp32 = (torch.float32,)
    arguments: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("pred", pred, shape, fp32),
        ("target", target, shape, fp32),
        ("weight", weight, (shape[0], 1, *shape[2:]), fp32),
        ("firsts", filters.firsts, (rows,), (torch.int32,)),
        ("taps", filters.taps, (taps,), fp32),
    ]
    for name, tensor, tensor_shape, dtypes in arguments:
        check_tensor(tensor, name, tensor_shape, dtypes, pred.device)
        if pred.device.type != "meta":
            check_memory(tensor, name)
        if tensor.requires_grad and name != "pred":
            raise ValueError(f"{name} must not require a gradient: there is none by it; detach it")
