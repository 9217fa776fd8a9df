"""Step of a rule: what the kernels of an update share, and the same in plain PyTorch.

The formula stands in `mien.kernels.optimize`. A kernel forms or reads a block of a gradient and
calls `update_block`; where the block lies, and of which tensor it is, is the kernel's affair.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .optimizer_rules import Rule
from .optimizer_scalars import Scalar
from .tensor_table import Column, tensor_at

# Triton reads no globals but constants.
_LEARNING_RATE = tl.constexpr(Scalar.LEARNING_RATE)
_GRADIENT_FACTOR = tl.constexpr(Scalar.GRADIENT_FACTOR)
_STEP_SIZE = tl.constexpr(Scalar.STEP_SIZE)
_GRADIENT_STEP_SIZE = tl.constexpr(Scalar.GRADIENT_STEP_SIZE)
_ROOT_FACTOR = tl.constexpr(Scalar.ROOT_FACTOR)
_ROOT_OFFSET = tl.constexpr(Scalar.ROOT_OFFSET)
_AVERAGE_SHARE = tl.constexpr(Scalar.AVERAGE_SHARE)
_PARAMETER, _LOW_PRECISION = tl.constexpr(Column.PARAMETER), tl.constexpr(Column.LOW_PRECISION)
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(Column.EXP_AVG), tl.constexpr(Column.EXP_AVG_SQ)
_MAX_EXP_AVG_SQ, _DECAYS = tl.constexpr(Column.MAX_EXP_AVG_SQ), tl.constexpr(Column.DECAYS)
_EMA = tl.constexpr(Column.EMA)

_PIECE = 2**19
"""Elements that plain operations move at once: 8 MiB with moments, which the last cache holds.
Chosen on a Zen 5: 2^16 of them take a quarter longer, all of a model at once up to a half."""


@triton.jit
def _rule(
    parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq,
    step_size, gradient_step_size, root_factor, root_offset, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """The formula of `optimize` for one block, in fp32; a moment that RULE has not comes back."""
    if RULE == "lion":
        ahead = beta_1 * exp_avg + rest_1 * gradient
        change = step_size * (tl.where(ahead > 0, 1.0, 0.0) - tl.where(ahead < 0, 1.0, 0.0))
        exp_avg = beta_2 * exp_avg + rest_2 * gradient
    elif RULE == "rms-prop":
        exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * gradient * gradient
        change = step_size * (gradient / (tl.sqrt(exp_avg_sq) + root_offset))
    elif RULE == "adamax":
        exp_avg = beta_1 * exp_avg + rest_1 * gradient
        max_exp_avg_sq = tl.maximum(beta_2 * max_exp_avg_sq, tl.abs(gradient) + epsilon)
        change = step_size * (exp_avg / max_exp_avg_sq)
    elif RULE == "adabelief":
        exp_avg = beta_1 * exp_avg + rest_1 * gradient
        surprise = gradient - exp_avg
        exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * surprise * surprise + epsilon
        change = step_size * (exp_avg / (tl.sqrt(exp_avg_sq) * root_factor + root_offset))
    else:
        exp_avg = beta_1 * exp_avg + rest_1 * gradient
        exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * gradient * gradient
        root = exp_avg_sq
        if AMSGRAD:
            max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq)
            root = max_exp_avg_sq
        moved = step_size * exp_avg
        if RULE == "nadam":
            change = (moved + gradient_step_size * gradient) / (
                tl.sqrt(root) * root_factor + root_offset
            )
        else:
            change = step_size * (exp_avg / (tl.sqrt(root) * root_factor + root_offset))
    return keep * parameter - change, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def _schedule_free(
    parameter, gradient, base, exp_avg_sq,
    step_size, root_factor, root_offset, average_share, decay,
    rest_1, beta_2, rest_2,
):  # fmt: skip
    """(parameter, base, exp_avg_sq) after the step of schedule-free, in fp32."""
    exp_avg_sq = beta_2 * exp_avg_sq + rest_2 * gradient * gradient
    change = gradient / (tl.sqrt(exp_avg_sq) * root_factor + root_offset) + decay * parameter
    change *= step_size
    base -= change
    # As one summand: a share of late steps is less than fp32 tells of the weight by itself.
    parameter += average_share * (base - parameter) - rest_1 * (1 - average_share) * change
    return parameter, base, exp_avg_sq


@triton.jit
def step_sizes_of(scalars_ptr):
    """What a weight is moved by: (GRADIENT_FACTOR, STEP_SIZE, GRADIENT_STEP_SIZE, ROOT_FACTOR,
    ROOT_OFFSET, AVERAGE_SHARE) of `Scalar`, in fp32."""
    # The powers and quotients behind these needed float64; the weights that they move are fp32.
    factor = tl.load(scalars_ptr + _GRADIENT_FACTOR).to(tl.float32)
    step_size = tl.load(scalars_ptr + _STEP_SIZE).to(tl.float32)
    gradient_step_size = tl.load(scalars_ptr + _GRADIENT_STEP_SIZE).to(tl.float32)
    root_factor = tl.load(scalars_ptr + _ROOT_FACTOR).to(tl.float32)
    root_offset = tl.load(scalars_ptr + _ROOT_OFFSET).to(tl.float32)
    average_share = tl.load(scalars_ptr + _AVERAGE_SHARE).to(tl.float32)
    return factor, step_size, gradient_step_size, root_factor, root_offset, average_share


@triton.jit
def decays_of(row, scalars_ptr, added_decay, decoupled_decay):
    """Decays of a tensor of the table: (what is added to its gradients, what is kept of it)."""
    decays = tl.load(row + _DECAYS)
    learning_rate = tl.load(scalars_ptr + _LEARNING_RATE)
    return added_decay * decays, (1 - learning_rate * decoupled_decay * decays).to(tl.float32)


@triton.jit
def state_of(row, start, low_precision_ptr):
    """Pointers (parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision) from an
    element of a tensor on; what the rule has not is never to be read."""
    FULL: tl.constexpr = tl.pointer_type(tl.float32)
    parameters = tensor_at(row + _PARAMETER, FULL) + start
    exp_avgs = tensor_at(row + _EXP_AVG, FULL) + start
    exp_avg_sqs = tensor_at(row + _EXP_AVG_SQ, FULL) + start
    max_exp_avg_sqs = tensor_at(row + _MAX_EXP_AVG_SQ, FULL) + start
    emas = tensor_at(row + _EMA, FULL) + start
    if low_precision_ptr is not None:
        low_precision = tensor_at(row + _LOW_PRECISION, low_precision_ptr.dtype) + start
    else:
        # Some pointer has to stand here; without such weights nothing is stored through it.
        low_precision = parameters
    return parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision


@triton.jit
def update_block(
    gradient,  # fp32, of the scaled loss
    parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, emas, low_precision, at, inside,
    factor, step_size, gradient_step_size, root_factor, root_offset, average_share,
    added_decay, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon, bound,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, IS_BOUNDED: tl.constexpr,
    HAS_EMA: tl.constexpr, HAS_LOW_PRECISION: tl.constexpr,
):  # fmt: skip
    """Move the elements at these places, of a block of any shape."""
    HAS_EXP_AVG: tl.constexpr = RULE != "rms-prop"
    HAS_EXP_AVG_SQ: tl.constexpr = RULE != "lion" and RULE != "adamax"
    HAS_MAX_EXP_AVG_SQ: tl.constexpr = RULE == "adamax" or AMSGRAD
    gradient *= factor
    if IS_BOUNDED:
        gradient = tl.minimum(tl.maximum(gradient, -bound), bound)
    parameter = tl.load(parameters + at, mask=inside, other=0.0)
    if RULE != "schedule-free":
        gradient += added_decay * parameter
    # Where the rule has not a moment, the gradient stands in: it is never stored.
    exp_avg, exp_avg_sq, max_exp_avg_sq = gradient, gradient, gradient
    if HAS_EXP_AVG:
        exp_avg = tl.load(exp_avgs + at, mask=inside, other=0.0)
    if HAS_EXP_AVG_SQ:
        exp_avg_sq = tl.load(exp_avg_sqs + at, mask=inside, other=0.0)
    if HAS_MAX_EXP_AVG_SQ:
        max_exp_avg_sq = tl.load(max_exp_avg_sqs + at, mask=inside, other=0.0)
    if RULE == "schedule-free":
        parameter, exp_avg, exp_avg_sq = _schedule_free(
            parameter, gradient, exp_avg, exp_avg_sq,
            step_size, root_factor, root_offset, average_share, added_decay,
            rest_1, beta_2, rest_2,
        )  # fmt: skip
    else:
        parameter, exp_avg, exp_avg_sq, max_exp_avg_sq = _rule(
            parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq,
            step_size, gradient_step_size, root_factor, root_offset, keep,
            beta_1, rest_1, beta_2, rest_2, epsilon, RULE, AMSGRAD,
        )  # fmt: skip
    tl.store(parameters + at, parameter, mask=inside)
    if HAS_EXP_AVG:
        tl.store(exp_avgs + at, exp_avg, mask=inside)
    if HAS_EXP_AVG_SQ:
        tl.store(exp_avg_sqs + at, exp_avg_sq, mask=inside)
    if HAS_MAX_EXP_AVG_SQ:
        tl.store(max_exp_avg_sqs + at, max_exp_avg_sq, mask=inside)
    if HAS_EMA:
        ema = tl.load(emas + at, mask=inside, other=0.0)
        tl.store(emas + at, ema + average_share * (parameter - ema), mask=inside)
    if HAS_LOW_PRECISION:
        tl.store(low_precision + at, parameter.to(low_precision.dtype.element_ty), mask=inside)


def numbers_of(rule: Rule) -> tuple[float, ...]:
    """Numbers that the kernels take of a rule: the betas, each with what 1 lacks of it, epsilon,
    the decay that is added (see `Rule.is_decoupled`) and the one that shrinks the weight."""
    added, decoupled = (0.0, rule.weight_decay) if rule.is_decoupled else (rule.weight_decay, 0.0)
    # 1 - beta is taken here, in float64: of a beta rounded to fp32 it would have lost digits.
    betas = rule.beta_1, 1 - rule.beta_1, rule.beta_2, 1 - rule.beta_2
    return (*betas, rule.epsilon, added, decoupled)


def plain_update(
    lists: list[list[Tensor]],
    low_precision: list[Tensor],
    scalars: Tensor,
    factors_t: Tensor | None,
    decays: Sequence[bool],
    rule: Rule,
    bound: float,
) -> None:
    """Move parameters by gradients, exp_avgs (with schedule-free bases), exp_avg_sqs,
    max_exp_avg_sqs, and the emas after them, as the kernels do.

    Args:
        lists: Parameters and moments, each on one axis, are written to; a kind that the rule lacks
            is empty.
        low_precision: Written to as well; none where the network computes in fp32.
        scalars: Scalars of the step.
        factors_t: Factor of each tensor where each is clipped by itself.
        decays: Whether the weight decay moves each.
        rule: How they are moved.
        bound: Bound of each number of a gradient; 0: none.
    """
    values = scalars.tolist()
    if not values[Scalar.IS_APPLIED]:
        return
    factor = values[Scalar.GRADIENT_FACTOR]
    num_tensors = len(lists[0])
    factors = [factor] * num_tensors if factor != 1 else []
    if factors_t is not None:
        factors = (factors_t * factor).tolist()
    kinds = [*lists, low_precision]
    # Each lies in memory as its parameter does.
    pairs = zip(lists[1], lists[0], strict=True)
    kinds[1] = [gradient.as_strided(parameter.shape, (1,)) for gradient, parameter in pairs]
    # A fused operation takes one decay for all its tensors, so those that are spared go apart.
    for is_decayed in (False, True):
        decay = rule.weight_decay if is_decayed else 0.0
        chosen = [
            i for i in range(num_tensors) if bool(decays[i] and rule.weight_decay) == is_decayed
        ]
        for piece in _pieces(kinds[0], chosen):
            own = [[kind[i][part] for i, part in piece] if kind else [] for kind in kinds]
            own_factors = [factors[i] for i, _ in piece] if factors else []
            own[1] = _plain_gradients(own[1], own_factors, bound)
            _plain_step(own, values, rule, decay)


def _pieces(parameters: list[Tensor], chosen: Iterable[int]) -> Iterator[list[tuple[int, slice]]]:
    """Runs of the chosen tensors (number, its elements), each of at least `_PIECE` elements or the
    last. An operation leaves what the next one takes in the cache."""
    piece: list[tuple[int, slice]] = []
    size = 0
    for number in chosen:
        for start in range(0, parameters[number].numel(), _PIECE):
            piece.append((number, slice(start, start + _PIECE)))
            size += min(_PIECE, parameters[number].numel() - start)
            if size >= _PIECE:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece


def _plain_gradients(gradients: list[Tensor], factors: list[float], bound: float) -> list[Tensor]:
    """Gradients in fp32, times their factors if any, within the bound; the caller's are not
    written."""
    if gradients[0].dtype != torch.float32:
        gradients = [each.float() for each in gradients]
    if factors:
        # Not as the fused kernel's grad_scale, which would write the scaled gradients back.
        gradients = [*torch._foreach_mul(gradients, factors)]
    if bound:
        # The first makes new tensors, so the second does not write to the caller's gradients.
        gradients = [*torch._foreach_clamp_min(gradients, -bound)]
        torch._foreach_clamp_max_(gradients, bound)
    return gradients


def _plain_step(
    lists: list[list[Tensor]], values: list[float], rule: Rule, weight_decay: float
) -> None:
    """Move pieces of parameters, and then what follows them: the average and the low precision."""
    *of_rule, emas, low_precision = lists
    _plain_rule(of_rule, values, rule, weight_decay)
    if rule.ema:
        torch._foreach_lerp_(emas, lists[0], values[Scalar.AVERAGE_SHARE])
    if low_precision:
        torch._foreach_copy_(low_precision, lists[0])


def _plain_rule(
    lists: list[list[Tensor]], values: list[float], rule: Rule, weight_decay: float
) -> None:
    parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
    if rule.name in ("adam", "adamw"):
        # One core, 50 M weights: 27 ms, as torch._foreach_ operations 160 ms.
        fused = torch._fused_adamw_ if rule.is_decoupled else torch._fused_adam_
        fused(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            # One tensor for all: the operation reads the step and does not count it.
            [torch.tensor(values[Scalar.STEP], dtype=torch.float32)] * len(parameters),
            lr=values[Scalar.LEARNING_RATE],
            beta1=rule.beta_1,
            beta2=rule.beta_2,
            weight_decay=weight_decay,
            eps=rule.epsilon,
            amsgrad=rule.has_max_exp_avg_sq,
            maximize=False,
        )
        return
    if rule.is_schedule_free:
        _plain_schedule_free(
            parameters, gradients, exp_avgs, exp_avg_sqs, values, rule, weight_decay
        )
        return
    if weight_decay and rule.is_decoupled:
        torch._foreach_mul_(parameters, 1 - values[Scalar.LEARNING_RATE] * weight_decay)
    elif weight_decay:
        gradients = [*torch._foreach_add(gradients, parameters, alpha=weight_decay)]
    if rule.name == "lion":
        changes = torch._foreach_lerp(exp_avgs, gradients, 1 - rule.beta_1)
        torch._foreach_sign_(changes)
        torch._foreach_lerp_(exp_avgs, gradients, 1 - rule.beta_2)
    elif rule.name == "rms-prop":
        _average_squares(exp_avg_sqs, gradients, rule.beta_2)
        changes = torch._foreach_div(gradients, _divisors(exp_avg_sqs, values))
    else:
        torch._foreach_lerp_(exp_avgs, gradients, 1 - rule.beta_1)
        if rule.name == "adamax":
            torch._foreach_mul_(max_exp_avg_sqs, rule.beta_2)
            sizes = torch._foreach_abs(gradients)
            torch._foreach_add_(sizes, rule.epsilon)
            torch._foreach_maximum_(max_exp_avg_sqs, sizes)
            changes = torch._foreach_div(exp_avgs, max_exp_avg_sqs)
        elif rule.name == "adabelief":
            _average_squares(exp_avg_sqs, [*torch._foreach_sub(gradients, exp_avgs)], rule.beta_2)
            torch._foreach_add_(exp_avg_sqs, rule.epsilon)
            changes = torch._foreach_div(exp_avgs, _divisors(exp_avg_sqs, values))
        else:
            _average_squares(exp_avg_sqs, gradients, rule.beta_2)
            divisors = _divisors(exp_avg_sqs, values)
            gradient_step_size = values[Scalar.GRADIENT_STEP_SIZE]
            torch._foreach_addcdiv_(parameters, gradients, divisors, -gradient_step_size)
            changes = torch._foreach_div(exp_avgs, divisors)
    torch._foreach_add_(parameters, changes, alpha=-values[Scalar.STEP_SIZE])


def _plain_schedule_free(
    parameters: list[Tensor],
    gradients: list[Tensor],
    bases: list[Tensor],
    exp_avg_sqs: list[Tensor],
    values: list[float],
    rule: Rule,
    weight_decay: float,
) -> None:
    _average_squares(exp_avg_sqs, gradients, rule.beta_2)
    changes = [*torch._foreach_div(gradients, _divisors(exp_avg_sqs, values))]
    if weight_decay:
        torch._foreach_add_(changes, parameters, alpha=weight_decay)
    torch._foreach_mul_(changes, values[Scalar.STEP_SIZE])
    torch._foreach_sub_(bases, changes)
    share = values[Scalar.AVERAGE_SHARE]
    moves = [*torch._foreach_sub(bases, parameters)]
    torch._foreach_mul_(moves, share)
    torch._foreach_sub_(moves, changes, alpha=(1 - rule.beta_1) * (1 - share))
    torch._foreach_add_(parameters, moves)


def _average_squares(exp_avg_sqs: list[Tensor], gradients: list[Tensor], beta_2: float) -> None:
    torch._foreach_mul_(exp_avg_sqs, beta_2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta_2)


def _divisors(exp_avg_sqs: list[Tensor], values: list[float]) -> list[Tensor]:
    """What exp_avgs are divided by; the scalars hold the rule's share."""
    roots = [*torch._foreach_sqrt(exp_avg_sqs)]
    torch._foreach_mul_(roots, values[Scalar.ROOT_FACTOR])
    torch._foreach_add_(roots, values[Scalar.ROOT_OFFSET])
    return roots
