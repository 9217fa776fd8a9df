"""The scalars of a step, from the norm of its gradients: is it finite, how large, how far to go.

From the partial sums: the norm, the factor of the gradients, the counts, the loss scale, and every
number of the rule that changes from step to step, in float64. One launch of one program: it has
some hundred operations to do, and all of them need the norm.

Letters: N chunks of gradients, C past norms.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import uses_triton
from .gradient_norm import BLOCK_SUM, WARPS, mean_norm, plain_mean_norm
from .optimizer_rules import SCHEDULE_FREE
from .optimizer_scalars import Scalar

# Triton reads no globals but constants.
_LEARNING_RATE = tl.constexpr(Scalar.LEARNING_RATE)
_STEP = tl.constexpr(Scalar.STEP)
_BETA_1_POWER = tl.constexpr(Scalar.BETA_1_POWER)
_BETA_2_POWER = tl.constexpr(Scalar.BETA_2_POWER)
_MOMENTUM_PRODUCT = tl.constexpr(Scalar.MOMENTUM_PRODUCT)
_LOSS_SCALE = tl.constexpr(Scalar.LOSS_SCALE)
_FINITE_STEPS = tl.constexpr(Scalar.FINITE_STEPS)
_SKIPPED_STEPS = tl.constexpr(Scalar.SKIPPED_STEPS)
_ACCUMULATED_GRADIENTS = tl.constexpr(Scalar.ACCUMULATED_GRADIENTS)
_RECORDED_NORMS = tl.constexpr(Scalar.RECORDED_NORMS)
_GRADIENT_NORM = tl.constexpr(Scalar.GRADIENT_NORM)
_GRADIENT_FACTOR = tl.constexpr(Scalar.GRADIENT_FACTOR)
_IS_APPLIED = tl.constexpr(Scalar.IS_APPLIED)
_STEP_SIZE = tl.constexpr(Scalar.STEP_SIZE)
_GRADIENT_STEP_SIZE = tl.constexpr(Scalar.GRADIENT_STEP_SIZE)
_ROOT_FACTOR = tl.constexpr(Scalar.ROOT_FACTOR)
_ROOT_OFFSET = tl.constexpr(Scalar.ROOT_OFFSET)
_AVERAGE_WEIGHT = tl.constexpr(Scalar.AVERAGE_WEIGHT)
_AVERAGE_SHARE = tl.constexpr(Scalar.AVERAGE_SHARE)

GROWTH_INTERVAL = 2000
"""Finite steps after which a dynamic loss scale doubles, as in PyTorch's GradScaler."""

LOG2_MOMENTUM_DECAY = 0.004 * math.log2(0.96)
"""NAdam's momentum is beta_1 * (1 - 2**(step * this) / 2)."""

_LOG2_MOMENTUM_DECAY = tl.constexpr(LOG2_MOMENTUM_DECAY)

_LEAST_WEIGHT = 1e-300
"""Keeps 0 / 0 from the share of an average whose learning rates were all 0."""

_LEAST_AVERAGE_WEIGHT = tl.constexpr(_LEAST_WEIGHT)


@triton.jit
def _percentile(sorted_ptr, recorded, capacity, PERCENT: tl.constexpr):
    """Percentile of as many numbers as are there, linear between the two next to it."""
    last = tl.minimum(recorded, capacity) - 1
    place = last * (PERCENT / 100)
    below = place.to(tl.int64)
    above = tl.minimum(below + 1, last.to(tl.int64))
    low, high = tl.load(sorted_ptr + below), tl.load(sorted_ptr + above)
    return low + (high - low) * (place - below.to(tl.float64))


@triton.jit
def _rule_scalars(
    learning_rate, step, power_1, power_2, product,
    RULE: tl.constexpr, BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """(STEP_SIZE, GRADIENT_STEP_SIZE, ROOT_FACTOR, ROOT_OFFSET, MOMENTUM_PRODUCT)."""
    # Made of the learning rate, so that they are float64 as it is: bare numbers would be fp32.
    gradient_step_size = learning_rate * 0
    root_factor = gradient_step_size + 1
    root_offset = gradient_step_size + EPSILON
    step_size = learning_rate / (1 - power_1)
    if RULE == "lion" or RULE == "rms-prop":
        step_size = learning_rate
    elif RULE == "schedule-free":
        step_size = learning_rate
        root_factor = 1 / tl.sqrt(1 - power_2)
    elif RULE == "nadam":
        momentum = BETA_1 * (1 - 0.5 * tl.exp2(step * _LOG2_MOMENTUM_DECAY))
        next_momentum = BETA_1 * (1 - 0.5 * tl.exp2((step + 1) * _LOG2_MOMENTUM_DECAY))
        product *= momentum
        gradient_step_size = learning_rate * (1 - momentum) / (1 - product)
        step_size = learning_rate * next_momentum / (1 - product * next_momentum)
        root_factor = 1 / tl.sqrt(1 - power_2)
    elif RULE == "adabelief":
        longest = 2 / (1 - BETA_2) - 1
        length = longest - 2 * step * power_2 / (1 - power_2)
        is_long = length >= 5
        length = tl.where(is_long, length, 5.0)
        shares = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
        rectified = step_size * tl.sqrt(tl.maximum((1 - power_2) * shares, 0.0))
        step_size = tl.where(is_long, rectified, step_size)
        root_factor = tl.where(is_long, 1.0, gradient_step_size)
        root_offset = tl.where(is_long, root_offset, 1.0)
    elif RULE != "adamax":
        root_factor = 1 / tl.sqrt(1 - power_2)
    return step_size, gradient_step_size, root_factor, root_offset, product


@triton.jit
def _update_rule_scalars(
    scalars_ptr, is_applied,
    RULE: tl.constexpr, BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr,
    EMA: tl.constexpr,
):  # fmt: skip
    """Count the step, where it is applied, and write what the rule takes of it."""
    step = tl.load(scalars_ptr + _STEP)
    power_1 = tl.load(scalars_ptr + _BETA_1_POWER)
    power_2 = tl.load(scalars_ptr + _BETA_2_POWER)
    product = tl.load(scalars_ptr + _MOMENTUM_PRODUCT)
    step_size, gradient_step_size, root_factor, root_offset, new_product = (
        _rule_scalars(
            tl.load(scalars_ptr + _LEARNING_RATE), step + 1, power_1 * BETA_1, power_2 * BETA_2,
            product, RULE, BETA_1, BETA_2, EPSILON,
        )
    )  # fmt: skip
    tl.store(scalars_ptr + _STEP, tl.where(is_applied, step + 1, step))
    tl.store(scalars_ptr + _BETA_1_POWER, tl.where(is_applied, power_1 * BETA_1, power_1))
    tl.store(scalars_ptr + _BETA_2_POWER, tl.where(is_applied, power_2 * BETA_2, power_2))
    tl.store(scalars_ptr + _MOMENTUM_PRODUCT, tl.where(is_applied, new_product, product))
    tl.store(scalars_ptr + _STEP_SIZE, step_size)
    tl.store(scalars_ptr + _GRADIENT_STEP_SIZE, gradient_step_size)
    tl.store(scalars_ptr + _ROOT_FACTOR, root_factor)
    tl.store(scalars_ptr + _ROOT_OFFSET, root_offset)
    if EMA > 0 or RULE == "schedule-free":
        _update_average_scalars(scalars_ptr, is_applied, RULE, EMA)


@triton.jit
def _update_average_scalars(scalars_ptr, is_applied, RULE: tl.constexpr, EMA: tl.constexpr):
    """Weigh the step, where it is applied, and write its share in the average: see `optimize`."""
    weight = tl.load(scalars_ptr + _AVERAGE_WEIGHT)
    if RULE == "schedule-free":
        rate = tl.load(scalars_ptr + _LEARNING_RATE)
        new_weight = weight + rate * rate
        share = rate * rate / tl.maximum(new_weight, _LEAST_AVERAGE_WEIGHT)
    else:
        new_weight = weight + 1
        # 1 - (1 + u) / (10 + u), without a difference of two numbers near 1.
        share = tl.maximum(9 / (new_weight + 10), 1 - EMA)
    tl.store(scalars_ptr + _AVERAGE_WEIGHT, tl.where(is_applied, new_weight, weight))
    tl.store(scalars_ptr + _AVERAGE_SHARE, share)


@triton.jit
def _update_loss_scale(scalars_ptr, is_due, is_finite, GROWTH_INTERVAL: tl.constexpr):
    """Halve the loss scale after a step that is not finite, double it after many that are."""
    scale = tl.load(scalars_ptr + _LOSS_SCALE)
    finite_steps_before = tl.load(scalars_ptr + _FINITE_STEPS)
    finite_steps = tl.where(is_finite, finite_steps_before + 1, 0.0)
    is_grown = finite_steps >= GROWTH_INTERVAL
    change = tl.where(is_finite, tl.where(is_grown, 2.0, 1.0), 0.5)
    tl.store(scalars_ptr + _LOSS_SCALE, tl.where(is_due, scale * change, scale))
    finite_steps = tl.where(is_grown, 0.0, finite_steps)
    tl.store(scalars_ptr + _FINITE_STEPS, tl.where(is_due, finite_steps, finite_steps_before))


# One form for any numbers of partial sums and past norms: a rank may hold any number of the former.
@triton.jit(do_not_specialize=["num_partials", "capacity"])
def _scalars_kernel(
    partials_ptr,  # [N] fp64
    scalars_ptr,   # fp64, see `Scalar`
    sorted_ptr,    # [C] fp64, rising; None: no autoclip
    num_partials,
    capacity,
    RULE: tl.constexpr,
    BETA_1: tl.constexpr,  # compile-time, because Triton passes numbers as fp32: too coarse here
    BETA_2: tl.constexpr,
    EPSILON: tl.constexpr,
    CLIPPING: tl.constexpr,
    BOUND: tl.constexpr,
    ACCUMULATION: tl.constexpr,
    DYNAMIC_SCALE: tl.constexpr,
    EMA: tl.constexpr,
    GROWTH_INTERVAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm, factor = mean_norm(partials_ptr, scalars_ptr, num_partials, BLOCK)
    accumulated = tl.load(scalars_ptr + _ACCUMULATED_GRADIENTS) + 1
    is_due = accumulated >= ACCUMULATION
    is_finite = norm < float("inf")  # false for NaN
    is_applied = is_due & is_finite
    # Only now: `mean_norm` has divided by the count as it was.
    tl.store(scalars_ptr + _ACCUMULATED_GRADIENTS, tl.where(is_due, 0.0, accumulated))

    if CLIPPING == "global_norm":
        # The summand is that of PyTorch's clip_grad_norm_.
        factor *= tl.minimum(BOUND / (norm + 1e-6), 1.0)
    elif CLIPPING == "autoclip":
        recorded = tl.load(scalars_ptr + _RECORDED_NORMS)
        # Of a step that is not recorded the percentile is not used, but has to be a number there.
        bound = _percentile(sorted_ptr, recorded + 1, capacity, BOUND)
        factor *= tl.minimum(bound / (norm + 1e-6), 1.0)
        tl.store(scalars_ptr + _RECORDED_NORMS, tl.where(is_applied, recorded + 1, recorded))
    before = tl.load(scalars_ptr + _GRADIENT_NORM)
    tl.store(scalars_ptr + _GRADIENT_NORM, tl.where(is_due, norm, before))
    tl.store(scalars_ptr + _IS_APPLIED, tl.where(is_applied, 1.0, 0.0))
    tl.store(scalars_ptr + _GRADIENT_FACTOR, tl.where(is_applied, factor, 0.0))

    skipped = tl.load(scalars_ptr + _SKIPPED_STEPS)
    is_skipped = is_due & (is_finite == 0)
    tl.store(scalars_ptr + _SKIPPED_STEPS, tl.where(is_skipped, skipped + 1, skipped))
    _update_rule_scalars(scalars_ptr, is_applied, RULE, BETA_1, BETA_2, EPSILON, EMA)
    if DYNAMIC_SCALE:
        _update_loss_scale(scalars_ptr, is_due, is_finite, GROWTH_INTERVAL)


@torch.library.custom_op("mien::optimize_scalars", mutates_args=("scalars",))
def scalars_op(
    partials_n: Tensor,
    sorted_c: Tensor | None,
    scalars: Tensor,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    clipping: str,
    bound: float,
    accumulation: int,
    dynamic_scale: bool,
    ema: float,
) -> None:
    """The scalars of the step."""
    if not uses_triton(scalars):
        values = scalars.tolist()
        _plain_update(
            values, plain_mean_norm(partials_n, values), sorted_c, clipping, bound, accumulation,
            dynamic_scale, rule, beta_1, beta_2, epsilon, ema,
        )  # fmt: skip
        scalars.copy_(torch.tensor(values, dtype=torch.float64))
        return
    with torch.cuda.device_of(scalars):
        _scalars_kernel[(1,)](
            partials_n, scalars, sorted_c, len(partials_n),
            0 if sorted_c is None else len(sorted_c),
            RULE=rule, BETA_1=beta_1, BETA_2=beta_2, EPSILON=epsilon,
            CLIPPING=clipping, BOUND=bound, ACCUMULATION=accumulation,
            DYNAMIC_SCALE=dynamic_scale, EMA=ema, GROWTH_INTERVAL=GROWTH_INTERVAL,
            BLOCK=BLOCK_SUM, num_warps=WARPS,
        )  # fmt: skip


@scalars_op.register_fake
def _(*inputs):
    return None


def _plain_update(
    values: list[float],
    norm: float,
    sorted_c: Tensor | None,
    clipping: str,
    bound: float,
    accumulation: int,
    dynamic_scale: bool,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    ema: float,
) -> None:
    """Change the values of the scalars as the kernel does."""
    accumulated = values[Scalar.ACCUMULATED_GRADIENTS] + 1
    values[Scalar.IS_APPLIED] = values[Scalar.GRADIENT_FACTOR] = 0.0
    values[Scalar.ACCUMULATED_GRADIENTS] = accumulated
    if accumulated < accumulation:
        return
    values[Scalar.ACCUMULATED_GRADIENTS], values[Scalar.GRADIENT_NORM] = 0.0, norm
    scale, is_finite = values[Scalar.LOSS_SCALE], math.isfinite(norm)
    if dynamic_scale:
        finite_steps = values[Scalar.FINITE_STEPS] + 1 if is_finite else 0.0
        is_grown = finite_steps >= GROWTH_INTERVAL
        values[Scalar.LOSS_SCALE] *= (2.0 if is_grown else 1.0) if is_finite else 0.5
        values[Scalar.FINITE_STEPS] = 0.0 if is_grown else finite_steps
    if not is_finite:
        values[Scalar.SKIPPED_STEPS] += 1
        return
    values[Scalar.IS_APPLIED], values[Scalar.GRADIENT_FACTOR] = 1.0, 1 / (scale * accumulated)
    if sorted_c is not None:
        values[Scalar.RECORDED_NORMS] += 1
        last = min(int(values[Scalar.RECORDED_NORMS]), len(sorted_c)) - 1
        place = last * (bound / 100)
        low, high = (float(sorted_c[min(int(place) + i, last)]) for i in (0, 1))
        bound = low + (high - low) * (place - int(place))
    if clipping in ("global_norm", "autoclip"):
        values[Scalar.GRADIENT_FACTOR] *= min(bound / (norm + 1e-6), 1.0)
    values[Scalar.STEP] += 1
    values[Scalar.BETA_1_POWER] *= beta_1
    values[Scalar.BETA_2_POWER] *= beta_2
    _plain_rule_scalars(values, rule, beta_1, beta_2, epsilon)
    if rule == SCHEDULE_FREE:
        squared_rate = values[Scalar.LEARNING_RATE] ** 2
        values[Scalar.AVERAGE_WEIGHT] += squared_rate
        weight = max(values[Scalar.AVERAGE_WEIGHT], _LEAST_WEIGHT)
        values[Scalar.AVERAGE_SHARE] = squared_rate / weight
    elif ema:
        values[Scalar.AVERAGE_WEIGHT] += 1
        values[Scalar.AVERAGE_SHARE] = max(9 / (10 + values[Scalar.AVERAGE_WEIGHT]), 1 - ema)


def _plain_rule_scalars(
    values: list[float], rule: str, beta_1: float, beta_2: float, epsilon: float
) -> None:
    """Change what the rule takes of the step as the kernel does."""
    learning_rate, step = values[Scalar.LEARNING_RATE], values[Scalar.STEP]
    power_2 = values[Scalar.BETA_2_POWER]
    values[Scalar.STEP_SIZE] = learning_rate / (1 - values[Scalar.BETA_1_POWER])
    values[Scalar.GRADIENT_STEP_SIZE] = 0.0
    values[Scalar.ROOT_FACTOR], values[Scalar.ROOT_OFFSET] = 1.0, epsilon
    if rule in ("lion", "rms-prop", SCHEDULE_FREE):
        values[Scalar.STEP_SIZE] = learning_rate
    if rule == "nadam":
        momentum, next_momentum = (
            beta_1 * (1 - 0.5 * 2.0 ** (each * LOG2_MOMENTUM_DECAY)) for each in (step, step + 1)
        )
        values[Scalar.MOMENTUM_PRODUCT] *= momentum
        product = values[Scalar.MOMENTUM_PRODUCT]
        values[Scalar.GRADIENT_STEP_SIZE] = learning_rate * (1 - momentum) / (1 - product)
        values[Scalar.STEP_SIZE] = learning_rate * next_momentum / (1 - product * next_momentum)
        values[Scalar.ROOT_FACTOR] = 1 / math.sqrt(1 - power_2)
    elif rule == "adabelief":
        longest = 2 / (1 - beta_2) - 1
        length = longest - 2 * step * power_2 / (1 - power_2)
        if length < 5:
            values[Scalar.ROOT_FACTOR], values[Scalar.ROOT_OFFSET] = 0.0, 1.0
            return
        shares = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
        values[Scalar.STEP_SIZE] *= math.sqrt((1 - power_2) * shares)
    elif rule not in ("adamax", "lion", "rms-prop"):
        values[Scalar.ROOT_FACTOR] = 1 / math.sqrt(1 - power_2)
