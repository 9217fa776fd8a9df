"""Weights moved while the backward pass still runs, each once nothing needs its old value.

The backward pass, done with a layer, keeps the tensor cores busy with the one before, while moving
the layer's weights is bound by memory: both at once may take less time than one after the other.
On a GPU the updates run on a stream of their own, forked from the backward pass and joined with it
at its end, so a CUDA graph holds all of it.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..estimate.flops import UPDATE_BYTES, Work
from ..precision import Precision
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
    update_bytes = UPDATE_BYTES * work.num_parameters
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

    def __init__(self, model: nn.Module, config: OptimizerConfig, precision: Precision):
        super().__init__(model, config, precision)
        device = self.parameters[0].device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_ordered = False
        self.arrived: dict[int, Tensor] = {}
        """Gradients by the number of their parameter, in the order in which they came."""

        self.came_on: list[set[torch.cuda.Stream]] = []
        """Streams on which the gradients of each part came; none without a GPU."""

        self.moved: set[int] = set()
        """Parts that the backward pass has moved and `__call__` is not to move again."""

    @contextmanager
    def overlap_backward(self) -> Iterator[None]:
        """Update the weights during the backward pass inside; afterwards the current stream waits.

        The gradients must live as long as the context.
        """
        self.arrived, self.moved = {}, set()
        self.came_on = [set() for _ in self.parts]
        part_of = {n: i for i, part in enumerate(self.parts) for n in part.numbers}
        # For this backward pass alone: the hooks of another must move nothing.
        handles = [
            parameter.register_hook(partial(self._take, number, part_of[number]))
            for number, parameter in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        # The next forward pass reads the weights on the current stream.
        if self.stream and self.moved:
            torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move what the backward pass has not, by the gradients, one of each parameter."""
        for index, part in enumerate(self.parts):
            if index not in self.moved:
                self._move(part, [gradients[number] for number in part.numbers])
        order = list(self.arrived)
        self.arrived, self.moved = {}, set()
        # Once only: a captured graph replays the parts that it has seen.
        if order and not self.is_ordered:
            self._split(self._grouped(order))
            self.is_ordered = True

    def _take(self, number: int, index: int, gradient: Tensor) -> None:
        """Note the gradient of one parameter; move its part if that was the last one missing.

        A hook of the parameter. Autograd calls it with the sum over all uses, on the stream where
        that is ready, when every operation that used the parameter has queued its own gradients.
        So nothing queued later reads the old value, or autograd would refuse to go on.
        """
        self.arrived[number] = gradient
        part = self.parts[index]
        if self.stream:
            self.came_on[index].add(torch.cuda.current_stream())
        if not all(each in self.arrived for each in part.numbers):
            return
        if self.stream:
            # A gradient is ready on the stream that computed it; with two decoders there are two.
            for stream in self.came_on[index]:
                self.stream.wait_stream(stream)
        with torch.cuda.stream(self.stream):  # None: does nothing
            self._move(part, [self.arrived[each] for each in part.numbers])
        self.moved.add(index)

    def _grouped(self, order: list[int]) -> list[list[int]]:
        """Numbers of parameters in this order, some `PART` elements in each group."""
        ends = itertools.accumulate(self.master_weights[number].numel() for number in order)
        groups: list[list[int]] = [[]]
        begun_at = 0
        for number, end in zip(order, ends, strict=True):
            groups[-1].append(number)
            if end - begun_at >= PART:
                begun_at = end
                groups.append([])
        return [group for group in groups if group]
