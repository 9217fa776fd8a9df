"""Gradients summed over the ranks of a run, in parts, while the backward pass goes on.

Each rank's gradients are copied into one flat buffer, whose parts are summed as they lie. With
gradient accumulation they are added up there, in fp32, and only their sum is sent.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..optim.arrivals import Arrivals
from .layout import Layout


class Exchange:
    """Sums of gradients over the ranks.

    The sums lie at the same addresses at every step. A rank that weighs its loss by its share of
    the run's batch gets the gradient of the mean over that batch.

    Args:
        parameters: Parameters that the gradients are of.
        layout: Places of the gradients, the same on all ranks; their parts are sent one by one.
        wire: Type in which gradients are added up and sent.
        send: Called with a part of the buffer that is complete; sums it over the ranks.
        then: Called with the number of a part that was sent.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layout: Layout,
        wire: torch.dtype,
        send: Callable[[Tensor], None],
        then: Callable[[int], None],
    ):
        device = parameters[0].device
        self.layout, self.send, self.then = layout, send, then
        # Made once: a CUDA graph replays the addresses that it was captured with.
        self.flat = layout.new_flat(wire, device)
        self.sums, self.parts = layout.views(self.flat), layout.parts_of(self.flat)
        self.is_first, self.is_due = True, True
        """Whether the next gradients begin a sum, and whether they complete it."""

        # A stream of its own, on which sums run while the backward pass goes on.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrivals = Arrivals(parameters, layout.parts, self._handle, stream)

    def during_backward(self) -> AbstractContextManager[None]:
        """Add up and send parts during the backward pass inside, each when its gradients are there.

        The gradients must live as long as the context.
        """
        return self.arrivals.during_backward()

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Add up and send the parts that the backward pass has not."""
        self.arrivals.finish(gradients)

    def _handle(self, index: int, gradients: list[Tensor]) -> None:
        # Into a buffer: autograd goes on with a gradient that a hook is given.
        sums = [self.sums[number] for number in self.layout.parts[index]]
        if self.is_first:
            # A copy and no fill before an addition: one launch less, and no stale numbers.
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)
        if self.is_due:
            # Only where the sum is whole: between, nothing of an accumulation leaves the rank.
            self.send(self.parts[index])
            self.then(index)
