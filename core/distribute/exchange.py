"""Gradients summed over the ranks of a run, in parts, while the backward pass goes on.

Each rank's gradients are copied into one flat buffer, whose parts are summed as they lie. All ranks
then hold the same bits, so each of them checks, clips and moves its weights alike.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..optim.arrivals import Arrivals
from .group import Group
from .layout import Layout, new_flat


class Exchange:
    """Sums of gradients over the ranks.

    The sums lie at the same addresses at every step. A rank that weighs its loss by its share of
    the run's batch gets the gradient of the mean over that batch.

    Args:
        group: Ranks of the run.
        parameters: Parameters that the gradients are of.
        order: Numbers of them in the order in which their gradients come; the same on all ranks.
        wire: Type in which gradients are sent and summed.
    """

    def __init__(
        self, group: Group, parameters: Sequence[Tensor], order: Sequence[int], wire: torch.dtype
    ):
        device = parameters[0].device
        self.group = group
        self.layout = Layout(
            parameters, order, num_ranks=group.ranks.size, element_bytes=wire.itemsize
        )
        flat = new_flat(self.layout, wire, device)
        self.sums, self.parts = self.layout.views(flat), self.layout.parts_of(flat)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrivals = Arrivals(parameters, self.layout.parts, self._sum, stream)

    def during_backward(self) -> AbstractContextManager[None]:
        """Send parts during the backward pass inside, each when all its gradients are there.

        The gradients must live as long as the context.
        """
        return self.arrivals.during_backward()

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients summed over the ranks, in the order of the parameters."""
        self.arrivals.finish(gradients)
        return self.sums

    def total(self, row_v: Tensor) -> Tensor:
        """A row of few numbers summed over the ranks: the losses, weighed by each rank's share."""
        total_v = row_v.clone()
        self.group.all_reduce(total_v)
        return total_v

    def _sum(self, index: int, gradients: list[Tensor]) -> None:
        torch._foreach_copy_([self.sums[number] for number in self.layout.parts[index]], gradients)
        self.group.all_reduce(self.parts[index])
