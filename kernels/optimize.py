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

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_memory, check_tensor
from .control import (
    FACTOR,
    GRADIENT_SIZE,
    LEARNING_RATE,
    MOVES,
    NUM_CONTROLS,
    OFFSET,
    ROOT_SIZE,
    STEP,
    STEP_SIZE,
    prepare,
    tensor_at,
)
from .dispatch import uses_triton
from .rules import Clipping, Rule
from .tables import (
    ACCUMULATOR,
    COLUMNS,
    COPY,
    DECAYS,
    LARGEST,
    MEAN,
    PARAMETER,
    SQUARE,
    Tables,
)

LAUNCHES = {
    "mien::optimize_norm": 1,
    "mien::optimize_record": 1,
    "mien::optimize_control": 1,
    "mien::optimize_factors": 1,
    "mien::optimize_update": 1,
}
"""Kernels that each operation launches on a GPU. Every step has norm, control and update; autoclip
adds record and a sort, clipping by norm adds factors."""

# For the kernels, which take no other global names than Triton's constants.
_LEARNING_RATE, _FACTOR, _MOVES = map(tl.constexpr, (LEARNING_RATE, FACTOR, MOVES))
_STEP_SIZE, _GRADIENT_SIZE = tl.constexpr(STEP_SIZE), tl.constexpr(GRADIENT_SIZE)
_ROOT_SIZE, _OFFSET = tl.constexpr(ROOT_SIZE), tl.constexpr(OFFSET)
_PARAMETER, _COPY, _ACCUMULATOR = map(tl.constexpr, (PARAMETER, COPY, ACCUMULATOR))
_MEAN, _SQUARE, _LARGEST = map(tl.constexpr, (MEAN, SQUARE, LARGEST))
_DECAYS, _COLUMNS = tl.constexpr(DECAYS), tl.constexpr(COLUMNS)

_WARPS = 8
_BLOCK = 1024  # four elements a thread: 16 bytes of fp32, 8 of a 16-bit type


@triton.jit
def _rule(
    parameter, gradient, mean, square, largest,
    step_size, gradient_size, root_size, offset, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """The formula of this module for one block, in fp32; a moment that RULE has not comes back."""
    if RULE == "lion":
        ahead = beta_1 * mean + rest_1 * gradient
        change = step_size * (tl.where(ahead > 0, 1.0, 0.0) - tl.where(ahead < 0, 1.0, 0.0))
        mean = beta_2 * mean + rest_2 * gradient
    elif RULE == "rms-prop":
        square = beta_2 * square + rest_2 * gradient * gradient
        change = step_size * (gradient / (tl.sqrt(square) + offset))
    elif RULE == "adamax":
        mean = beta_1 * mean + rest_1 * gradient
        largest = tl.maximum(beta_2 * largest, tl.abs(gradient) + epsilon)
        change = step_size * (mean / largest)
    elif RULE == "adabelief":
        mean = beta_1 * mean + rest_1 * gradient
        surprise = gradient - mean
        square = beta_2 * square + rest_2 * surprise * surprise + epsilon
        change = step_size * (mean / (tl.sqrt(square) * root_size + offset))
    else:
        mean = beta_1 * mean + rest_1 * gradient
        square = beta_2 * square + rest_2 * gradient * gradient
        root = square
        if AMSGRAD:
            largest = tl.maximum(largest, square)
            root = largest
        moved = step_size * mean
        if RULE == "nadam":
            change = (moved + gradient_size * gradient) / (tl.sqrt(root) * root_size + offset)
        else:
            change = step_size * (mean / (tl.sqrt(root) * root_size + offset))
    return keep * parameter - change, mean, square, largest


@triton.jit
def _span(
    parameters, gradients, means, squares, largests, copies, first, end,
    factor, step_size, gradient_size, root_size, offset, keep, added_decay,
    beta_1, rest_1, beta_2, rest_2, epsilon, bound,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, IS_BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the elements from ``first`` to ``end``, at most BLOCK of them."""
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32) * factor
    if IS_BOUNDED:
        gradient = tl.minimum(tl.maximum(gradient, -bound), bound)
    parameter = tl.load(parameters + at, mask=inside, other=0.0)
    gradient += added_decay * parameter
    mean, square, largest = gradient, gradient, gradient  # where the rule has none: never stored
    if means is not None:
        mean = tl.load(means + at, mask=inside, other=0.0)
    if squares is not None:
        square = tl.load(squares + at, mask=inside, other=0.0)
    if largests is not None:
        largest = tl.load(largests + at, mask=inside, other=0.0)
    parameter, mean, square, largest = _rule(
        parameter, gradient, mean, square, largest,
        step_size, gradient_size, root_size, offset, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, RULE, AMSGRAD,
    )  # fmt: skip
    tl.store(parameters + at, parameter, mask=inside)
    if means is not None:
        tl.store(means + at, mean, mask=inside)
    if squares is not None:
        tl.store(squares + at, square, mask=inside)
    if largests is not None:
        tl.store(largests + at, largest, mask=inside)
    if copies is not None:
        tl.store(copies + at, parameter.to(copies.dtype.element_ty), mask=inside)


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
    FULL: tl.constexpr = tl.pointer_type(tl.float32)
    step_size = tl.load(control_ptr + _STEP_SIZE).to(tl.float32)
    gradient_size = tl.load(control_ptr + _GRADIENT_SIZE).to(tl.float32)
    root_size = tl.load(control_ptr + _ROOT_SIZE).to(tl.float32)
    offset = tl.load(control_ptr + _OFFSET).to(tl.float32)
    factor = tl.load(control_ptr + _FACTOR).to(tl.float32)

    # Backwards, so that the gradients which the norm has read last are still in the cache.
    chunk = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    tensor = tl.load(chunk)
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    row = tensors_ptr + tensor * _COLUMNS
    parameters = tensor_at(row + _PARAMETER, FULL) + start
    means = None
    squares = None
    largests = None
    copies = None
    if RULE != "rms-prop":
        means = tensor_at(row + _MEAN, FULL) + start
    if RULE != "lion" and RULE != "adamax":
        squares = tensor_at(row + _SQUARE, FULL) + start
    if RULE == "adamax" or AMSGRAD:
        largests = tensor_at(row + _LARGEST, FULL) + start
    if copy_ptr is not None:
        copies = tensor_at(row + _COPY, copy_ptr.dtype) + start
    if gradient_ptr is not None:
        gradients = tensor_at(gradients_ptr + tensor, gradient_ptr.dtype) + start
    else:
        gradients = tensor_at(row + _ACCUMULATOR, FULL) + start
    if factors_ptr is not None:
        factor *= tl.load(factors_ptr + tensor)
    decays = tl.load(row + _DECAYS)
    added_decay *= decays
    learning_rate = tl.load(control_ptr + _LEARNING_RATE)
    keep = (1 - learning_rate * decoupled_decay * decays).to(tl.float32)

    # Whole groups of eight first: only a bound known as a multiple keeps the accesses wide.
    whole = elements // 8 * 8
    for first in range(0, whole, BLOCK):
        _span(
            parameters, gradients, means, squares, largests, copies, first, whole,
            factor, step_size, gradient_size, root_size, offset, keep, added_decay,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound, RULE, AMSGRAD, IS_BOUNDED, BLOCK,
        )  # fmt: skip
    if whole < elements:
        _span(
            parameters, gradients, means, squares, largests, copies, whole, elements,
            factor, step_size, gradient_size, root_size, offset, keep, added_decay,
            beta_1, rest_1, beta_2, rest_2, epsilon, bound, RULE, AMSGRAD, IS_BOUNDED, 8,
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
    decays: Sequence[bool],
    is_accumulated: bool,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    bound: float,
) -> None:
    """Weights, moments and copies moved. A bound of 0 is none; gradients are the accumulators
    themselves where they were accumulated."""
    made = Rule(
        name=rule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        amsgrad=bool(squares and largests),
    )
    if not uses_triton(control):
        lists = (parameters, gradients, means, squares, largests)
        _plain_update([list(each) for each in lists], control, factors_t, decays, made, bound)
        if copies and control[MOVES]:
            torch._foreach_copy_(list(copies), list(parameters))
        return
    added, decoupled = (0.0, weight_decay) if made.is_decoupled else (weight_decay, 0.0)
    with torch.cuda.device_of(control):
        _update_kernel[(len(chunks_n3),)](
            tensors_tc, gradient_row, chunks_n3, control, factors_t,
            None if is_accumulated else gradients[0], copies[0] if copies else None,
            beta_1, 1 - beta_1, beta_2, 1 - beta_2, epsilon, added, decoupled, bound,
            RULE=rule, AMSGRAD=made.has_largest_square, IS_BOUNDED=bound > 0,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@_update_op.register_fake
def _(*inputs):
    return None


def _plain_update(
    lists: list[list[Tensor]],
    control: Tensor,
    factors_t: Tensor | None,
    decays: Sequence[bool],
    rule: Rule,
    bound: float,
) -> None:
    now = control.tolist()
    if not now[MOVES]:
        return
    gradients = [each.float() for each in lists[1]]
    if factors_t is not None:
        gradients = [*torch._foreach_mul(gradients, (factors_t * now[FACTOR]).tolist())]
    elif now[FACTOR] != 1:
        # Not as the fused kernel's grad_scale, which would write the scaled gradients back.
        gradients = [*torch._foreach_mul(gradients, now[FACTOR])]
    if bound:
        gradients = [*torch._foreach_clamp_min(gradients, -bound)]
        torch._foreach_clamp_max_(gradients, bound)
    lists[1] = gradients
    if not rule.weight_decay:
        _plain_rule(lists, now, rule, 0.0)
        return
    for is_decayed in (False, True):
        chosen = [decay == is_decayed for decay in decays]
        if any(chosen):
            own = [list(itertools.compress(tensors, chosen)) for tensors in lists]
            _plain_rule(own, now, rule, rule.weight_decay if is_decayed else 0.0)


def _plain_rule(
    lists: list[list[Tensor]], now: list[float], rule: Rule, weight_decay: float
) -> None:
    parameters, gradients, means, squares, largests = lists
    if rule.name in ("adam", "adamw"):
        # One core, 50 M weights: 27 ms, as torch._foreach_ operations 160 ms.
        fused = torch._fused_adamw_ if rule.is_decoupled else torch._fused_adam_
        fused(
            parameters,
            gradients,
            means,
            squares,
            largests,
            [torch.tensor(now[STEP], dtype=torch.float32)] * len(parameters),
            lr=now[LEARNING_RATE],
            beta1=rule.beta_1,
            beta2=rule.beta_2,
            weight_decay=weight_decay,
            eps=rule.epsilon,
            amsgrad=rule.has_largest_square,
            maximize=False,
        )
        return
    if weight_decay and rule.is_decoupled:
        torch._foreach_mul_(parameters, 1 - now[LEARNING_RATE] * weight_decay)
    elif weight_decay:
        gradients = [*torch._foreach_add(gradients, parameters, alpha=weight_decay)]
    if rule.name == "lion":
        changes = torch._foreach_lerp(means, gradients, 1 - rule.beta_1)
        torch._foreach_sign_(changes)
        torch._foreach_lerp_(means, gradients, 1 - rule.beta_2)
    elif rule.name == "rms-prop":
        _remember_squares(squares, gradients, rule.beta_2)
        changes = torch._foreach_div(gradients, _divisors(squares, now))
    else:
        torch._foreach_lerp_(means, gradients, 1 - rule.beta_1)
        if rule.name == "adamax":
            torch._foreach_mul_(largests, rule.beta_2)
            sizes = torch._foreach_abs(gradients)
            torch._foreach_add_(sizes, rule.epsilon)
            torch._foreach_maximum_(largests, sizes)
            changes = torch._foreach_div(means, largests)
        elif rule.name == "adabelief":
            _remember_squares(squares, [*torch._foreach_sub(gradients, means)], rule.beta_2)
            torch._foreach_add_(squares, rule.epsilon)
            changes = torch._foreach_div(means, _divisors(squares, now))
        else:
            _remember_squares(squares, gradients, rule.beta_2)
            divisors = _divisors(squares, now)
            torch._foreach_addcdiv_(parameters, gradients, divisors, -now[GRADIENT_SIZE])
            changes = torch._foreach_div(means, divisors)
    torch._foreach_add_(parameters, changes, alpha=-now[STEP_SIZE])


def _remember_squares(squares: list[Tensor], gradients: list[Tensor], beta_2: float) -> None:
    torch._foreach_mul_(squares, beta_2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta_2)


def _divisors(squares: list[Tensor], now: list[float]) -> list[Tensor]:
    """What means are divided by; the rule's sizes are in the control."""
    roots = [*torch._foreach_sqrt(squares)]
    torch._foreach_mul_(roots, now[ROOT_SIZE])
    torch._foreach_add_(roots, now[OFFSET])
    return roots


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
            type. One in another layout than its parameter's is copied into that first.
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
    prepare(fitted, row_t, tables, control, rule, clipping, history_c, accumulation, dynamic_scale)
    moments = tables.moments
    _update_op(
        tables.parameters, tables.accumulators or fitted,
        moments.get("mean", []), moments.get("square", []), moments.get("largest", []),
        tables.copies, control, tables.factors_t if clipping.kind == "norm" else None,
        tables.tensors_tc, row_t, tables.chunks_n3, tables.decays, bool(tables.accumulators),
        rule.name, rule.beta_1, rule.beta_2, rule.epsilon, rule.weight_decay,
        clipping.bound if clipping.kind == "value" else 0.0,
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
