"""The update of dense weights whose gradients are of low rank: formed and used tile by tile.

    gradient = grad_output^T @ input      a tile of it by a small product in fp32, over the faces
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

from .dense_norm import precision_of_products
from .dense_table import NUM_LAYER_COLUMNS, TILE_INPUTS, TILE_OUTPUTS, LayerColumn
from .dispatch import uses_triton
from .optimizer_rules import Rule
from .optimizer_scalars import Scalar
from .rule_step import decays_of, numbers_of, plain_update, state_of, step_sizes_of, update_block
from .tensor_table import NUM_COLUMNS, Column, tensor_at

LAUNCHES = {"mien::dense_update": 1}
"""Kernels that each operation launches on a GPU, for all layers together."""

# Triton reads no globals but constants.
_IS_APPLIED, _NUM_COLUMNS = tl.constexpr(Scalar.IS_APPLIED), tl.constexpr(NUM_COLUMNS)
_TENSOR, _INPUTS = tl.constexpr(LayerColumn.TENSOR), tl.constexpr(LayerColumn.INPUTS)
_OUTPUTS, _NUM_LAYER_COLUMNS = tl.constexpr(LayerColumn.OUTPUTS), tl.constexpr(NUM_LAYER_COLUMNS)

# Chosen by what the compiler makes of them on the CPU, unmeasured on a GPU.
_WARPS = 8
_LEAST_FACES, _MOST_FACES = 16, 32  # at a time; tl.dot takes 16 or more


@triton.jit
def _tile_of_gradient(
    inputs, grad_outputs, faces, num_inputs, num_outputs, rows, columns,
    PRECISION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_output^T @ input at these outputs and inputs, in fp32."""
    gradient = tl.zeros((TILE_OUTPUTS, TILE_INPUTS), dtype=tl.float32)
    for start in range(0, faces, BLOCK_N):
        face = start + tl.arange(0, BLOCK_N)
        inside = (face < faces)[:, None]
        grad_output = tl.load(
            grad_outputs + face[:, None] * num_outputs + rows[None, :],
            mask=inside & (rows < num_outputs)[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(
            inputs + face[:, None] * num_inputs + columns[None, :],
            mask=inside & (columns < num_inputs)[None, :], other=0.0,
        )  # fmt: skip
        gradient = tl.dot(tl.trans(grad_output), value, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def _dense_update_kernel(
    tensors_ptr,   # [T, NUM_COLUMNS] int64
    layers_ptr,    # [L, NUM_LAYER_COLUMNS] int64
    tiles_ptr,     # [M, 3] int64: layer, first output, first input
    row_ptr,       # [L, 3] int64: addresses of inputs and grad_outputs, faces
    scalars_ptr,   # fp64, see `Scalar`
    factors_ptr,   # [T] fp32; None: tensors are not clipped by themselves
    low_rank_ptr,  # any factor of a gradient, for its type
    low_precision_ptr,  # any of those weights, for its type; None: there are none
    beta_1, rest_1, beta_2, rest_2, epsilon, added_decay, decoupled_decay, bound,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    HAS_EMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The host does not know whether the step is applied: that would take a wait for the device.
    if tl.load(scalars_ptr + _IS_APPLIED) == 0:
        return
    factor, step_size, gradient_step_size, root_factor, root_offset, average_share = step_sizes_of(
        scalars_ptr
    )
    tile = tiles_ptr + tl.program_id(0) * 3
    number = tl.load(tile)
    rows = tl.multiple_of(tl.load(tile + 1), 16) + tl.arange(0, TILE_OUTPUTS)
    columns = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, TILE_INPUTS)
    layer = layers_ptr + number * _NUM_LAYER_COLUMNS
    num_inputs = tl.multiple_of(tl.load(layer + _INPUTS), 16)
    num_outputs = tl.multiple_of(tl.load(layer + _OUTPUTS), 16)
    tensor = tl.load(layer + _TENSOR)
    low_rank = row_ptr + number * 3
    gradient = _tile_of_gradient(
        tensor_at(low_rank, low_rank_ptr.dtype), tensor_at(low_rank + 1, low_rank_ptr.dtype),
        tl.load(low_rank + 2), num_inputs, num_outputs, rows, columns,
        PRECISION, TILE_OUTPUTS, TILE_INPUTS, BLOCK_N,
    )  # fmt: skip

    row = tensors_ptr + tensor * _NUM_COLUMNS
    parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision = state_of(
        row, 0, low_precision_ptr
    )
    if factors_ptr is not None:
        factor *= tl.load(factors_ptr + tensor)
    added_decay, keep = decays_of(row, scalars_ptr, added_decay, decoupled_decay)
    update_block(
        gradient, parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision,
        rows[:, None] * num_inputs + columns[None, :],
        (rows < num_outputs)[:, None] & (columns < num_inputs)[None, :],
        factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
        added_decay, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, bound,
        RULE, AMSGRAD, IS_BOUNDED, HAS_EMA, low_precision_ptr is not None,
    )  # fmt: skip


# The kernel goes by the addresses in the tables; the tensors are passed as in `optimize`.
@torch.library.custom_op(
    "mien::dense_update",
    mutates_args=(
        "parameters",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "emas",
        "low_precision",
    ),
)
def dense_update_op(
    parameters: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    low_precision: Sequence[Tensor],
    scalars: Tensor,
    factors_t: Tensor | None,
    tensors_tc: Tensor,
    layers_lc: Tensor,
    tiles_m3: Tensor,
    row_t: Tensor,
    name: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    bound: float,
    ema: float,
) -> None:
    """Dense weights in both precisions and their moments moved by their low-rank gradients. A bound
    of 0 is none."""
    # An operation takes plain values, no Rule. Adamax has a largest moment without amsgrad, but
    # then no squares.
    rule = Rule(
        name=name,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        amsgrad=bool(exp_avg_sqs and max_exp_avg_sqs),
        ema=ema,
    )
    if not uses_triton(scalars):
        gradients = [
            grad_output_no.float().t() @ input_ni.float()
            for input_ni, grad_output_no in zip(inputs, grad_outputs, strict=True)
        ]
        moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas)
        lists = [list(each) for each in (parameters, gradients, *moments)]
        numbers_l = layers_lc[:, LayerColumn.TENSOR]
        own = None if factors_t is None else factors_t[numbers_l]
        decays = tensors_tc[numbers_l, Column.DECAYS].tolist()
        plain_update(lists, list(low_precision), scalars, own, decays, rule, bound)
        return
    faces = max(map(len, inputs))
    block = min(max(triton.next_power_of_2(faces), _LEAST_FACES), _MOST_FACES)
    with torch.cuda.device_of(scalars):
        _dense_update_kernel[(len(tiles_m3),)](
            tensors_tc, layers_lc, tiles_m3, row_t, scalars, factors_t, inputs[0],
            low_precision[0] if low_precision else None, *numbers_of(rule), bound,
            RULE=rule.name, AMSGRAD=rule.has_max_exp_avg_sq, IS_BOUNDED=bound > 0, HAS_EMA=ema > 0,
            PRECISION=precision_of_products(), TILE_OUTPUTS=TILE_OUTPUTS, TILE_INPUTS=TILE_INPUTS,
            BLOCK_N=block, num_warps=_WARPS,
        )  # fmt: skip


@dense_update_op.register_fake
def _(*inputs):
    return None
