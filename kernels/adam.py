"""Adam and AdamW in one pass over the weights, all tensors of a model in one launch.

    gradient = factor * gradient                      unscaled, clipped by its global norm
    parameter *= 1 - learning_rate * weight_decay     decoupled (AdamW)
    mean = beta_1 * mean + (1 - beta_1) * gradient
    square = beta_2 * square + (1 - beta_2) * gradient^2
    parameter -= learning_rate / (1 - beta_1^t) * mean / (sqrt(square / (1 - beta_2^t)) + epsilon)
    copy = parameter, rounded to the type that the network computes in

Kingma and Ba, 2015; Loshchilov and Hutter, 2019. A step is bound by memory: 28 bytes a parameter
with bf16 gradients and copies, against 72 in PyTorch's foreach kernels, and two bytes for the norm.

What changes from step to step lies in one small tensor on the device, the control, so nothing is
read by the host and a step can be captured in a CUDA graph. A step whose gradient is not finite
moves neither weights nor moments.

Letters: T tensors, N chunks of them.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import uses_triton
from .tables import Tables, is_capturing

(
    LEARNING_RATE,
    STEP,
    BETA_1_POWER,
    BETA_2_POWER,
    SCALE,
    GOOD_STEPS,
    SKIPPED,
    NORM,
    FACTOR,
    FINITE,
) = range(10)
"""Where the control holds what: see `new_control`."""

# The same for the kernels, which take no other global names than Triton's constants.
_LEARNING_RATE, _STEP, _BETA_1_POWER, _BETA_2_POWER, _SCALE = map(tl.constexpr, range(5))
_GOOD_STEPS, _SKIPPED, _NORM, _FACTOR, _FINITE = map(tl.constexpr, range(5, 10))

GROWTH_STEPS = 2000
"""Finite steps after which a dynamic loss scale doubles."""

LAUNCHES = {"mien::adam_control": 2, "mien::adam_update": 1}
"""Kernels that each operation launches on a GPU."""

_WARPS = 8
_BLOCK_NORM = 4096  # elements at a time; two 16-byte loads a thread of 16-bit gradients
_BLOCK_CONTROL = 4096
_BLOCK_UPDATE = 1024  # four elements a thread: 16 bytes of fp32, 8 of a 16-bit type
_ROW = 1024  # elements that plain PyTorch squares and adds at a time


@triton.jit
def _tensor(address, POINTER: tl.constexpr):
    """The pointer at an address of a table; `Tables` refuses those that are not aligned."""
    return tl.multiple_of(tl.load(address).to(POINTER), 16)


@triton.jit
def _norm_kernel(
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    partials_ptr,   # [N] fp32
    gradient_ptr,   # any gradient, for its type
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk = chunks_ptr + program * 3
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    gradients = _tensor(gradients_ptr + tl.load(chunk), gradient_ptr.dtype) + start

    # Whole groups of eight first: only a bound known as a multiple keeps the loads wide.
    whole = elements // 8 * 8
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, whole, BLOCK):
        inside = first + lanes < whole
        gradient = tl.load(gradients + first + lanes, mask=inside, other=0.0).to(tl.float32)
        squares += gradient * gradient
    last = whole + tl.arange(0, 8)
    gradient = tl.load(gradients + last, mask=last < elements, other=0.0).to(tl.float32)
    total = tl.sum(squares, axis=0) + tl.sum(gradient * gradient, axis=0)
    tl.store(partials_ptr + program, total)


@triton.jit
def _control_kernel(
    partials_ptr,  # [N] fp32
    control_ptr,   # [10] fp64
    num_partials,
    BETA_1: tl.constexpr,  # compile-time, because Triton passes numbers as fp32: too coarse here
    BETA_2: tl.constexpr,
    MAX_NORM: tl.constexpr,
    DYNAMIC_SCALE: tl.constexpr,
    GROWTH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_partials, BLOCK):
        inside = first + lanes < num_partials
        squares += tl.load(partials_ptr + first + lanes, mask=inside, other=0.0).to(tl.float64)

    scale = tl.load(control_ptr + _SCALE)
    norm = tl.sqrt(tl.sum(squares, axis=0)) / scale
    finite = norm < float("inf")  # false for NaN
    factor = 1.0 / scale
    if MAX_NORM > 0:
        factor *= tl.minimum(MAX_NORM / (norm + 1e-6), 1.0)
    tl.store(control_ptr + _NORM, norm)
    tl.store(control_ptr + _FINITE, tl.where(finite, 1.0, 0.0))
    tl.store(control_ptr + _FACTOR, tl.where(finite, factor, 0.0))

    step = tl.load(control_ptr + _STEP)
    skipped = tl.load(control_ptr + _SKIPPED)
    power_1 = tl.load(control_ptr + _BETA_1_POWER)
    power_2 = tl.load(control_ptr + _BETA_2_POWER)
    tl.store(control_ptr + _STEP, tl.where(finite, step + 1, step))
    tl.store(control_ptr + _SKIPPED, tl.where(finite, skipped, skipped + 1))
    tl.store(control_ptr + _BETA_1_POWER, tl.where(finite, power_1 * BETA_1, power_1))
    tl.store(control_ptr + _BETA_2_POWER, tl.where(finite, power_2 * BETA_2, power_2))

    if DYNAMIC_SCALE:
        good = tl.where(finite, tl.load(control_ptr + _GOOD_STEPS) + 1, 0.0)
        grown = good >= GROWTH_STEPS
        change = tl.where(finite, tl.where(grown, 2.0, 1.0), 0.5)
        tl.store(control_ptr + _SCALE, scale * change)
        tl.store(control_ptr + _GOOD_STEPS, tl.where(grown, 0.0, good))


@triton.jit
def _rule(
    parameter, gradient, mean, square,
    step_size, root_correction, keep, beta_1, rest_1, beta_2, rest_2, epsilon,
):  # fmt: skip
    """The formula of this module for one block, in fp32."""
    mean = beta_1 * mean + rest_1 * gradient
    square = beta_2 * square + rest_2 * gradient * gradient
    change = mean / (tl.sqrt(square) * root_correction + epsilon)
    return keep * parameter - step_size * change, mean, square


@triton.jit
def _span(
    parameters, gradients, means, squares, copies, first, end,
    factor, step_size, root_correction, keep, beta_1, rest_1, beta_2, rest_2, epsilon,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the elements from ``first`` to ``end``, at most BLOCK of them."""
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32) * factor
    parameter = tl.load(parameters + at, mask=inside, other=0.0)
    mean = tl.load(means + at, mask=inside, other=0.0)
    square = tl.load(squares + at, mask=inside, other=0.0)
    parameter, mean, square = _rule(
        parameter, gradient, mean, square,
        step_size, root_correction, keep, beta_1, rest_1, beta_2, rest_2, epsilon,
    )  # fmt: skip
    tl.store(parameters + at, parameter, mask=inside)
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)
    if copies is not None:
        tl.store(copies + at, parameter.to(copies.dtype.element_ty), mask=inside)


@triton.jit
def _update_kernel(
    addresses_ptr,  # [T, 5] int64: parameter, mean, square, copy; whether the parameter decays
    gradients_ptr,  # [T] int64 addresses
    chunks_ptr,     # [N, 3] int64: tensor, first element, elements
    control_ptr,    # [10] fp64
    gradient_ptr,   # any gradient, for its type
    copy_ptr,       # any copy, for its type; None: there are no copies
    beta_1, rest_1, beta_2, rest_2, epsilon, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control_ptr + _FINITE) == 0:
        return
    learning_rate = tl.load(control_ptr + _LEARNING_RATE)
    correction_1 = (1 - tl.load(control_ptr + _BETA_1_POWER)).to(tl.float32)
    correction_2 = (1 - tl.load(control_ptr + _BETA_2_POWER)).to(tl.float32)
    step_size = tl.div_rn(learning_rate.to(tl.float32), correction_1)
    root_correction = tl.div_rn(1.0, tl.sqrt_rn(correction_2))
    factor = tl.load(control_ptr + _FACTOR).to(tl.float32)

    # Backwards, so that the gradients which the norm has read last are still in the cache.
    chunk = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    tensor = tl.load(chunk)
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    elements = tl.load(chunk + 2)
    address = addresses_ptr + tensor * 5
    parameters = _tensor(address, tl.pointer_type(tl.float32)) + start
    means = _tensor(address + 1, tl.pointer_type(tl.float32)) + start
    squares = _tensor(address + 2, tl.pointer_type(tl.float32)) + start
    copies = None
    if copy_ptr is not None:
        copies = _tensor(address + 3, copy_ptr.dtype) + start
    gradients = _tensor(gradients_ptr + tensor, gradient_ptr.dtype) + start
    decays = tl.load(address + 4)
    keep = (1 - learning_rate * weight_decay * decays).to(tl.float32)

    # Whole groups of eight first: only a bound known as a multiple keeps the accesses wide.
    whole = elements // 8 * 8
    for first in range(0, whole, BLOCK):
        _span(
            parameters, gradients, means, squares, copies, first, whole,
            factor, step_size, root_correction, keep, beta_1, rest_1, beta_2, rest_2, epsilon,
            BLOCK,
        )  # fmt: skip
    if whole < elements:
        _span(
            parameters, gradients, means, squares, copies, whole, elements,
            factor, step_size, root_correction, keep, beta_1, rest_1, beta_2, rest_2, epsilon,
            8,
        )  # fmt: skip


@torch.library.custom_op("mien::adam_control", mutates_args=("control",))
def _control_op(
    gradients: Sequence[Tensor],
    control: Tensor,
    gradient_row: Tensor,
    chunks: Tensor,
    beta_1: float,
    beta_2: float,
    max_norm: float,
    dynamic_scale: bool,
) -> None:
    if not uses_triton(control):
        _plain_control(gradients, control, beta_1, beta_2, max_norm, dynamic_scale)
        return
    partials_n = torch.empty(len(chunks), dtype=torch.float32, device=control.device)
    with torch.cuda.device_of(control):
        _norm_kernel[(len(chunks),)](
            gradient_row, chunks, partials_n, gradients[0], BLOCK=_BLOCK_NORM, num_warps=_WARPS
        )
        _control_kernel[(1,)](
            partials_n, control, len(chunks),
            BETA_1=beta_1, BETA_2=beta_2, MAX_NORM=max_norm, DYNAMIC_SCALE=dynamic_scale,
            GROWTH_STEPS=GROWTH_STEPS, BLOCK=_BLOCK_CONTROL, num_warps=_WARPS,
        )  # fmt: skip


@torch.library.custom_op(
    "mien::adam_update", mutates_args=("parameters", "means", "squares", "copies")
)
def _update_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    control: Tensor,
    addresses: Tensor,
    gradient_row: Tensor,
    chunks: Tensor,
    decays: Sequence[bool],
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    if not uses_triton(control):
        _plain_update(
            parameters, gradients, means, squares, copies, control, decays,
            beta_1, beta_2, epsilon, weight_decay,
        )  # fmt: skip
        return
    with torch.cuda.device_of(control):
        _update_kernel[(len(chunks),)](
            addresses, gradient_row, chunks, control,
            gradients[0], copies[0] if copies else None,
            beta_1, 1 - beta_1, beta_2, 1 - beta_2, epsilon, weight_decay,
            BLOCK=_BLOCK_UPDATE, num_warps=_WARPS,
        )  # fmt: skip


@_control_op.register_fake
@_update_op.register_fake
def _(*inputs):
    return None


def _plain_control(
    gradients: Sequence[Tensor],
    control: Tensor,
    beta_1: float,
    beta_2: float,
    max_norm: float,
    dynamic_scale: bool,
) -> None:
    now = control.tolist()
    now[NORM] = math.sqrt(_sum_of_squares(gradients)) / now[SCALE]
    finite = math.isfinite(now[NORM])
    now[FINITE] = float(finite)
    now[FACTOR] = 0.0
    if finite:
        limit = max_norm / (now[NORM] + 1e-6) if max_norm else 1.0
        now[FACTOR] = min(limit, 1.0) / now[SCALE]
        now[STEP] += 1
        now[BETA_1_POWER] *= beta_1
        now[BETA_2_POWER] *= beta_2
    else:
        now[SKIPPED] += 1
    if dynamic_scale:
        good = now[GOOD_STEPS] + 1 if finite else 0.0
        grown = good >= GROWTH_STEPS
        now[SCALE] *= (2.0 if grown else 1.0) if finite else 0.5
        now[GOOD_STEPS] = 0.0 if grown else good
    control.copy_(torch.tensor(now, dtype=torch.float64))


def _sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """In rows: PyTorch's norm of 16 M fp32 numbers at once is wrong by 1e-3."""
    flats = [each.as_strided((each.numel(),), (1,)).float() for each in tensors]
    ends = [each.numel() // _ROW * _ROW for each in flats]
    rests = [each[end:] for each, end in zip(flats, ends, strict=True)]
    rows = [each[:end].view(-1, _ROW) for each, end in zip(flats, ends, strict=True) if end]
    norms = [torch.linalg.vector_norm(each, dim=1) for each in rows]
    norms.append(torch.stack(torch._foreach_norm(rests)))
    return float(torch.cat(norms).double().square().sum())


def _plain_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    control: Tensor,
    decays: Sequence[bool],
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    now = control.tolist()
    if not now[FINITE]:
        return
    gradients = [each.float() for each in gradients]
    if now[FACTOR] != 1:
        # Not as the fused kernel's grad_scale, which would write the scaled gradients back.
        gradients = torch._foreach_mul(gradients, now[FACTOR])
    step = torch.tensor(now[STEP], dtype=torch.float32)
    for decayed in (False, True):
        chosen = [decay == decayed for decay in decays]
        if not any(chosen):
            continue
        own, by, first, second = (
            list(itertools.compress(tensors, chosen))
            for tensors in (parameters, gradients, means, squares)
        )
        # One core, 50 M weights: 27 ms, as torch._foreach_ operations 160 ms.
        torch._fused_adamw_(
            own,
            by,
            first,
            second,
            [],
            [step] * len(own),
            lr=now[LEARNING_RATE],
            beta1=beta_1,
            beta2=beta_2,
            weight_decay=weight_decay if decayed else 0.0,
            eps=epsilon,
            amsgrad=False,
            maximize=False,
        )
    if copies:
        torch._foreach_copy_(list(copies), list(parameters))


def new_control(device: torch.device | str, *, learning_rate: float, scale: float = 1.0) -> Tensor:
    """What changes from step to step, for a run that has not begun: float64 (10,).

    At LEARNING_RATE the rate of the next step. At STEP the finite steps so far, at BETA_1_POWER
    and BETA_2_POWER the betas to that power. At SCALE what the loss was multiplied with, at
    GOOD_STEPS the finite steps since that has changed. At SKIPPED the steps that were not finite.
    Of the last step: at NORM that of the unscaled gradient before clipping, at FACTOR what its
    gradients were multiplied with, at FINITE 1 or 0.

    Save it with the moments and a resumed run continues bit for bit.
    """
    now = [0.0] * 10
    now[LEARNING_RATE], now[SCALE] = learning_rate, scale
    now[BETA_1_POWER] = now[BETA_2_POWER] = 1.0
    return torch.tensor(now, dtype=torch.float64, device=device)


@torch.no_grad()
def prepare(
    gradients: Sequence[Tensor],
    control: Tensor,
    tables: Tables,
    *,
    beta_1: float,
    beta_2: float,
    max_norm: float = 0.0,
    dynamic_scale: bool = False,
) -> None:
    """Write into ``control`` what the gradients make of the step: the first half of `adam`."""
    _check_settings(control, tables, beta_1, beta_2, max_norm=max_norm)
    _prepare(tables.fitted(gradients), control, tables, beta_1, beta_2, max_norm, dynamic_scale)


@torch.no_grad()
def update(
    gradients: Sequence[Tensor],
    control: Tensor,
    tables: Tables,
    *,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float = 0.0,
) -> None:
    """Move what ``tables`` hold by one step that was prepared: the second half of `adam`."""
    _check_settings(control, tables, beta_1, beta_2, epsilon=epsilon, weight_decay=weight_decay)
    tables.check_unmoved()
    _update(tables.fitted(gradients), control, tables, beta_1, beta_2, epsilon, weight_decay)


@torch.no_grad()
def adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    control: Tensor,
    *,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    dynamic_scale: bool = False,
    tables: Tables | None = None,
) -> None:
    """Move the parameters, their moments and their copies by one step, in place.

    A step whose gradient is not finite changes of the control alone SKIPPED, NORM, FACTOR and
    FINITE and, with ``dynamic_scale``, SCALE and GOOD_STEPS; nothing else.

    Args:
        parameters: fp32, contiguous or channels_last.
        gradients: Of the scaled loss; fp32, bf16 or fp16, all of one type. One in another layout
            than its parameter's is copied into that first.
        means: First moments, fp32, laid out as the parameters; zeros at the start.
        squares: Second moments, likewise.
        copies: The weights that the network computes with, bf16 or fp16, laid out as the
            parameters; none where it computes in fp32.
        control: From `new_control`.
        beta_1: Decay of the first moments, 0 to below 1.
        beta_2: Decay of the second moments, 0 to below 1.
        epsilon: Added to the root of the second moments.
        weight_decay: Decoupled (AdamW), of the parameters that ``tables.decays`` says.
        max_norm: Clip gradients to this global norm; 0: do not clip.
        dynamic_scale: Halve the loss scale after a step that is not finite, double it after
            2,000 that are.
        tables: Made once for these tensors. Without, they are made anew in each call, which is
            slow, and impossible while a CUDA graph is captured.

    Raises:
        ValueError: On tensors that do not fit or a setting out of its range.
    """
    if tables is None:
        if is_capturing(control.device):
            raise ValueError("adam needs tables in a CUDA graph: make Tables before the capture")
        tables = Tables(parameters, means, squares, copies)
    tables.check_holds(parameters=parameters, means=means, squares=squares, copies=copies)
    tables.check_unmoved()
    _check_settings(
        control,
        tables,
        beta_1,
        beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        max_norm=max_norm,
    )
    fitted = tables.fitted(gradients)
    _prepare(fitted, control, tables, beta_1, beta_2, max_norm, dynamic_scale)
    _update(fitted, control, tables, beta_1, beta_2, epsilon, weight_decay)


def _prepare(
    gradients: list[Tensor],
    control: Tensor,
    tables: Tables,
    beta_1: float,
    beta_2: float,
    max_norm: float,
    dynamic_scale: bool,
) -> None:
    row_t = tables.gradient_row(gradients, again=False)
    _control_op(
        gradients, control, row_t, tables.chunks_n3, beta_1, beta_2, max_norm, dynamic_scale
    )


def _update(
    gradients: list[Tensor],
    control: Tensor,
    tables: Tables,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    row_t = tables.gradient_row(gradients, again=True)
    _update_op(
        tables.parameters, gradients, tables.means, tables.squares, tables.copies, control,
        tables.addresses_t5, row_t, tables.chunks_n3, tables.decays,
        beta_1, beta_2, epsilon, weight_decay,
    )  # fmt: skip


def _check_settings(
    control: Tensor, tables: Tables, beta_1: float, beta_2: float, **not_negative: float
) -> None:
    device = tables.parameters[0].device
    if control.dtype != torch.float64 or control.shape != (10,) or control.device != device:
        raise ValueError(
            f"control must be float64 (10,) on {device}, got {control.dtype} "
            f"{tuple(control.shape)} on {control.device}: use new_control"
        )
    for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be 0 to below 1, got {beta}")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number from 0 on, got {value}")
