"""The norms of past gradients, on the device: autoclip bounds the next one by a percentile of them.

The history is a ring; its sorted copy gives the percentile (`scalars_update`).

Letters: N chunks of gradients, C past norms.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import uses_triton
from .gradient_norm import BLOCK_SUM, WARPS, mean_norm, plain_mean_norm
from .optimizer_scalars import Scalar

# Triton reads no globals but constants.
_ACCUMULATED_GRADIENTS = tl.constexpr(Scalar.ACCUMULATED_GRADIENTS)
_RECORDED_NORMS = tl.constexpr(Scalar.RECORDED_NORMS)


# One form for any numbers of partial sums and past norms, among them 1 and multiples of 16, which
# Triton would each compile anew.
@triton.jit(do_not_specialize=["num_partials", "capacity"])
def _record_kernel(
    partials_ptr,  # [N] fp64
    scalars_ptr,   # fp64, see `Scalar`
    history_ptr,   # [C] fp64
    num_partials,
    capacity,
    ACCUMULATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm, _ = mean_norm(partials_ptr, scalars_ptr, num_partials, BLOCK)
    is_due = tl.load(scalars_ptr + _ACCUMULATED_GRADIENTS) + 1 >= ACCUMULATION
    place = tl.load(scalars_ptr + _RECORDED_NORMS).to(tl.int64) % capacity
    # Infinity marks a place without a norm, so none that is not finite may come in.
    tl.store(history_ptr + place, norm, mask=is_due & (norm < float("inf")))


@torch.library.custom_op("mien::optimize_record", mutates_args=("history_c",))
def record_op(partials_n: Tensor, scalars: Tensor, history_c: Tensor, accumulation: int) -> None:
    """The norm put into the history, if it is finite and the step due."""
    if not uses_triton(scalars):
        values = scalars.tolist()
        norm = plain_mean_norm(partials_n, values)
        is_due = values[Scalar.ACCUMULATED_GRADIENTS] + 1 >= accumulation
        if is_due and math.isfinite(norm):
            history_c[int(values[Scalar.RECORDED_NORMS]) % len(history_c)] = norm
        return
    with torch.cuda.device_of(scalars):
        _record_kernel[(1,)](
            partials_n, scalars, history_c, len(partials_n), len(history_c),
            ACCUMULATION=accumulation, BLOCK=BLOCK_SUM, num_warps=WARPS,
        )  # fmt: skip


@record_op.register_fake
def _(*inputs):
    return None


def new_history(device: torch.device | str, capacity: int) -> Tensor:
    """History without norms: float64 (C,), infinite where there is none, so those are sorted
    last."""
    return torch.full((capacity,), math.inf, dtype=torch.float64, device=device)


def in_order(history_c: Tensor, scalars: Tensor) -> Tensor:
    """The history with its newest norm last, and before the oldest what was never filled."""
    places_c = torch.arange(len(history_c), device=history_c.device)
    return history_c[(places_c + scalars[Scalar.RECORDED_NORMS].long()) % len(history_c)]


def load_history(history_c: Tensor, scalars: Tensor, saved: Tensor) -> None:
    """Take up the newest norms of a history that `in_order` gave, as many as there is room for."""
    # On the CPU, where a checkpoint is: how many there are is a number that the host needs.
    saved = saved.cpu()
    norms = saved[torch.isfinite(saved)][-len(history_c) :]
    history_c.fill_(math.inf)
    history_c[: len(norms)] = norms.to(history_c)
    # The ring goes on behind the newest, which now is the last of them.
    scalars[Scalar.RECORDED_NORMS] = len(norms)
