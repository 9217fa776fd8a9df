"""What a gradient makes of a step, on the device: is it finite, how large, how far does it move.

    1. norm      sums of squares of the gradients, a number a chunk; over several backward passes
                 the gradients are summed into accumulators on the way; those of gradients of low
                 rank come from their factors (`dense_norm`)
    2. record    autoclip: the norm goes into the history, whose sorted copy gives the percentile
    3. control   from the sums: the norm, the factor of the gradients, the counts, the loss scale,
                 and every number of the rule that changes from step to step, in float64
    4. factors   clipping by norm: the factor of each tensor

Everything is read and written on the device, so a step can be captured in a CUDA graph, and each
of the four is one launch.

Letters: T tensors, N chunks of them, C past norms.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_norm import dense_norm_op
from .dense_tables import LowRankGradients
from .dispatch import uses_triton
from .rules import Clipping, Rule
from .tables import (
    ACCUMULATOR,
    CHUNK,
    COLUMNS,
    FIRST_CHUNK,
    NUM_CHUNKS,
    Tables,
    tensor_at,
)

(
    LEARNING_RATE,
    STEP,
    BETA_1_POWER,
    BETA_2_POWER,
    MOMENTUM_PRODUCT,
    SCALE,
    GOOD_STEPS,
    SKIPPED,
    ACCUMULATED,
    RECORDED,
    NORM,
    FACTOR,
    MOVES,
    STEP_SIZE,
    GRADIENT_SIZE,
    ROOT_SIZE,
    OFFSET,
) = range(17)
"""Positions of the values in the control: see `new_control`."""

NUM_CONTROLS = 17

# The same for the kernels, which take no other global names than Triton's constants.
_LEARNING_RATE, _STEP, _BETA_1_POWER, _BETA_2_POWER = map(tl.constexpr, range(4))
_MOMENTUM_PRODUCT, _SCALE, _GOOD_STEPS, _SKIPPED = map(tl.constexpr, range(4, 8))
_ACCUMULATED, _RECORDED, _NORM, _FACTOR, _MOVES = map(tl.constexpr, range(8, 13))
_STEP_SIZE, _GRADIENT_SIZE, _ROOT_SIZE, _OFFSET = map(tl.constexpr, range(13, 17))
_COLUMNS, _ACCUMULATOR = tl.constexpr(COLUMNS), tl.constexpr(ACCUMULATOR)
_FIRST_CHUNK, _NUM_CHUNKS = tl.constexpr(FIRST_CHUNK), tl.constexpr(NUM_CHUNKS)

GROWTH_STEPS = 2000
"""Finite steps after which a dynamic loss scale doubles."""

LOG2_MOMENTUM_DECAY = 0.004 * math.log2(0.96)
"""NAdam's momentum is beta_1 * (1 - 2**(step * this) / 2)."""

_LOG2_MOMENTUM_DECAY = tl.constexpr(LOG2_MOMENTUM_DECAY)
_WARPS = 8
_BLOCK_NORM = 4096  # elements at a time; two 16-byte loads a thread of 16-bit gradients
_BLOCK_SUM = 4096
_BLOCK_TENSOR = 256  # chunks of one tensor at a time
_ROW = 1024  # elements that plain PyTorch squares and adds at a time


@triton.jit
def _gathered(gradients, accumulators, at, inside, is_first):
    """Gradients in fp32, added to what the accumulators hold, if there are any."""
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    if accumulators is not None:
        gradient += tl.load(accumulators + at, mask=inside & (is_first == 0), other=0.0)
        tl.store(accumulators + at, gradient, mask=inside)
    return gradient


@triton.jit
def _norm_kernel(
    tensors_ptr,    # [T, COLUMNS] int64
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    partials_ptr,   # [N] fp64
    control_ptr,    # [17] fp64
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
        column = tensors_ptr + tensor * _COLUMNS + _ACCUMULATOR
        accumulators = tensor_at(column, tl.pointer_type(tl.float32)) + start
        is_first = (tl.load(control_ptr + _ACCUMULATED) == 0).to(tl.int32)

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
def _norm_of(partials_ptr, control_ptr, num_partials, BLOCK: tl.constexpr):
    """(norm of the mean gradient, what makes it of the summed one), the loss scale undone."""
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_partials, BLOCK):
        inside = first + lanes < num_partials
        squares += tl.load(partials_ptr + first + lanes, mask=inside, other=0.0)
    sums = tl.load(control_ptr + _ACCUMULATED) + 1
    undone = tl.load(control_ptr + _SCALE) * sums
    return tl.sqrt(_not_below_zero(tl.sum(squares, axis=0))) / undone, 1.0 / undone


@triton.jit
def _record_kernel(
    partials_ptr,  # [N] fp64
    control_ptr,   # [17] fp64
    history_ptr,   # [C] fp64
    num_partials,
    capacity,
    ACCUMULATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm, _ = _norm_of(partials_ptr, control_ptr, num_partials, BLOCK)
    is_due = tl.load(control_ptr + _ACCUMULATED) + 1 >= ACCUMULATION
    place = tl.load(control_ptr + _RECORDED).to(tl.int64) % capacity
    tl.store(history_ptr + place, norm, mask=is_due & (norm < float("inf")))


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
def _sizes(
    learning_rate, step, power_1, power_2, product,
    RULE: tl.constexpr, BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """(step size, gradient size, root size, offset, momentum product): see `new_control`."""
    gradient_size = learning_rate * 0
    root_size = gradient_size + 1
    offset = gradient_size + EPSILON
    step_size = learning_rate / (1 - power_1)
    if RULE == "lion" or RULE == "rms-prop":
        step_size = learning_rate
    elif RULE == "nadam":
        momentum = BETA_1 * (1 - 0.5 * tl.exp2(step * _LOG2_MOMENTUM_DECAY))
        following = BETA_1 * (1 - 0.5 * tl.exp2((step + 1) * _LOG2_MOMENTUM_DECAY))
        product *= momentum
        gradient_size = learning_rate * (1 - momentum) / (1 - product)
        step_size = learning_rate * following / (1 - product * following)
        root_size = 1 / tl.sqrt(1 - power_2)
    elif RULE == "adabelief":
        longest = 2 / (1 - BETA_2) - 1
        length = longest - 2 * step * power_2 / (1 - power_2)
        is_long = length >= 5
        length = tl.where(is_long, length, 5.0)
        shares = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
        rectified = step_size * tl.sqrt(tl.maximum((1 - power_2) * shares, 0.0))
        step_size = tl.where(is_long, rectified, step_size)
        root_size = tl.where(is_long, 1.0, gradient_size)
        offset = tl.where(is_long, offset, 1.0)
    elif RULE != "adamax":
        root_size = 1 / tl.sqrt(1 - power_2)
    return step_size, gradient_size, root_size, offset, product


@triton.jit
def _control_kernel(
    partials_ptr,  # [N] fp64
    control_ptr,   # [17] fp64
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
    GROWTH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm, factor = _norm_of(partials_ptr, control_ptr, num_partials, BLOCK)
    accumulated = tl.load(control_ptr + _ACCUMULATED) + 1
    is_due = accumulated >= ACCUMULATION
    is_finite = norm < float("inf")  # false for NaN
    moves = is_due & is_finite
    tl.store(control_ptr + _ACCUMULATED, tl.where(is_due, 0.0, accumulated))

    if CLIPPING == "global_norm":
        factor *= tl.minimum(BOUND / (norm + 1e-6), 1.0)
    elif CLIPPING == "autoclip":
        recorded = tl.load(control_ptr + _RECORDED)
        # Of a step that is not recorded the percentile is not used, but has to be a number there.
        bound = _percentile(sorted_ptr, recorded + 1, capacity, BOUND)
        factor *= tl.minimum(bound / (norm + 1e-6), 1.0)
        tl.store(control_ptr + _RECORDED, tl.where(moves, recorded + 1, recorded))
    before = tl.load(control_ptr + _NORM)
    tl.store(control_ptr + _NORM, tl.where(is_due, norm, before))
    tl.store(control_ptr + _MOVES, tl.where(moves, 1.0, 0.0))
    tl.store(control_ptr + _FACTOR, tl.where(moves, factor, 0.0))

    skipped = tl.load(control_ptr + _SKIPPED)
    tl.store(control_ptr + _SKIPPED, tl.where(is_due & (is_finite == 0), skipped + 1, skipped))
    step = tl.load(control_ptr + _STEP)
    power_1 = tl.load(control_ptr + _BETA_1_POWER)
    power_2 = tl.load(control_ptr + _BETA_2_POWER)
    product = tl.load(control_ptr + _MOMENTUM_PRODUCT)
    step_size, gradient_size, root_size, offset, new_product = _sizes(
        tl.load(control_ptr + _LEARNING_RATE), step + 1, power_1 * BETA_1, power_2 * BETA_2,
        product, RULE, BETA_1, BETA_2, EPSILON,
    )  # fmt: skip
    tl.store(control_ptr + _STEP, tl.where(moves, step + 1, step))
    tl.store(control_ptr + _BETA_1_POWER, tl.where(moves, power_1 * BETA_1, power_1))
    tl.store(control_ptr + _BETA_2_POWER, tl.where(moves, power_2 * BETA_2, power_2))
    tl.store(control_ptr + _MOMENTUM_PRODUCT, tl.where(moves, new_product, product))
    tl.store(control_ptr + _STEP_SIZE, step_size)
    tl.store(control_ptr + _GRADIENT_SIZE, gradient_size)
    tl.store(control_ptr + _ROOT_SIZE, root_size)
    tl.store(control_ptr + _OFFSET, offset)

    if DYNAMIC_SCALE:
        scale = tl.load(control_ptr + _SCALE)
        good_before = tl.load(control_ptr + _GOOD_STEPS)
        good = tl.where(is_finite, good_before + 1, 0.0)
        is_grown = good >= GROWTH_STEPS
        change = tl.where(is_finite, tl.where(is_grown, 2.0, 1.0), 0.5)
        tl.store(control_ptr + _SCALE, tl.where(is_due, scale * change, scale))
        good = tl.where(is_grown, 0.0, good)
        tl.store(control_ptr + _GOOD_STEPS, tl.where(is_due, good, good_before))


@triton.jit
def _factors_kernel(
    tensors_ptr,   # [T, COLUMNS] int64
    partials_ptr,  # [N] fp64
    control_ptr,   # [17] fp64
    factors_ptr,   # [T] fp32
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    row = tensors_ptr + tensor * _COLUMNS
    partials = partials_ptr + tl.load(row + _FIRST_CHUNK)
    num_chunks = tl.load(row + _NUM_CHUNKS)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_chunks, BLOCK):
        at = first + lanes
        squares += tl.load(partials + at, mask=at < num_chunks, other=0.0)
    norm = tl.sqrt(_not_below_zero(tl.sum(squares, axis=0))) * tl.load(control_ptr + _FACTOR)
    factor = tl.where(norm > BOUND, BOUND / tl.maximum(norm, BOUND), 1.0)
    tl.store(factors_ptr + tensor, factor.to(tl.float32))


@torch.library.custom_op("mien::optimize_norm", mutates_args=("accumulators", "partials_n"))
def norm_op(
    gradients: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    partials_n: Tensor,
    control: Tensor,
    tensors_tc: Tensor,
    gradient_row: Tensor,
    chunks_n3: Tensor,
) -> None:
    """Sums of squares of the gradients, or of what the accumulators hold with them, by chunk."""
    if not uses_triton(control):
        _plain_norm(gradients, accumulators, partials_n, control)
        return
    with torch.cuda.device_of(control):
        _norm_kernel[(len(chunks_n3),)](
            tensors_tc, gradient_row, chunks_n3, partials_n, control, gradients[0],
            ACCUMULATES=bool(accumulators), BLOCK=_BLOCK_NORM, num_warps=_WARPS,
        )  # fmt: skip


@torch.library.custom_op("mien::optimize_record", mutates_args=("history_c",))
def record_op(partials_n: Tensor, control: Tensor, history_c: Tensor, accumulation: int) -> None:
    """The norm put into the history, if it is finite and the step due."""
    if not uses_triton(control):
        now = control.tolist()
        norm = _plain_mean_norm(partials_n, now)
        if now[ACCUMULATED] + 1 >= accumulation and math.isfinite(norm):
            history_c[int(now[RECORDED]) % len(history_c)] = norm
        return
    with torch.cuda.device_of(control):
        _record_kernel[(1,)](
            partials_n, control, history_c, len(partials_n), len(history_c),
            ACCUMULATION=accumulation, BLOCK=_BLOCK_SUM, num_warps=_WARPS,
        )  # fmt: skip


@torch.library.custom_op("mien::optimize_control", mutates_args=("control",))
def control_op(
    partials_n: Tensor,
    sorted_c: Tensor | None,
    control: Tensor,
    rule: str,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    clipping: str,
    bound: float,
    accumulation: int,
    dynamic_scale: bool,
) -> None:
    """The control of the step."""
    if not uses_triton(control):
        now = control.tolist()
        _plain_control(
            now, _plain_mean_norm(partials_n, now), sorted_c, clipping, bound, accumulation,
            dynamic_scale, rule, beta_1, beta_2, epsilon,
        )  # fmt: skip
        control.copy_(torch.tensor(now, dtype=torch.float64))
        return
    with torch.cuda.device_of(control):
        _control_kernel[(1,)](
            partials_n, control, sorted_c, len(partials_n),
            0 if sorted_c is None else len(sorted_c),
            RULE=rule, BETA_1=beta_1, BETA_2=beta_2, EPSILON=epsilon,
            CLIPPING=clipping, BOUND=bound, ACCUMULATION=accumulation,
            DYNAMIC_SCALE=dynamic_scale, GROWTH_STEPS=GROWTH_STEPS,
            BLOCK=_BLOCK_SUM, num_warps=_WARPS,
        )  # fmt: skip


@torch.library.custom_op("mien::optimize_factors", mutates_args=("factors_t",))
def factors_op(
    partials_n: Tensor, control: Tensor, factors_t: Tensor, tensors_tc: Tensor, bound: float
) -> None:
    """The factor of each tensor that is clipped by its own norm."""
    if not uses_triton(control):
        spans = tensors_tc[:, [FIRST_CHUNK, NUM_CHUNKS]].tolist()
        squares_t = torch.stack([partials_n[first:][:chunks].sum() for first, chunks in spans])
        norms_t = squares_t.clamp(min=0).sqrt() * control[FACTOR]
        factors_t.copy_((bound / norms_t).clamp(max=1.0))
        return
    with torch.cuda.device_of(control):
        _factors_kernel[(len(factors_t),)](
            tensors_tc, partials_n, control, factors_t,
            BOUND=bound, BLOCK=_BLOCK_TENSOR, num_warps=4,
        )  # fmt: skip


@norm_op.register_fake
@record_op.register_fake
@control_op.register_fake
@factors_op.register_fake
def _(*inputs):
    return None


def _plain_norm(
    gradients: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    partials_n: Tensor,
    control: Tensor,
) -> None:
    """Compute what the kernel does, with the sum of a whole tensor in the place of its first
    chunk."""
    if accumulators:
        own = list(accumulators)
        if control[ACCUMULATED] == 0:
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
    flats = [each.as_strided((each.numel(),), (1,)).float() for each in tensors]
    ends = [each.numel() // _ROW * _ROW for each in flats]
    rows = [each[:end].view(-1, _ROW) for each, end in zip(flats, ends, strict=True) if end]
    rests = [each[end:] for each, end in zip(flats, ends, strict=True)]
    norms = [torch.linalg.vector_norm(each, dim=1) for each in rows]
    joined = torch.cat([*norms, torch.stack(torch._foreach_norm(rests))]).double()
    of_rows, of_rests = joined[: -len(flats)], joined[-len(flats) :]
    by_tensor = of_rows.split([end // _ROW for end in ends])
    return torch.stack(torch._foreach_norm(list(by_tensor))).square() + of_rests.square()


def _plain_mean_norm(partials_n: Tensor, now: list[float]) -> float:
    squares = float(partials_n.sum().clamp(min=0))
    return math.sqrt(squares) / (now[SCALE] * (now[ACCUMULATED] + 1))


def _plain_control(
    now: list[float],
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
) -> None:
    """Change the numbers of the control as the kernel does."""
    accumulated = now[ACCUMULATED] + 1
    now[MOVES] = now[FACTOR] = 0.0
    now[ACCUMULATED] = accumulated
    if accumulated < accumulation:
        return
    now[ACCUMULATED], now[NORM] = 0.0, norm
    scale, is_finite = now[SCALE], math.isfinite(norm)
    if dynamic_scale:
        good = now[GOOD_STEPS] + 1 if is_finite else 0.0
        is_grown = good >= GROWTH_STEPS
        now[SCALE] *= (2.0 if is_grown else 1.0) if is_finite else 0.5
        now[GOOD_STEPS] = 0.0 if is_grown else good
    if not is_finite:
        now[SKIPPED] += 1
        return
    now[MOVES], now[FACTOR] = 1.0, 1 / (scale * accumulated)
    if sorted_c is not None:
        now[RECORDED] += 1
        last = min(int(now[RECORDED]), len(sorted_c)) - 1
        place = last * (bound / 100)
        low, high = (float(sorted_c[min(int(place) + i, last)]) for i in (0, 1))
        bound = low + (high - low) * (place - int(place))
    if clipping in ("global_norm", "autoclip"):
        now[FACTOR] *= min(bound / (norm + 1e-6), 1.0)
    now[STEP] += 1
    now[BETA_1_POWER] *= beta_1
    now[BETA_2_POWER] *= beta_2
    _plain_sizes(now, rule, beta_1, beta_2, epsilon)


def _plain_sizes(now: list[float], rule: str, beta_1: float, beta_2: float, epsilon: float) -> None:
    """Change the sizes of the control as the kernel does."""
    rate, step, power_2 = now[LEARNING_RATE], now[STEP], now[BETA_2_POWER]
    now[STEP_SIZE] = rate / (1 - now[BETA_1_POWER])
    now[GRADIENT_SIZE], now[ROOT_SIZE], now[OFFSET] = 0.0, 1.0, epsilon
    if rule in ("lion", "rms-prop"):
        now[STEP_SIZE] = rate
    elif rule == "nadam":
        momentum, following = (
            beta_1 * (1 - 0.5 * 2.0 ** (each * LOG2_MOMENTUM_DECAY)) for each in (step, step + 1)
        )
        now[MOMENTUM_PRODUCT] *= momentum
        product = now[MOMENTUM_PRODUCT]
        now[GRADIENT_SIZE] = rate * (1 - momentum) / (1 - product)
        now[STEP_SIZE] = rate * following / (1 - product * following)
        now[ROOT_SIZE] = 1 / math.sqrt(1 - power_2)
    elif rule == "adabelief":
        longest = 2 / (1 - beta_2) - 1
        length = longest - 2 * step * power_2 / (1 - power_2)
        if length < 5:
            now[ROOT_SIZE], now[OFFSET] = 0.0, 1.0
            return
        shares = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
        now[STEP_SIZE] *= math.sqrt((1 - power_2) * shares)
    elif rule != "adamax":
        now[ROOT_SIZE] = 1 / math.sqrt(1 - power_2)


def new_control(device: torch.device | str, *, learning_rate: float, scale: float = 1.0) -> Tensor:
    """What changes from step to step, for a run that has not begun: float64 (17,).

    To be set: at LEARNING_RATE the rate of the next step.

    Counted: at STEP the steps so far that moved the weights, at BETA_1_POWER and BETA_2_POWER the
    betas to that power, at MOMENTUM_PRODUCT the product of NAdam's momenta. At SCALE what the loss
    was multiplied with, at GOOD_STEPS the finite steps since that has changed. At SKIPPED the steps
    that were not finite. At ACCUMULATED the gradients in the accumulators, at RECORDED the norms
    that autoclip has put into its history.

    Of the last step: at NORM that of the mean gradient, unscaled, before clipping; at FACTOR what
    its gradients were multiplied with; at MOVES 1 or 0. Of the rule, at STEP_SIZE what the mean
    (NAdam: and at GRADIENT_SIZE the gradient) is multiplied with; it is divided by the root of the
    square times ROOT_SIZE, plus OFFSET.

    Save it with the moments and a resumed run continues bit for bit.
    """
    now = [0.0] * NUM_CONTROLS
    now[LEARNING_RATE], now[SCALE] = learning_rate, scale
    now[BETA_1_POWER] = now[BETA_2_POWER] = now[MOMENTUM_PRODUCT] = 1.0
    return torch.tensor(now, dtype=torch.float64, device=device)


def new_history(device: torch.device | str, capacity: int) -> Tensor:
    """History without norms: float64 (C,), infinite where there is none, so those are sorted
    last."""
    return torch.full((capacity,), math.inf, dtype=torch.float64, device=device)


def in_order(history_c: Tensor, control: Tensor) -> Tensor:
    """The history with its newest norm last, and before the oldest what was never filled."""
    places_c = torch.arange(len(history_c), device=history_c.device)
    return history_c[(places_c + control[RECORDED].long()) % len(history_c)]


def load_history(history_c: Tensor, control: Tensor, saved: Tensor) -> None:
    """Take up the newest norms of a history that `in_order` gave, as many as there is room for."""
    norms = saved[torch.isfinite(saved)][-len(history_c) :]
    history_c.fill_(math.inf)
    history_c[: len(norms)] = norms.to(history_c)
    control[RECORDED] = len(norms)


def prepare(
    gradients: list[Tensor],
    gradient_row: Tensor,
    low_rank: LowRankGradients | None,
    tables: Tables,
    control: Tensor,
    rule: Rule,
    clipping: Clipping,
    history_c: Tensor | None,
    accumulation: int,
    dynamic_scale: bool,
) -> None:
    """Write into the control what the gradients make of the step: all before the update."""
    partials_n, tensors_tc = tables.partials_n, tables.tensors_tc
    if gradients:
        norm_op(
            gradients, tables.accumulators, partials_n, control, tensors_tc, gradient_row,
            tables.chunks_n3,
        )  # fmt: skip
    if tables.dense and low_rank:
        dense_norm_op(
            low_rank.inputs, low_rank.slopes, partials_n, tables.dense.layers_lc,
            tables.dense.spans_p3, low_rank.row_t,
        )  # fmt: skip
    sorted_c = None
    if history_c is not None:
        record_op(partials_n, control, history_c, accumulation)
        sorted_c = torch.sort(history_c).values
    control_op(
        partials_n, sorted_c, control, rule.name, rule.beta_1, rule.beta_2, rule.epsilon,
        clipping.kind, clipping.bound, accumulation, dynamic_scale,
    )  # fmt: skip
    if clipping.kind == "norm":
        factors_op(partials_n, control, tables.factors_t, tensors_tc, clipping.bound)
