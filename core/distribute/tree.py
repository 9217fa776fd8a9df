"""A sum of gradients whose order hangs on their number alone, not on who has computed them.

    sum(first, count) = sum(first, count // 2) + sum(first + count // 2, count - count // 2)

in fp32. Where 2, 4 or 8 ranks divide the summands evenly, each rank's are a whole subtree; so ranks
exchange sums in pairs, and all come to the bits to which one rank comes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .group import Group
from .layout import Layout


class TreeSum:
    """Sums of gradients, and of a row of numbers with them, over summands and ranks.

    Args:
        parameters: Parameters that the gradients are of.
        num_values: Numbers of a row.
        num_summands: Summands of this rank.
        group: Ranks that sum together, 2, 4, 8 ..; None: this process alone.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        num_values: int,
        num_summands: int,
        group: Group | None = None,
    ):
        self.group, self.num_summands = group, num_summands
        device = parameters[0].device
        # Only its places are used: nothing is sent before all is summed.
        layout = Layout(parameters, range(len(parameters)), num_ranks=1, element_bytes=4)
        # One for every level of the tree, and the one that comes from another rank.
        num_flats = max((num_summands - 1).bit_length() + 1, 2)
        self.flats = [
            torch.zeros(layout.length + num_values, device=device) for _ in range(num_flats)
        ]
        self.views = [layout.views(flat) for flat in self.flats]
        self.rows = [flat[layout.length :] for flat in self.flats]

    @property
    def sums(self) -> list[Tensor]:
        """Summed gradients, at the same addresses after every call."""
        return self.views[0]

    @property
    def row_v(self) -> Tensor:
        """The summed row."""
        return self.rows[0]

    def __call__(self, summand: Callable[[int], tuple[Sequence[Tensor], Tensor]]) -> None:
        """Sum over all summands of all ranks.

        Args:
            summand: Gives the gradients and the row of each of this rank's summands, from 0.
        """
        self._sum(summand, 0, self.num_summands, 0)
        if self.group is None:
            return
        # The second one is free by now: all summands of this rank are in the first.
        own, other = self.flats[:2]
        distance = 1
        while distance < self.group.ranks.size:
            # Both of a pair add the same two sums, which is the same in either order.
            # The rank whose number differs in this bit: so pairs are those of the tree.
            self.group.swap(own, other, self.group.ranks.rank ^ distance)
            own.add_(other)
            distance *= 2

    def _sum(
        self,
        summand: Callable[[int], tuple[Sequence[Tensor], Tensor]],
        first: int,
        count: int,
        level: int,
    ) -> None:
        """Write the sum of ``count`` summands into the buffer of a level."""
        if count == 1:
            gradients, row_v = summand(first)
            # Copied out of the memory of autograd, which the next summand takes again.
            torch._foreach_copy_(self.views[level], list(gradients))
            self.rows[level].copy_(row_v)
            return
        half = count // 2
        self._sum(summand, first, half, level)
        # One level deeper, since this level's buffer holds the first half meanwhile.
        self._sum(summand, first + half, count - half, level + 1)
        self.flats[level].add_(self.flats[level + 1])
