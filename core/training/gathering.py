"""What the ranks of a run bring together for a save: one rank writes it, for all."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..checkpoint.model_folder import SaveError
from ..distribute.group import Group
from .training_setup import StepSetup


def gather(setup: StepSetup, group: Group) -> None:
    """Make what the ranks hold the same, and have the first one see that it is.

    Running estimates of batch norms move by the faces of each rank. They are averaged here, which
    gives what averaging them at every step would have: each step is linear in the statistics.

    Raises:
        SaveError: The weights of a rank are not those of the first.
    """
    # Before the checksum, which takes in the running estimates, too.
    _average_running_stats(setup, group)
    setup.step.update.gather()
    sums = [0] * group.ranks.size
    sums[group.ranks.rank] = checksum(setup.model.state_dict().values())
    # The largest of each place, in which all other ranks have 0: a gather of numbers.
    sums = group.max(sums)
    differing = [rank for rank, each in enumerate(sums) if each != sums[0]]
    # The first one alone: it is the one that saves, and the others end as it says.
    if differing and group.ranks.is_first:
        raise SaveError(
            f"rank {differing[0]} has other weights than rank 0 at iteration "
            f"{setup.state.iterations}, so nothing of them is saved; look at that GPU's health "
            "(`nvidia-smi -q`), and start again to go on from the last save"
        )


@torch.no_grad()
def _average_running_stats(setup: StepSetup, group: Group) -> None:
    """Have the batch norms of all ranks hold the weighed mean of their estimates."""
    assert setup.step.shared is not None
    running = [
        estimate for norm in setup.step.norms for estimate in (norm.running_mean, norm.running_var)
    ]
    if not running:
        return
    total = torch.cat(running) * setup.step.shared.weight
    group.all_reduce(total)
    torch._foreach_copy_(running, total.split([estimate.numel() for estimate in running]))


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of 62 bits by which tensors are told from those of other bits, in this order."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # As integers, whose sum is the same in whatever order a GPU adds them.
    sums = [
        tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    # Each by a factor of its own, so that tensors cannot change places.
    # Odd ones: where a product wraps, no bit of a sum is lost.
    factors = torch.arange(1, 2 * len(sums), 2, device=sums[0].device)
    # Never negative: the largest is sought among it and the zeros of other ranks.
    return int((torch.stack(sums) * factors).sum()) & (2**62 - 1)
