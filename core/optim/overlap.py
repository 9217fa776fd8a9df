"""Weights moved while the backward pass still runs, each once nothing needs its old value.

The backward pass, done with a layer, keeps the tensor cores busy with the one before, while moving
the layer's weights is bound by memory: both at once may take less time than one after the other.
On a GPU the updates run on a stream of their own, forked from the backward pass and joined with it
at its end, so a CUDA graph holds all of it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..estimate.flops import Work
from ..precision import Precision
from .arrivals import Arrivals, grouped
from .optimizer import Update, clipping_of

PART = 4_000_000
"""Parameters of a part, at least: each takes three launches. The last part may be smaller, so that
little is left to do when the backward pass has ended."""


FLOPS_PER_BYTE = 184
"""Number of bf16 operations that a card computes in the time in which it copies a byte: 790 TFLOP/s
by 4.3 TB/s of an H200 (an H100 has 263, an RTX 4090 174). Measurements of others;
none by mien."""

LEAST_SHARE = 0.1
"""Share of a step that the update must take to run beside the backward pass: no more than that can
be hidden, and its launches cost some 10 microseconds. Unmeasured on a GPU."""


def pays(work: Work) -> bool:
    """Whether the update is a share of the step that is worth hiding, by the roofline.

    Products are taken at the peak, so the share is rather too large for slow ones.
    """
    update_bytes = work.update_bytes * work.num_parameters
    # In bytes throughout: operations count as the bytes that are copied in their time.
    return update_bytes >= LEAST_SHARE * (update_bytes + work.flops() / FLOPS_PER_BYTE)


def choose(
    config: OptimizerConfig, precision: Precision, *, is_worth: bool = False
) -> type[Update]:
    """The kind of update that `optimizer.overlap` leads to.

    Args:
        config: Settings of the optimizer.
        precision: Precision as it was resolved.
        is_worth: Whether auto leads to an overlapped update where nothing forbids it: on a GPU, by
            `pays`.

    Raises:
        ValueError: The precision or another setting of the optimizer does not allow it.
    """
    if config.overlap == "off" or (config.overlap == "auto" and not is_worth):
        return Update
    obstacle = _obstacle(config, precision)
    if obstacle is None:
        return OverlappedUpdate
    if config.overlap == "auto":
        return Update
    raise ValueError(f"optimizer.overlap is on, but {obstacle}, or set optimizer.overlap to off")


def _obstacle(config: OptimizerConfig, precision: Precision) -> str | None:
    """Reason that an update cannot run beside the backward pass, and what to change; None: it
    can."""
    needs_all = "which needs every gradient before the first update"
    if precision.scales_loss:
        return f"precision {precision.name} scales the loss, {needs_all}; use --precision bf16"
    if clipping_of(config).is_of_all:
        clipping = config.gradient_clipping
        return (
            f"optimizer.gradient_clipping {clipping} bounds the norm of all gradients, "
            f"{needs_all}; use value or norm"
        )
    if config.gradient_accumulation > 1:
        return (
            f"optimizer.gradient_accumulation is {config.gradient_accumulation}, so most backward "
            "passes have no update beside them; set it to 1"
        )
    return None


class OverlappedUpdate(Update):
    """An update that moves each part of the weights once the gradients of that part are there.

    The first step has one part, so nothing is moved before its last gradient; it shows in which
    order they come, and the parts are made in that order. So a CUDA graph needs one eager step
    before its capture.

    Weights have the same bits as without overlap where every gradient is finite. Each part is
    checked by itself: one whose gradient is not finite is left as it was, but others may move in
    that step. Of parts that have then moved a different number of times, the largest number is
    saved and holds for all after a resume.
    """

    is_whole = False

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, precision: Precision, ema: float = 0.0
    ):
        super().__init__(model, config, precision, ema)
        device = self.parameters[0].device
        # A CPU has no streams: there parts are moved between two layers, on the same cores.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_ordered = False
        numbers = [part.numbers for part in self.parts]
        self.arrivals = Arrivals(self.parameters, numbers, self._move_part, stream)

    def overlap_backward(self) -> AbstractContextManager[None]:
        """Update the weights during the backward pass inside; afterwards the current stream waits.

        The gradients must live as long as the context.
        """
        return self.arrivals.during_backward()

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move what the backward pass has not, by the gradients, one of each parameter."""
        order = self.arrivals.finish(gradients)
        # Once only: a captured graph replays the parts that it has seen.
        if order and not self.is_ordered:
            self._split(grouped(order, [each.numel() for each in self.master_weights], PART))
            self.arrivals.parts = [part.numbers for part in self.parts]
            self.is_ordered = True

    def _move_part(self, index: int, gradients: Sequence[Tensor]) -> None:
        self._move(self.parts[index], gradients)
