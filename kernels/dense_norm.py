"""The norm of low-rank gradients from their factors, without a gradient in memory.

    |grad_output^T @ input|^2 = sum of (input @ input^T) * (grad_output @ grad_output^T)

over faces by faces numbers. A factor that is not finite makes a number on the diagonal of its Gram
matrix not finite, and no other factor makes that finite again: so the sum is not finite wherever
the gradient would not be. The Gram matrices of spans of columns come first, their sum and product
second. In fp32, from there on in float64: numbers that cancel may leave a sum just below zero.

Letters: L layers, P spans, N faces.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_table import NUM_LAYER_COLUMNS, SLOTS, SPAN, LayerColumn
from .dispatch import uses_triton
from .tensor_table import tensor_at

LAUNCHES = {"mien::dense_norm": 2}
"""Kernels that each operation launches on a GPU, for all layers together."""

# Triton reads no globals but constants.
_INPUTS, _FIRST_SLOT = tl.constexpr(LayerColumn.INPUTS), tl.constexpr(LayerColumn.FIRST_SLOT)
_FIRST_SPAN_OF_INPUTS = tl.constexpr(LayerColumn.FIRST_SPAN_OF_INPUTS)
_NUM_LAYER_COLUMNS = tl.constexpr(NUM_LAYER_COLUMNS)
_SLOTS, _SPAN = tl.constexpr(SLOTS), tl.constexpr(SPAN)

# Chosen by what the compiler makes of them on the CPU, unmeasured on a GPU.
_LEAST_FACES, _MOST_FACES = 16, 64  # a side of the tiles of a Gram matrix; tl.dot takes 16 or more
_BLOCK_COLUMNS = 64
_BLOCK, _BLOCK_SPANS = 128, 8  # numbers of Gram matrices at a time
_WARPS = 4


@triton.jit
def _gram_kernel(
    layers_ptr,   # [L, NUM_LAYER_COLUMNS] int64
    spans_ptr,    # [P, 3] int64: layer, factor, first column
    row_ptr,      # [L, 3] int64: addresses of inputs and grad_outputs, faces
    grams_ptr,    # [P, stride] fp32
    factor_ptr,   # any factor, for its type
    stride,       # of the largest Gram matrix
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    span = spans_ptr + tl.program_id(0) * 3
    layer = tl.load(span)
    factor = tl.load(span + 1)
    # Spans and both sizes of a weight are multiples of 16; told so, the compiler loads wide.
    first = tl.multiple_of(tl.load(span + 2), 16)
    faces = tl.load(row_ptr + layer * 3 + 2)
    # The grid is that of the layer with the most faces.
    if tl.program_id(1) * BLOCK_N >= faces or tl.program_id(2) * BLOCK_N >= faces:
        return
    layer_row = layers_ptr + layer * _NUM_LAYER_COLUMNS
    columns = tl.multiple_of(tl.load(layer_row + _INPUTS + factor), 16)
    numbers = tensor_at(row_ptr + layer * 3 + factor, factor_ptr.dtype)
    left = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    right = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum(first + _SPAN, columns)
    gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = at < end
        rows = tl.load(
            numbers + left[:, None] * columns + at[None, :],
            mask=(left < faces)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        others = tl.load(
            numbers + right[:, None] * columns + at[None, :],
            mask=(right < faces)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        gram = tl.dot(rows, tl.trans(others), gram, input_precision=PRECISION)
    # Spans times squares of faces may leave 32 bits.
    tl.store(
        grams_ptr + tl.program_id(0).to(tl.int64) * stride + left[:, None] * faces + right[None, :],
        gram, mask=(left < faces)[:, None] & (right < faces)[None, :],
    )  # fmt: skip


@triton.jit
def _summed(
    grams_ptr, first, end, stride, at, inside, BLOCK: tl.constexpr, BLOCK_SPANS: tl.constexpr
):  # fmt: skip
    """Numbers of a whole Gram matrix, in float64: the sum over its spans."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(first, end, BLOCK_SPANS):
        spans = start + tl.arange(0, BLOCK_SPANS)
        grams = tl.load(
            grams_ptr + spans[:, None] * stride + at[None, :],
            mask=(spans < end)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(grams.to(tl.float64), axis=0)
    return total


@triton.jit
def _product_kernel(
    layers_ptr,    # [L, NUM_LAYER_COLUMNS] int64
    row_ptr,       # [L, 3] int64: addresses of inputs and grad_outputs, faces
    grams_ptr,     # [P, stride] fp32
    partials_ptr,  # fp64; SLOTS for each layer
    stride,
    BLOCK: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
):  # fmt: skip
    layer = layers_ptr + tl.program_id(0) * _NUM_LAYER_COLUMNS
    faces = tl.load(row_ptr + tl.program_id(0) * 3 + 2)
    first = tl.load(layer + _FIRST_SPAN_OF_INPUTS)
    middle = tl.load(layer + _FIRST_SPAN_OF_INPUTS + 1)
    end = tl.load(layer + _FIRST_SPAN_OF_INPUTS + 2)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(tl.program_id(1) * BLOCK, faces * faces, _SLOTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < faces * faces
        of_inputs = _summed(grams_ptr, first, middle, stride, at, inside, BLOCK, BLOCK_SPANS)
        of_grad_outputs = _summed(grams_ptr, middle, end, stride, at, inside, BLOCK, BLOCK_SPANS)
        squares += of_inputs * of_grad_outputs
    slot = tl.load(layer + _FIRST_SLOT) + tl.program_id(1)
    tl.store(partials_ptr + slot, tl.sum(squares, axis=0))


@torch.library.custom_op("mien::dense_norm", mutates_args=("partials_n",))
def dense_norm_op(
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    partials_n: Tensor,
    layers_lc: Tensor,
    spans_p3: Tensor,
    row_t: Tensor,
) -> None:
    """Sums of squares of low-rank gradients, a layer's in its slots of the partial sums."""
    if not uses_triton(partials_n):
        for layer, *factors in zip(layers_lc.tolist(), inputs, grad_outputs, strict=True):
            of_input, of_grad_output = (each.float() @ each.float().t() for each in factors)
            # The kernel fills all slots; here the first holds the whole, so the others are emptied.
            slots = partials_n[layer[LayerColumn.FIRST_SLOT] :][:SLOTS].zero_()
            slots[0] = (of_input.double() * of_grad_output.double()).sum()
        return
    faces = max(map(len, inputs))
    # tl.arange takes powers of 2 alone: faces beyond their number are masked.
    block = min(max(triton.next_power_of_2(faces), _LEAST_FACES), _MOST_FACES)
    tiles = triton.cdiv(faces, block)
    with torch.cuda.device_of(partials_n):
        # With room for the most faces at every span, so that one stride leads to all of them.
        grams_p = partials_n.new_empty(len(spans_p3) * faces**2, dtype=torch.float32)
        _gram_kernel[(len(spans_p3), tiles, tiles)](
            layers_lc, spans_p3, row_t, grams_p, inputs[0], faces**2,
            PRECISION=precision_of_products(), BLOCK_N=block, BLOCK_K=_BLOCK_COLUMNS,
            num_warps=_WARPS,
        )  # fmt: skip
        _product_kernel[(len(layers_lc), SLOTS)](
            layers_lc, row_t, grams_p, partials_n, faces**2,
            BLOCK=_BLOCK, BLOCK_SPANS=_BLOCK_SPANS, num_warps=_WARPS,
        )  # fmt: skip


@dense_norm_op.register_fake
def _(*inputs):
    return None


def precision_of_products() -> str:
    """How products of fp32 numbers are made: as PyTorch makes them now."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
