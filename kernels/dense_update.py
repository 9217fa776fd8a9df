"""The update of dense weights whose gradients are of low rank: formed and used tile by tile.

    gradient = slope^T @ input      a tile of it by a small product in fp32, over the faces
    then as in `mien.kernels.optimize`, in the same pass

A parameter moves 26 bytes instead of 28, and the two that the norm would read and the two that the
backward pass would write are saved as well: see docs/fused_dense.md.

Letters: L layers, M tiles, T tensors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .control import MOVES
from .dense_norm import precision_of_products
from .dense_tables import INPUTS, LAYER_COLUMNS, OUTPUTS, TENSOR, TILE_INPUTS, TILE_OUTPUTS
from .dispatch import uses_triton
from .rule_step import decays_of, move_block, numbers_of, plain_update, sizes_of, state_of
from .rules import Rule
from .tables import COLUMNS, DECAYS, tensor_at

LAUNCHES = {"mien::dense_update": 1}
"""Kernels that each operation launches on a GPU, for all layers together."""

# For the kernel, which takes no other global names than Triton's constants.
_MOVES, _COLUMNS = tl.constexpr(MOVES), tl.constexpr(COLUMNS)
_TENSOR, _INPUTS, _OUTPUTS = map(tl.constexpr, (TENSOR, INPUTS, OUTPUTS))
_LAYER_COLUMNS = tl.constexpr(LAYER_COLUMNS)

_WARPS = 8
_LEAST_FACES, _MOST_FACES = 16, 32  # at a time; tl.dot takes 16 or more


@triton.jit
def _tile_of_gradient(
    inputs, slopes, faces, num_inputs, num_outputs, rows, columns,
    PRECISION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """slope^T @ input at these outputs and inputs, in fp32."""
    gradient = tl.zeros((TILE_OUTPUTS, TILE_INPUTS), dtype=tl.float32)
    for start in range(0, faces, BLOCK_N):
        face = start + tl.arange(0, BLOCK_N)
        inside = (face < faces)[:, None]
        slope = tl.load(
            slopes + face[:, None] * num_outputs + rows[None, :],
            mask=inside & (rows < num_outputs)[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(
            inputs + face[:, None] * num_inputs + columns[None, :],
            mask=inside & (columns < num_inputs)[None, :], other=0.0,
        )  # fmt: skip
        gradient = tl.dot(tl.trans(slope), value, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def _dense_update_kernel(
    tensors_ptr,   # [T, COLUMNS] int64
    layers_ptr,    # [L, LAYER_COLUMNS] int64
    tiles_ptr,     # [M, 3] int64: layer, first output, first input
    row_ptr,       # [L, 3] int64: addresses of inputs and slopes, faces
    control_ptr,   # [17] fp64
    factors_ptr,   # [T] fp32; None: tensors are not clipped by themselves
    low_rank_ptr,  # any factor of a gradient, for its type
    copy_ptr,      # any copy, for its type; None: there are no copies
    beta_1, rest_1, beta_2, rest_2, epsilon, added_decay, decoupled_decay, bound,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    if tl.load(control_ptr + _MOVES) == 0:
        return
    factor, step_size, gradient_size, root_size, offset = sizes_of(control_ptr)
    tile = tiles_ptr + tl.program_id(0) * 3
    number = tl.load(tile)
    rows = tl.multiple_of(tl.load(tile + 1), 16) + tl.arange(0, TILE_OUTPUTS)
    columns = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, TILE_INPUTS)
    layer = layers_ptr + number * _LAYER_COLUMNS
    num_inputs = tl.multiple_of(tl.load(layer + _INPUTS), 16)
    num_outputs = tl.multiple_of(tl.load(layer + _OUTPUTS), 16)
    tensor = tl.load(layer + _TENSOR)
    low_rank = row_ptr + number * 3
    gradient = _tile_of_gradient(
        tensor_at(low_rank, low_rank_ptr.dtype), tensor_at(low_rank + 1, low_rank_ptr.dtype),
        tl.load(low_rank + 2), num_inputs, num_outputs, rows, columns,
        PRECISION, TILE_OUTPUTS, TILE_INPUTS, BLOCK_N,
    )  # fmt: skip

    row = tensors_ptr + tensor * _COLUMNS
    parameters, means, squares, largests, copies = state_of(row, 0, copy_ptr)
    if factors_ptr is not None:
        factor *= tl.load(factors_ptr + tensor)
    added_decay, keep = decays_of(row, control_ptr, added_decay, decoupled_decay)
    move_block(
        gradient, parameters, means, squares, largests, copies,
        rows[:, None] * num_inputs + columns[None, :],
        (rows < num_outputs)[:, None] & (columns < num_inputs)[None, :],
        factor, step_size, gradient_size, root_size, offset, added_decay, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, bound,
        RULE, AMSGRAD, IS_BOUNDED, copy_ptr is not None,
    )  # fmt: skip


@torch.library.custom_op(
    "mien::dense_update", mutates_args=("parameters", "means", "squares", "largests", "copies")
)
def dense_update_op(
    parameters: Sequence[Tensor],
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    largests: Sequence[Tensor],
    copies: Sequence[Tensor],
    control: Tensor,
    factors_t: Tensor | None,
    tensors_tc: Tensor,
    layers_lc: Tensor,
    tiles_m3: Tensor,
    row_t: Tensor,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    bound: float,
) -> None:
    """Dense weights, their moments and copies moved by their low-rank gradients. A bound of 0 is
    none."""
    made = Rule(
        name=rule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        amsgrad=bool(squares and largests),
    )
    if not uses_triton(control):
        gradients = [
            slope_no.float().t() @ input_ni.float()
            for input_ni, slope_no in zip(inputs, slopes, strict=True)
        ]
        lists = [list(each) for each in (parameters, gradients, means, squares, largests)]
        numbers_l = layers_lc[:, TENSOR]
        own = None if factors_t is None else factors_t[numbers_l]
        decays = tensors_tc[numbers_l, DECAYS].tolist()
        plain_update(lists, list(copies), control, own, decays, made, bound)
        return
    faces = max(map(len, inputs))
    block = min(max(triton.next_power_of_2(faces), _LEAST_FACES), _MOST_FACES)
    with torch.cuda.device_of(control):
        _dense_update_kernel[(len(tiles_m3),)](
            tensors_tc, layers_lc, tiles_m3, row_t, control, factors_t, inputs[0],
            copies[0] if copies else None, *numbers_of(made), bound,
            RULE=rule, AMSGRAD=made.has_largest_square, IS_BOUNDED=bound > 0,
            PRECISION=precision_of_products(), TILE_OUTPUTS=TILE_OUTPUTS, TILE_INPUTS=TILE_INPUTS,
            BLOCK_N=block, num_warps=_WARPS,
        )  # fmt: skip


@dense_update_op.register_fake
def _(*inputs):
    return None
