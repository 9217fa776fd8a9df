"""One optimizer step in one pass over the weights, all tensors of a model in one launch.

    gradient = factor * gradient                        mean, unscaled, clipped
    gradient += weight_decay * parameter                adam, adamax, nadam, rms-prop (L2)
    parameter *= 1 - learning_rate * weight_decay       adamw, adabelief, lion (decoupled)
    mean = beta_1 * mean + (1 - beta_1) * gradient      lion: by beta_2, after the step
    square = beta_2 * square + (1 - beta_2) * gradient^2
    parameter -= change                                 t steps; m, v: mean, square / (1 - beta^t)
    copy = parameter, rounded to the type that the network computes in

    adam, adamw  learning_rate * m / (sqrt(v) + epsilon); with amsgrad v by the largest square
    adamax       learning_rate * m / largest, largest = max(beta_2 * largest, |gradient| + epsilon)
    nadam        learning_rate * (momentum' * mean / (1 - product') + (1 - momentum) * gradient
                 / (1 - product)) / (sqrt(v) + epsilon), momentum = beta_1 * (1 - 0.96^(t/250) / 2)
                 with its product so far, ' of the next step
    rms-prop     learning_rate * gradient / (sqrt(square) + epsilon)
    lion         learning_rate * sign(beta_1 * mean + (1 - beta_1) * gradient)
    adabelief    square of (gradient - mean), plus epsilon at each step; learning_rate * r * m
                 / (sqrt(square) + epsilon) with the r of rectified Adam times sqrt(1 - beta_2^t),
                 or learning_rate * m while r is not defined

Kingma and Ba, 2015 (adam, adamax); Loshchilov and Hutter, 2019 (adamw); Reddi et al., 2018
(amsgrad); Dozat, 2016 (nadam); Tieleman and Hinton, 2012 (rms-prop); Chen et al., 2023 (lion);
Zhuang et al., 2020 (adabelief); Liu et al., 2020 (rectification). A step is bound by memory: with
two moments 28 bytes a parameter with bf16 gradients and copies, against 72 in PyTorch's foreach
kernels, and two bytes for the norm.

What changes from step to step lies in one small tensor on the device, the control, so nothing is
read by the host and a step can be captured in a CUDA graph. A step whose gradient is not finite
moves neither weights nor moments; nor does one that only adds to the accumulators.

Letters: T tensors, N chunks of them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dense_norm, dense_update
from .checks import check_memory, check_tensor
from .control import MOVES, NUM_CONTROLS, prepare
from .dispatch import uses_triton
from .rule_step import decays_of, move_block, numbers_of, plain_update, sizes_of, state_of
from .rules import Clipping, Rule
from .tables import ACCUMULATOR, COLUMNS, DECAYS, Tables, tensor_at

LAUNCHES = {
    "mien::optimize_norm": 1,
    "mien::optimize_record": 1,
    "mien::optimize_control": 1,
    "mien::optimize_factors": 1,
    "mien::optimize_update": 1,
    **dense_norm.LAUNCHES,
    **dense_update.LAUNCHES,
}
"""Kernels that each operation launches on a GPU. Every step has norm, control and update; autoclip
adds record and a sort, clipping by norm adds factors, gradients of low rank add their own two."""

# For the kernels, which take no other global names than Triton's constants.
_MOVES, _COLUMNS = tl.constexpr(MOVES), tl.constexpr(COLUMNS)
_ACCUMULATOR = tl.constexpr(ACCUMULATOR)

_WARPS = 8
_BLOCK = 1024  # four elements a thread: 16 bytes of fp32, 8 of a 16-bit type


@triton.jit
def _span(
    gradients, parameters, means, squares, largests, copies, first, end,
    factor, step_size, gradient_size, root_size, offset, added_decay, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon, bound,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, IS_BOUNDED: tl.constexpr, IS_COPIED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the elements from ``first`` to ``end``, at most BLOCK of them."""
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    move_block(
        gradient, parameters, means, squares, largests, copies, at, inside,
        factor, step_size, gradient_size, root_size, offset, added_decay, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, bound,
        RULE, AMSGRAD, IS_BOUNDED, IS_COPIED,
    )  # fmt: skip


@triton.jit
def _update_kernel(
    tensors_ptr,    # [T, COLUMNS] int64
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    control_ptr,    # [17] fp64
    factors_ptr,    # [T] fp32; None: tensors are not clipped by themselves
    gradient_ptr,   # any gradient, for its type; None: the accumulators hold them
    copy_ptr,       # any copy, for its type; None: there are no copies
    beta_1, rest_1, beta_2, rest_2, epsilon, added_decay, decoupled_decay, bound,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control_ptr + _MOVES) == 0:
        return
    factor, step_size, gradient_size, root_size, offset = sizes_of(control_ptr)

    # Backwards, so that the gradients which the norm has read last are still in the cache.
    chunk = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    tensor = tl.load(chunk)
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    row = tensors_ptr + tensor * _COLUMNS
    parameters, means, squares, largests, copies = state_of(row, start, copy_ptr)
    if gradient_ptr is not None:
        gradients = tensor_at(gradients_ptr + tensor, gradient_ptr.dtype) + start
    else:
        gradients = tensor_at(row + _ACCUMULATOR, tl.pointer_type(tl.float32)) + start
    if factors_ptr is not None:
        factor *= tl.load(factors_ptr + tensor)
    added_decay, keep = decays_of(row, control_ptr, added_decay, decoupled_decay)
    IS_COPIED: tl.constexpr = copy_ptr is not None

    # Whole groups of eight first: only a bound known as a multiple keeps the accesses wide.
    whole = elements // 8 * 8
    for first in range(0, whole, BLOCK):
        _span(
            gradients, parameters, means, squares, largests, copies, first, whole,
            factor, step_size, gradient_size, root_size, offset, added_decay, keep,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound,
            RULE, AMSGRAD, IS_BOUNDED, IS_COPIED, BLOCK,
        )  # fmt: skip
    if whole < elements:
        _span(
            gradients, parameters, means, squares, largests, copies, whole, elements,
            factor, step_size, gradient_size, root_size, offset, added_decay, keep,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound,
            RULE, AMSGRAD, IS_BOUNDED, IS_COPIED, 8,
        )  # fmt: skip


@torch.library.custom_op(
    "mien::optimize_update", mutates_args=("parameters", "means", "squares", "largests", "copies")
)
def _update_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    largests: Sequence[Tensor],
    copies: Sequence[Tensor],
    control: Tensor,
    factors_t: Tensor | None,
    tensors_tc: Tensor,
    gradient_row: Tensor,
    chunks_n3: Tensor,
    numbers: Sequence[int],
    is_accumulated: bool,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    bound: float,
) -> None:
    """Weights, moments and copies moved. A bound of 0 is none; gradients are the accumulators
    themselves where they were accumulated; numbers are the rows of the tables."""
    made = Rule(
        name=rule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        amsgrad=bool(squares and largests),
    )
    if not uses_triton(control):
        lists = [list(each) for each in (parameters, gradients, means, squares, largests)]
        own = None if factors_t is None else factors_t[numbers]
        decays = tensors_tc[numbers, DECAYS].tolist()
        plain_update(lists, list(copies), control, own, decays, made, bound)
        return
    with torch.cuda.device_of(control):
        _update_kernel[(len(chunks_n3),)](
            tensors_tc, gradient_row, chunks_n3, control, factors_t,
            None if is_accumulated else gradients[0], copies[0] if copies else None,
            *numbers_of(made), bound,
            RULE=rule, AMSGRAD=made.has_largest_square, IS_BOUNDED=bound > 0,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@_update_op.register_fake
def _(*inputs):
    return None


@torch.no_grad()
def optimize(
    gradients: Sequence[Tensor],
    tables: Tables,
    control: Tensor,
    rule: Rule,
    *,
    clipping: Clipping = Clipping(),  # noqa: B008  (frozen)
    history_c: Tensor | None = None,
    accumulation: int = 1,
    dynamic_scale: bool = False,
) -> None:
    """Move the tensors of the tables by one step, in place; or, of several, the sum of gradients.

    A step whose gradient is not finite changes of the control alone SKIPPED, NORM, FACTOR and
    MOVES, the sizes and, with ``dynamic_scale``, SCALE and GOOD_STEPS; nothing else. With
    ``accumulation`` the step is made in the last of so many calls, by the mean of their gradients;
    one of them that is not finite makes that not finite, so all of them are left out.

    Args:
        gradients: Gradients of the scaled loss, one a parameter; fp32, bf16 or fp16, all of one
            type. One in another layout than its parameter's is copied into that first. Of
            parameters that the tables have as of low rank, the stand-ins that `dense` leaves.
        tables: Parameters, the moments of the rule, copies and accumulators. They are made before a
            CUDA graph is captured.
        control: Control from `new_control`.
        rule: How the weights are moved.
        clipping: How the mean gradient is bound, after the loss scale is undone.
        history_c: Past norms from `new_history`, of autoclip.
        accumulation: Gradients of a step, at least 1; above 1 the tables need accumulators.
        dynamic_scale: Halve the loss scale after a step that is not finite, double it after
            2,000 that are.

    Raises:
        ValueError: On tensors that do not fit.
    """
    _check(tables, control, rule, clipping, history_c, accumulation)
    tables.check_unmoved()
    fitted = tables.fitted(gradients)
    row_t = tables.gradient_row(fitted)
    low_rank = tables.dense.find(gradients) if tables.dense else None
    prepare(
        fitted, row_t, low_rank, tables, control, rule, clipping, history_c, accumulation,
        dynamic_scale,
    )  # fmt: skip
    factors_t = tables.factors_t if clipping.kind == "norm" else None
    how = (rule.name, rule.beta_1, rule.beta_2, rule.epsilon, rule.weight_decay)
    bound = clipping.bound if clipping.kind == "value" else 0.0
    if fitted:
        state = tables.plain_state
        _update_op(
            state.parameters, tables.accumulators or fitted, *state.moments, state.copies,
            control, factors_t, tables.tensors_tc, row_t, tables.chunks_n3, tables.plain,
            bool(tables.accumulators), *how, bound,
        )  # fmt: skip
    if tables.dense and low_rank:
        state, dense = tables.dense_state, tables.dense
        dense_update.dense_update_op(
            state.parameters, low_rank.inputs, low_rank.slopes, *state.moments, state.copies,
            control, factors_t, tables.tensors_tc, dense.layers_lc, dense.tiles_m3, low_rank.row_t,
            *how, bound,
        )  # fmt: skip


def _check(
    tables: Tables,
    control: Tensor,
    rule: Rule,
    clipping: Clipping,
    history_c: Tensor | None,
    accumulation: int,
) -> None:
    device = tables.parameters[0].device
    if (control.dtype, control.shape, control.device) != (torch.float64, (NUM_CONTROLS,), device):
        raise ValueError(
            f"control must be float64 ({NUM_CONTROLS},) on {device}, got {control.dtype} "
            f"{tuple(control.shape)} on {control.device}: use new_control"
        )
    if set(tables.moments) != set(rule.moments):
        raise ValueError(
            f"{rule.name} keeps {', '.join(rule.moments)}, but the tables hold "
            f"{', '.join(tables.moments)}: make new Tables"
        )
    if accumulation < 1 or (accumulation > 1) != bool(tables.accumulators):
        raise ValueError(
            f"accumulation must be 1 without accumulators and more with them, got {accumulation} "
            f"and {len(tables.accumulators)} accumulators"
        )
    if (clipping.kind == "autoclip") != (history_c is not None):
        raise ValueError(
            f"history_c goes with autoclip and nothing else, got clipping {clipping.kind} and "
            f"{'no history' if history_c is None else 'a history'}: use new_history"
        )
    if history_c is not None:
        shape = (max(history_c.numel(), 1),)
        check_tensor(history_c, "history_c", shape, (torch.float64,), device)
        check_memory(history_c, "history_c")
