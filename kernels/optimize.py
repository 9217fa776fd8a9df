"""One optimizer step in one pass over the weights, all tensors of a model in one launch.

    gradient = factor * gradient                        mean, unscaled, clipped
    gradient += weight_decay * parameter                adam, adamax, nadam, rms-prop (L2)
    parameter *= 1 - learning_rate * weight_decay       adamw, adabelief, lion (decoupled)
    exp_avg = beta_1 * exp_avg + (1 - beta_1) * gradient            lion: by beta_2, after the step
    exp_avg_sq = beta_2 * exp_avg_sq + (1 - beta_2) * gradient^2
    parameter -= change                  t steps; m, v: exp_avg, exp_avg_sq / (1 - beta^t)
    ema += share * (parameter - ema)     share = 1 - min(decay, (1 + u) / (10 + u)), u updates
    low_precision = parameter, rounded to the type that the network computes in

    adam, adamw  learning_rate * m / (sqrt(v) + epsilon); with amsgrad v by the largest exp_avg_sq
    adamax       learning_rate * m / largest, largest = max(beta_2 * largest, |gradient| + epsilon)
    nadam        learning_rate * (momentum' * exp_avg / (1 - product') + (1 - momentum) * gradient
                 / (1 - product)) / (sqrt(v) + epsilon), momentum = beta_1 * (1 - 0.96^(t/250) / 2)
                 with its product so far, ' of the next step
    rms-prop     learning_rate * gradient / (sqrt(exp_avg_sq) + epsilon)
    lion         learning_rate * sign(beta_1 * exp_avg + (1 - beta_1) * gradient)
    adabelief    exp_avg_sq of (gradient - exp_avg), plus epsilon at each step; learning_rate * r
                 * m / (sqrt(exp_avg_sq) + epsilon) with the r of rectified Adam times
                 sqrt(1 - beta_2^t), or learning_rate * m while r is not defined

schedule-free keeps a base z in the place of exp_avg, and no x, the average of all z so far. The
weights, at which gradients are taken, lie between the two:

    change = learning_rate * (gradient / (sqrt(v) + epsilon) + weight_decay * parameter)
    z -= change
    x += c * (z - x)                            c = learning_rate^2 / sum of all learning_rate^2
    parameter = (1 - beta_1) * z + beta_1 * x
             += c * (z - parameter) - (1 - beta_1) * (1 - c) * change          which needs no x
    x = parameter + (1 / beta_1 - 1) * (parameter - z)

Kingma and Ba, 2015 (adam, adamax); Loshchilov and Hutter, 2019 (adamw); Reddi et al., 2018
(amsgrad); Dozat, 2016 (nadam); Tieleman and Hinton, 2012 (rms-prop); Chen et al., 2023 (lion);
Zhuang et al., 2020 (adabelief); Liu et al., 2020 (rectification); Defazio et al., 2024
(schedule-free AdamW). A step is bound by memory: with two moments 28 bytes a parameter with bf16
gradients and weights, against 72 in PyTorch's foreach kernels, and two bytes for the norm.

Before the weights come the norm of the gradients (`gradient_norm`, `dense_norm`), autoclip's
history (`norm_history`) and the scalars of the step (`scalars_update`). What changes from step to
step lies in the optimizer scalars, on the device, so nothing is read by the host and a step can be
captured in a CUDA graph. A step whose gradient is not finite moves neither weights nor moments; nor
does one that only adds to the accumulators.

Letters: T tensors, N chunks of them.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dense_norm, dense_update
from .checks import check_memory, check_tensor
from .dense_table import LowRankGradients
from .dispatch import uses_triton
from .gradient_norm import factors_op, norm_op
from .norm_history import record_op
from .optimizer_rules import Clipping, Rule
from .optimizer_scalars import Scalar
from .rule_step import decays_of, numbers_of, plain_update, state_of, step_sizes_of, update_block
from .scalars_update import scalars_op
from .tensor_table import NUM_COLUMNS, Column, TensorTable, tensor_at

LAUNCHES = {
    "mien::optimize_norm": 1,
    "mien::optimize_record": 1,
    "mien::optimize_scalars": 1,
    "mien::optimize_factors": 1,
    "mien::optimize_update": 1,
    **dense_norm.LAUNCHES,
    **dense_update.LAUNCHES,
}
"""Kernels that each operation launches on a GPU. Every step has norm, scalars and update; autoclip
adds record and a sort, clipping by norm adds factors, gradients of low rank add their own two."""

# Triton reads no globals but constants.
_IS_APPLIED, _NUM_COLUMNS = tl.constexpr(Scalar.IS_APPLIED), tl.constexpr(NUM_COLUMNS)
_ACCUMULATOR = tl.constexpr(Column.ACCUMULATOR)

# Chosen by what the compiler makes of them on the CPU, unmeasured on a GPU.
_WARPS = 8
_BLOCK = 1024  # four elements a thread: 16 bytes of fp32, 8 of a 16-bit type


@triton.jit
def _span(
    gradients, parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision, first, end,
    factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
    added_decay, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon, bound,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, IS_BOUNDED: tl.constexpr,
    HAS_EMA: tl.constexpr, HAS_LOW_PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the elements from ``first`` to ``end``, at most BLOCK of them."""
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    update_block(
        gradient, parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision,
        at, inside,
        factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
        added_decay, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, bound,
        RULE, AMSGRAD, IS_BOUNDED, HAS_EMA, HAS_LOW_PRECISION,
    )  # fmt: skip


@triton.jit
def _update_kernel(
    tensors_ptr,    # [T, NUM_COLUMNS] int64
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    scalars_ptr,    # fp64, see `Scalar`
    factors_ptr,    # [T] fp32; None: tensors are not clipped by themselves
    gradient_ptr,   # any gradient, for its type; None: the accumulators hold them
    low_precision_ptr,  # any of those weights, for its type; None: there are none
    beta_1, rest_1, beta_2, rest_2, epsilon, added_decay, decoupled_decay, bound,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    HAS_EMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # The host does not know whether the step is applied: that would take a wait for the device.
    if tl.load(scalars_ptr + _IS_APPLIED) == 0:
        return
    factor, step_size, gradient_step_size, root_factor, root_offset, average_share = step_sizes_of(
        scalars_ptr
    )

    # Backwards, so that the gradients which the norm has read last are still in the cache.
    chunk = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    tensor = tl.load(chunk)
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    row = tensors_ptr + tensor * _NUM_COLUMNS
    parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision = state_of(
        row, start, low_precision_ptr
    )
    if gradient_ptr is not None:
        gradients = tensor_at(gradients_ptr + tensor, gradient_ptr.dtype) + start
    else:
        gradients = tensor_at(row + _ACCUMULATOR, tl.pointer_type(tl.float32)) + start
    if factors_ptr is not None:
        factor *= tl.load(factors_ptr + tensor)
    added_decay, keep = decays_of(row, scalars_ptr, added_decay, decoupled_decay)
    HAS_LOW_PRECISION: tl.constexpr = low_precision_ptr is not None

    # Whole groups of eight first: only a bound known as a multiple keeps the accesses wide.
    whole = elements // 8 * 8
    for first in range(0, whole, BLOCK):
        _span(
            gradients, parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision,
            first, whole,
            factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
            added_decay, keep,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound,
            RULE, AMSGRAD, IS_BOUNDED, HAS_EMA, HAS_LOW_PRECISION, BLOCK,
        )  # fmt: skip
    if whole < elements:
        _span(
            gradients, parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision,
            whole, elements,
            factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
            added_decay, keep,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound,
            RULE, AMSGRAD, IS_BOUNDED, HAS_EMA, HAS_LOW_PRECISION, 8,
        )  # fmt: skip


# The kernel goes by the addresses in the table. The tensors are passed for PyTorch, which has to
# know what changes, and for plain PyTorch on a CPU.
@torch.library.custom_op(
    "mien::optimize_update",
    mutates_args=(
        "parameters",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "emas",
        "low_precision",
    ),
)
def _update_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    low_precision: Sequence[Tensor],
    scalars: Tensor,
    factors_t: Tensor | None,
    tensors_tc: Tensor,
    gradient_row: Tensor,
    chunks_n3: Tensor,
    numbers: Sequence[int],
    is_accumulated: bool,
    name: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    bound: float,
    ema: float,
) -> None:
    """Weights in both precisions and moments moved. A bound of 0 is none; gradients are the
    accumulators themselves where they were accumulated; numbers are the rows of the table."""
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
        moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas)
        lists = [list(each) for each in (parameters, gradients, *moments)]
        own = None if factors_t is None else factors_t[numbers]
        decays = tensors_tc[numbers, Column.DECAYS].tolist()
        plain_update(lists, list(low_precision), scalars, own, decays, rule, bound)
        return
    with torch.cuda.device_of(scalars):
        _update_kernel[(len(chunks_n3),)](
            tensors_tc, gradient_row, chunks_n3, scalars, factors_t,
            None if is_accumulated else gradients[0], low_precision[0] if low_precision else None,
            *numbers_of(rule), bound,
            RULE=rule.name, AMSGRAD=rule.has_max_exp_avg_sq, IS_BOUNDED=bound > 0, HAS_EMA=ema > 0,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@_update_op.register_fake
def _(*inputs):
    return None


@torch.no_grad()
def optimize(
    gradients: Sequence[Tensor],
    table: TensorTable,
    scalars: Tensor,
    rule: Rule,
    *,
    clipping: Clipping = Clipping(),  # noqa: B008  (frozen)
    history_c: Tensor | None = None,
    accumulation: int = 1,
    dynamic_scale: bool = False,
    whole_squares: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Move the tensors of the table by one step, in place; or, of several, the sum of gradients.

    A step whose gradient is not finite changes of the scalars alone SKIPPED_STEPS, GRADIENT_NORM,
    GRADIENT_FACTOR, IS_APPLIED, what the rule takes of the step and, with ``dynamic_scale``,
    LOSS_SCALE and FINITE_STEPS; nothing else. With ``accumulation`` the step is made in the last of
    so many calls, by the mean of their gradients; one of them that is not finite makes that not
    finite, so all of them are left out.

    Args:
        gradients: Gradients of the scaled loss, one a parameter; fp32, bf16 or fp16, all of one
            type. One in another layout than its parameter's is copied into that first. Of
            parameters that the table has as of low rank, the stand-ins that `dense` leaves.
        table: Parameters, the moments of the rule, low-precision weights and accumulators. It is
            made before a CUDA graph is captured.
        scalars: Optimizer scalars from `new_scalars`.
        rule: How the weights are moved.
        clipping: How the mean gradient is bound, after the loss scale is undone.
        history_c: Past norms from `new_history`, of autoclip.
        accumulation: Gradients of a step, at least 1; above 1 the table needs accumulators.
        dynamic_scale: Halve the loss scale after a step that is not finite, double it after
            2,000 that are.
        whole_squares: Called with the sums of squares of the table's chunks, float64, where those
            are not all there are; gives those that the norms are of.

    Raises:
        ValueError: On tensors that do not fit.
    """
    _check(table, scalars, rule, clipping, history_c, accumulation)
    # The kernels would write to an address that is no longer the tensor's, without an error.
    table.check_unmoved()
    fitted = table.fitted(gradients)
    row_t = table.gradient_row(fitted)
    low_rank = table.dense.find(gradients) if table.dense else None
    _update_scalars(
        fitted, row_t, low_rank, table, scalars, rule, clipping, history_c, accumulation,
        dynamic_scale, whole_squares,
    )  # fmt: skip
    _update_weights(fitted, row_t, low_rank, table, scalars, rule, clipping)


def _update_scalars(
    gradients: list[Tensor],
    gradient_row: Tensor,
    low_rank: LowRankGradients | None,
    table: TensorTable,
    scalars: Tensor,
    rule: Rule,
    clipping: Clipping,
    history_c: Tensor | None,
    accumulation: int,
    dynamic_scale: bool,
    whole_squares: Callable[[Tensor], Tensor] | None,
) -> None:
    """Write into the scalars what the gradients make of the step: all before the update."""
    partials_n, tensors_tc = table.partials_n, table.tensors_tc
    if gradients:
        norm_op(
            gradients, table.accumulators, partials_n, scalars, tensors_tc, gradient_row,
            table.chunks_n3,
        )  # fmt: skip
    if table.dense and low_rank:
        dense_norm.dense_norm_op(
            low_rank.inputs, low_rank.grad_outputs, partials_n, table.dense.layers_lc,
            table.dense.spans_p3, low_rank.row_t,
        )  # fmt: skip
    if whole_squares is not None:
        partials_n = whole_squares(partials_n)
    sorted_c = None
    if history_c is not None:
        # Before the sort: the percentile is of the past norms and this one.
        record_op(partials_n, scalars, history_c, accumulation)
        sorted_c = torch.sort(history_c).values
    scalars_op(
        partials_n, sorted_c, scalars, rule.name, rule.beta_1, rule.beta_2, rule.epsilon,
        clipping.kind, clipping.bound, accumulation, dynamic_scale, rule.ema,
    )  # fmt: skip
    if clipping.kind == "norm":
        factors_op(partials_n, scalars, table.factors_t, tensors_tc, clipping.bound)


def _update_weights(
    gradients: list[Tensor],
    gradient_row: Tensor,
    low_rank: LowRankGradients | None,
    table: TensorTable,
    scalars: Tensor,
    rule: Rule,
    clipping: Clipping,
) -> None:
    """Move weights and moments by what the scalars say."""
    factors_t = table.factors_t if clipping.kind == "norm" else None
    numbers = (rule.name, rule.beta_1, rule.beta_2, rule.epsilon, rule.weight_decay)
    bound = clipping.bound if clipping.kind == "value" else 0.0
    if gradients:
        state = table.plain_state
        _update_op(
            state.parameters, table.accumulators or gradients, *state.moments, state.low_precision,
            scalars, factors_t, table.tensors_tc, gradient_row, table.chunks_n3, table.plain,
            bool(table.accumulators), *numbers, bound, rule.ema,
        )  # fmt: skip
    if table.dense and low_rank:
        state, dense = table.dense_state, table.dense
        dense_update.dense_update_op(
            state.parameters, low_rank.inputs, low_rank.grad_outputs, *state.moments,
            state.low_precision, scalars, factors_t, table.tensors_tc, dense.layers_lc,
            dense.tiles_m3, low_rank.row_t, *numbers, bound, rule.ema,
        )  # fmt: skip


def _check(
    table: TensorTable,
    scalars: Tensor,
    rule: Rule,
    clipping: Clipping,
    history_c: Tensor | None,
    accumulation: int,
) -> None:
    fp64, device = (torch.float64,), table.device
    check_tensor(scalars, "scalars", (len(Scalar),), fp64, device, remedy="use new_scalars")
    if set(table.moments) != set(rule.moments):
        raise ValueError(
            f"{rule.name} keeps {', '.join(rule.moments)}, but the table holds "
            f"{', '.join(table.moments)}: make a new TensorTable"
        )
    if accumulation < 1 or (accumulation > 1) != bool(table.accumulators):
        raise ValueError(
            f"accumulation must be 1 without accumulators and more with them, got {accumulation} "
            f"and {len(table.accumulators)} accumulators"
        )
    if (clipping.kind == "autoclip") != (history_c is not None):
        raise ValueError(
            f"history_c goes with autoclip and nothing else, got clipping {clipping.kind} and "
            f"{'no history' if history_c is None else 'a history'}: use new_history"
        )
    if history_c is not None:
        check_tensor(history_c, "history_c", (max(history_c.numel(), 1),), fp64, device)
        check_memory(history_c, "history_c")
