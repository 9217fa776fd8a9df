"""Norms of gradients on the device: of each chunk, of all together, and clipping by tensor.

    1. norm     sums of squares of the gradients, a number a chunk; over several backward passes
                the gradients are summed into accumulators on the way; those of gradients of low
                rank come from their factors (`dense_norm`)
    2. factors  clipping by norm: the factor of each tensor

Each is one launch. The squares of a chunk are summed in fp32, chunks in float64.

Letters: T tensors, N chunks of them.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import uses_triton
from .optimizer_scalars import Scalar
from .tensor_table import CHUNK, NUM_COLUMNS, Column, tensor_at

# Triton reads no globals but constants.
_LOSS_SCALE = tl.constexpr(Scalar.LOSS_SCALE)
_ACCUMULATED_GRADIENTS = tl.constexpr(Scalar.ACCUMULATED_GRADIENTS)
_GRADIENT_FACTOR = tl.constexpr(Scalar.GRADIENT_FACTOR)
_ACCUMULATOR, _NUM_COLUMNS = tl.constexpr(Column.ACCUMULATOR), tl.constexpr(NUM_COLUMNS)
_FIRST_CHUNK, _NUM_CHUNKS = tl.constexpr(Column.FIRST_CHUNK), tl.constexpr(Column.NUM_CHUNKS)

WARPS = 8
"""Warps of a program that sums squares. Chosen on the CPU, unmeasured on a GPU."""

BLOCK_SUM = 4096
"""Chunks whose sums one program adds at a time. Chosen on the CPU, unmeasured on a GPU."""

# Chosen on the CPU, unmeasured on a GPU.
_BLOCK_NORM = 4096  # elements at a time; two 16-byte loads a thread of 16-bit gradients
_BLOCK_TENSOR = 256  # chunks of one tensor at a time
_WARPS_TENSOR = 4

_ROW = 1024
"""Elements that plain PyTorch squares and adds at a time: rows keep its fp32 sums exact enough. As
long as 4 kB, unmeasured against other lengths."""


@triton.jit
def _gathered(gradients, accumulators, at, inside, is_first):
    """Gradients in fp32, added to what the accumulators hold, if there are any."""
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    if accumulators is not None:
        # The first gradient of a step overwrites: what they hold is the sum of the step before.
        gradient += tl.load(accumulators + at, mask=inside & (is_first == 0), other=0.0)
        tl.store(accumulators + at, gradient, mask=inside)
    return gradient


@triton.jit
def _norm_kernel(
    tensors_ptr,    # [T, NUM_COLUMNS] int64
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    partials_ptr,   # [N] fp64
    scalars_ptr,    # fp64, see `Scalar`
    gradient_ptr,   # any gradient, for its type
    ACCUMULATES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk = chunks_ptr + program * 3
    tensor = tl.load(chunk)
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    gradients = tensor_at(gradients_ptr + tensor, gradient_ptr.dtype) + start
    accumulators = None
    is_first = 1
    if ACCUMULATES:
        column = tensors_ptr + tensor * _NUM_COLUMNS + _ACCUMULATOR
        accumulators = tensor_at(column, tl.pointer_type(tl.float32)) + start
        is_first = (tl.load(scalars_ptr + _ACCUMULATED_GRADIENTS) == 0).to(tl.int32)

    # Whole groups of eight first: only a bound known as a multiple keeps the accesses wide.
    whole = elements // 8 * 8
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, whole, BLOCK):
        at = first + lanes
        gradient = _gathered(gradients, accumulators, at, at < whole, is_first)
        squares += gradient * gradient
    last = whole + tl.arange(0, 8)
    gradient = _gathered(gradients, accumulators, last, last < elements, is_first)
    total = tl.sum(squares, axis=0) + tl.sum(gradient * gradient, axis=0)
    tl.store(partials_ptr + program, total.to(tl.float64))


@triton.jit
def _not_below_zero(squares):
    """A sum of squares, which rounding may have left below zero in `dense_norm`; NaN stays NaN."""
    return tl.where(squares < 0, 0.0, squares)


@triton.jit
def mean_norm(partials_ptr, scalars_ptr, num_partials, BLOCK: tl.constexpr):
    """(norm of the mean gradient, what makes it of the summed one), the loss scale undone."""
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_partials, BLOCK):
        inside = first + lanes < num_partials
        squares += tl.load(partials_ptr + first + lanes, mask=inside, other=0.0)
    # Plus this one, which is counted only when the scalars are updated.
    sums = tl.load(scalars_ptr + _ACCUMULATED_GRADIENTS) + 1
    undone = tl.load(scalars_ptr + _LOSS_SCALE) * sums
    return tl.sqrt(_not_below_zero(tl.sum(squares, axis=0))) / undone, 1.0 / undone


@triton.jit
def _factors_kernel(
    tensors_ptr,   # [T, NUM_COLUMNS] int64
    partials_ptr,  # [N] fp64
    scalars_ptr,   # fp64, see `Scalar`
    factors_ptr,   # [T] fp32
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    row = tensors_ptr + tensor * _NUM_COLUMNS
    partials = partials_ptr + tl.load(row + _FIRST_CHUNK)
    num_chunks = tl.load(row + _NUM_CHUNKS)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_chunks, BLOCK):
        at = first + lanes
        squares += tl.load(partials + at, mask=at < num_chunks, other=0.0)
    summed_norm = tl.sqrt(_not_below_zero(tl.sum(squares, axis=0)))
    norm = summed_norm * tl.load(scalars_ptr + _GRADIENT_FACTOR)
    factor = tl.where(norm > BOUND, BOUND / tl.maximum(norm, BOUND), 1.0)
    tl.store(factors_ptr + tensor, factor.to(tl.float32))


@torch.library.custom_op("mien::optimize_norm", mutates_args=("accumulators", "partials_n"))
def norm_op(
    gradients: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    partials_n: Tensor,
    scalars: Tensor,
    tensors_tc: Tensor,
    gradient_row: Tensor,
    chunks_n3: Tensor,
) -> None:
    """Sums of squares of the gradients, or of what the accumulators hold with them, by chunk."""
    if not uses_triton(scalars):
        _plain_norm(gradients, accumulators, partials_n, scalars)
        return
    # Triton launches on the current device, which need not be that of the scalars.
    with torch.cuda.device_of(scalars):
        _norm_kernel[(len(chunks_n3),)](
            tensors_tc, gradient_row, chunks_n3, partials_n, scalars, gradients[0],
            ACCUMULATES=bool(accumulators), BLOCK=_BLOCK_NORM, num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("mien::optimize_factors", mutates_args=("factors_t",))
def factors_op(
    partials_n: Tensor, scalars: Tensor, factors_t: Tensor, tensors_tc: Tensor, bound: float
) -> None:
    """The factor of each tensor that is clipped by its own norm."""
    if not uses_triton(scalars):
        spans = tensors_tc[:, [Column.FIRST_CHUNK, Column.NUM_CHUNKS]].tolist()
        squares_t = torch.stack([partials_n[first:][:chunks].sum() for first, chunks in spans])
        norms_t = squares_t.clamp(min=0).sqrt() * scalars[Scalar.GRADIENT_FACTOR]
        factors_t.copy_((bound / norms_t).clamp(max=1.0))
        return
    with torch.cuda.device_of(scalars):
        _factors_kernel[(len(factors_t),)](
            tensors_tc, partials_n, scalars, factors_t,
            BOUND=bound, BLOCK=_BLOCK_TENSOR, num_warps=_WARPS_TENSOR,
        )  # fmt: skip


@norm_op.register_fake
@factors_op.register_fake
def _(*inputs):
    return None


def _plain_norm(
    gradients: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    partials_n: Tensor,
    scalars: Tensor,
) -> None:
    """Compute what the kernel does, with the sum of a whole tensor in the place of its first
    chunk."""
    if accumulators:
        own = list(accumulators)
        if scalars[Scalar.ACCUMULATED_GRADIENTS] == 0:
            torch._foreach_copy_(own, list(gradients))
        else:
            torch._foreach_add_(own, [each.float() for each in gradients])
        gradients = own
    if len(partials_n):
        # An empty tensor has no chunk: its 0 is added to that of another.
        chunks = [-(-each.numel() // CHUNK) for each in gradients]
        firsts_t = torch.tensor([0, *itertools.accumulate(chunks)][:-1])
        places_t = firsts_t.clamp(max=len(partials_n) - 1)
        partials_n.zero_().index_add_(0, places_t, _sums_of_squares(gradients))


def _sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of each tensor, float64. In rows: PyTorch's norm of 16 M numbers at once is
    1e-3 off."""
    # A flat view of any dense layout: view(-1) refuses channels_last, and a sum has no order.
    flats = [each.as_strided((each.numel(),), (1,)).float() for each in tensors]
    ends = [each.numel() // _ROW * _ROW for each in flats]
    rows = [each[:end].view(-1, _ROW) for each, end in zip(flats, ends, strict=True) if end]
    rests = [each[end:] for each, end in zip(flats, ends, strict=True)]
    norms = [torch.linalg.vector_norm(each, dim=1) for each in rows]
    joined = torch.cat([*norms, torch.stack(torch._foreach_norm(rests))]).double()
    of_rows, of_rests = joined[: -len(flats)], joined[-len(flats) :]
    by_tensor = of_rows.split([end // _ROW for end in ends])
    return torch.stack(torch._foreach_norm(list(by_tensor))).square() + of_rests.square()


def plain_mean_norm(partials_n: Tensor, scalars: Sequence[float]) -> float:
    """The norm that `mean_norm` gives, in plain PyTorch."""
    squares = float(partials_n.sum().clamp(min=0))
    sums = scalars[Scalar.ACCUMULATED_GRADIENTS] + 1
    return math.sqrt(squares) / (scalars[Scalar.LOSS_SCALE] * sums)
