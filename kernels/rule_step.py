"""Step of a rule: what the kernels of an update share, and the same in plain PyTorch.

The formula stands in `mien.kernels.optimize`. A kernel forms or reads a block of a gradient and
calls `move_block`; where the block lies, and of which tensor it is, is the kernel's affair.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .control import (
    FACTOR,
    GRADIENT_SIZE,
    LEARNING_RATE,
    MOVES,
    OFFSET,
    ROOT_SIZE,
    STEP,
    STEP_SIZE,
)
from .rules import Rule
from .tables import COPY, DECAYS, LARGEST, MEAN, PARAMETER, SQUARE, tensor_at

# For the kernels, which take no other global names than Triton's constants.
_LEARNING_RATE, _FACTOR = tl.constexpr(LEARNING_RATE), tl.constexpr(FACTOR)
_STEP_SIZE, _GRADIENT_SIZE = tl.constexpr(STEP_SIZE), tl.constexpr(GRADIENT_SIZE)
_ROOT_SIZE, _OFFSET = tl.constexpr(ROOT_SIZE), tl.constexpr(OFFSET)
_PARAMETER, _COPY, _DECAYS = map(tl.constexpr, (PARAMETER, COPY, DECAYS))
_MEAN, _SQUARE, _LARGEST = map(tl.constexpr, (MEAN, SQUARE, LARGEST))


@triton.jit
def _rule(
    parameter, gradient, mean, square, largest,
    step_size, gradient_size, root_size, offset, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """The formula of `optimize` for one block, in fp32; a moment that RULE has not comes back."""
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
def sizes_of(control_ptr):
    """Sizes of the step (factor, step, gradient, root, offset): see `new_control`."""
    factor = tl.load(control_ptr + _FACTOR).to(tl.float32)
    step_size = tl.load(control_ptr + _STEP_SIZE).to(tl.float32)
    gradient_size = tl.load(control_ptr + _GRADIENT_SIZE).to(tl.float32)
    root_size = tl.load(control_ptr + _ROOT_SIZE).to(tl.float32)
    offset = tl.load(control_ptr + _OFFSET).to(tl.float32)
    return factor, step_size, gradient_size, root_size, offset


@triton.jit
def decays_of(row, control_ptr, added_decay, decoupled_decay):
    """Decays of a tensor of the table: (what is added to its gradients, what is kept of it)."""
    decays = tl.load(row + _DECAYS)
    learning_rate = tl.load(control_ptr + _LEARNING_RATE)
    return added_decay * decays, (1 - learning_rate * decoupled_decay * decays).to(tl.float32)


@triton.jit
def state_of(row, start, copy_ptr):
    """Pointers (parameters, means, squares, largests, copies) from an element of a tensor on; what
    the rule has not is never to be read."""
    FULL: tl.constexpr = tl.pointer_type(tl.float32)
    parameters = tensor_at(row + _PARAMETER, FULL) + start
    means = tensor_at(row + _MEAN, FULL) + start
    squares = tensor_at(row + _SQUARE, FULL) + start
    largests = tensor_at(row + _LARGEST, FULL) + start
    if copy_ptr is not None:
        copies = tensor_at(row + _COPY, copy_ptr.dtype) + start
    else:
        copies = parameters
    return parameters, means, squares, largests, copies


@triton.jit
def move_block(
    gradient,  # fp32, of the scaled loss
    parameters, means, squares, largests, copies, at, inside,
    factor, step_size, gradient_size, root_size, offset, added_decay, keep,
    beta_1, rest_1, beta_2, rest_2, epsilon, bound,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, IS_BOUNDED: tl.constexpr, IS_COPIED: tl.constexpr,
):  # fmt: skip
    """Move the elements at these places, of a block of any shape."""
    HAS_MEAN: tl.constexpr = RULE != "rms-prop"
    HAS_SQUARE: tl.constexpr = RULE != "lion" and RULE != "adamax"
    HAS_LARGEST: tl.constexpr = RULE == "adamax" or AMSGRAD
    gradient *= factor
    if IS_BOUNDED:
        gradient = tl.minimum(tl.maximum(gradient, -bound), bound)
    parameter = tl.load(parameters + at, mask=inside, other=0.0)
    gradient += added_decay * parameter
    mean, square, largest = gradient, gradient, gradient  # where the rule has none: never stored
    if HAS_MEAN:
        mean = tl.load(means + at, mask=inside, other=0.0)
    if HAS_SQUARE:
        square = tl.load(squares + at, mask=inside, other=0.0)
    if HAS_LARGEST:
        largest = tl.load(largests + at, mask=inside, other=0.0)
    parameter, mean, square, largest = _rule(
        parameter, gradient, mean, square, largest,
        step_size, gradient_size, root_size, offset, keep,
        beta_1, rest_1, beta_2, rest_2, epsilon, RULE, AMSGRAD,
    )  # fmt: skip
    tl.store(parameters + at, parameter, mask=inside)
    if HAS_MEAN:
        tl.store(means + at, mean, mask=inside)
    if HAS_SQUARE:
        tl.store(squares + at, square, mask=inside)
    if HAS_LARGEST:
        tl.store(largests + at, largest, mask=inside)
    if IS_COPIED:
        tl.store(copies + at, parameter.to(copies.dtype.element_ty), mask=inside)


def numbers_of(rule: Rule) -> tuple[float, ...]:
    """Numbers that the kernels take of a rule: the betas, each with what 1 lacks of it, epsilon,
    the decay that is added to the gradient and the one that shrinks the weight."""
    added, decoupled = (0.0, rule.weight_decay) if rule.is_decoupled else (rule.weight_decay, 0.0)
    betas = rule.beta_1, 1 - rule.beta_1, rule.beta_2, 1 - rule.beta_2
    return (*betas, rule.epsilon, added, decoupled)


def plain_update(
    lists: list[list[Tensor]],
    copies: list[Tensor],
    control: Tensor,
    factors_t: Tensor | None,
    decays: Sequence[bool],
    rule: Rule,
    bound: float,
) -> None:
    """Move lists of parameters, gradients, means, squares and largests as the kernels do.

    Args:
        lists: Parameters and moments are written to; a kind that the rule lacks is empty.
        copies: Written to as well; none where the network computes in fp32.
        control: Control of the step.
        factors_t: Factor of each tensor where each is clipped by itself.
        decays: Whether the weight decay moves each.
        rule: How they are moved.
        bound: Bound of each number of a gradient; 0: none.
    """
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
    for is_decayed in (False, True):
        chosen = [bool(decay and rule.weight_decay) == is_decayed for decay in decays]
        if any(chosen):
            own = [list(itertools.compress(tensors, chosen)) for tensors in lists]
            _plain_rule(own, now, rule, rule.weight_decay if is_decayed else 0.0)
    if copies:
        torch._foreach_copy_(copies, lists[0])


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
