"""Updates of one model on several ranks, by the gradients of all of them.

All ranks come to the same sums, bit for bit, so each of them checks, clips and moves its weights
alike, and nothing has to be agreed on: where one rank's gradient is not finite, no rank moves.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...kernels.optimizer_rules import Rule
from ...kernels.optimizer_scalars import Scalar
from ..config import OptimizerConfig
from ..data.store import available_host_bytes
from ..optim import placement
from ..optim.optimizer import Update, rule_of
from ..precision import Precision
from .exchange import Exchange
from .group import Group
from .layout import Layout


class MirroredUpdate(Update):
    """An update of which each rank holds, and moves, all weights; every rank calls it alike.

    Gradients that no update is due for stay on their rank, which adds them up. By the summed
    gradients the weights are those of `Update`; with ``overlaps`` each part of the buffer is moved
    by itself, as those of `OverlappedUpdate` are.

    Args:
        model: Model on its device, with the same weights on all ranks.
        config: Settings of the optimizer.
        precision: Precision as it was resolved.
        ema: Decay of the average of the weights; 0: none is kept.
        group: Ranks of the run.
        order: Numbers of the trained parameters in the order in which their gradients come.
        overlaps: Whether each part is moved once it was summed, during the backward pass.
    """

    adds_up = False

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
        ema: float = 0.0,
        *,
        group: Group,
        order: Sequence[int],
        overlaps: bool = False,
    ):
        self.group, self.order = group, order
        self.wire = precision.compute
        """Type in which gradients are sent."""

        if config.reduce == "fp32" or config.gradient_accumulation > 1:
            # An accumulation adds up here, and 16 bits would lose the small ones of many.
            self.wire = torch.float32
        self.overlaps, self.is_whole = overlaps, not overlaps
        device = next(model.parameters()).device
        self.is_beside = overlaps or device.type == "cuda"
        """Whether gradients are sent during the backward pass. A CPU sums on the cores that
        compute, so there it only has the ranks wait for one another part by part: two ranks of
        `lightweight` reach 12.5 EG/s with the exchange after the backward pass, and 11.9 beside it
        (one thread of an AMD EPYC each)."""

        self.accumulated = 0
        """Gradients since the last update, as the host counts them."""

        self.gathered: dict[str, list[Tensor]] = {}
        """Whole tensors of kinds that are divided among the ranks, as they are now."""

        if placement.is_on_host(config, device):
            self._check_host_room(model, rule_of(config, ema), precision)
        # Only now: `_allocate`, which it calls, needs all of the above.
        super().__init__(model, config, precision, ema)
        if overlaps:
            self._split(self.layout.parts)

    @property
    def num_holders(self) -> int:
        """Ranks that divide master weights and moments among themselves."""
        return 1

    def _check_host_room(self, model: nn.Module, rule: Rule, precision: Precision) -> None:
        """Refuse what the ranks of a machine cannot keep in its memory, before one has taken any:
        each would take for free what the others are about to."""
        sizes = [each.numel() for each in model.parameters() if each.requires_grad]
        if self.num_holders > 1:
            sizes = [sum(sizes) // self.num_holders]  # of all parameters one tensor
        need = placement.locked_bytes(sizes, placement.num_kinds(rule, precision.compute))
        [room] = self.group.min([available_host_bytes()])
        placement.check_room(need, room // self.group.ranks.local_size)

    def _allocate(self) -> None:
        super()._allocate()
        self._connect()

    def _connect(self) -> None:
        """Make the buffer that is sent, which adds up gradients, too."""
        # Not DDP: it wants `.grad`, and buckets of its own, and moves nothing while gradients come.
        self.layout = Layout(
            self.parameters,
            self.order,
            num_ranks=self.group.ranks.size,
            element_bytes=self.wire.itemsize,
        )
        self.exchange = Exchange(self.parameters, self.layout, self.wire, self._send, self._then)
        self.accumulators = self.exchange.sums if self.accumulation > 1 else []

    @property
    def phase(self) -> int:
        """Whether the next gradients are added to others, 0 or 1, plus 2 if an update is due."""
        return (self.accumulated > 0) + 2 * self._is_due

    @property
    def _is_due(self) -> bool:
        return self.accumulated + 1 >= self.accumulation

    def end_iteration(self) -> None:
        """Count an iteration, also one that was the replay of a graph."""
        # An update has changed what was gathered.
        self.gathered.clear()
        self.accumulated = 0 if self._is_due else self.accumulated + 1

    def overlap_backward(self) -> AbstractContextManager[None]:
        """Send gradients during the backward pass inside, where that is quicker than after it; with
        ``overlaps`` move weights, too.

        The gradients must live as long as the context.
        """
        # Set before the backward pass, during which parts are handled already.
        self.exchange.is_first, self.exchange.is_due = self.accumulated == 0, self._is_due
        return self.exchange.during_backward() if self.is_beside else nullcontext()

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move the weights by the gradients of the (scaled) losses of all ranks; or keep the sum of
        this rank's where no update is due."""
        self.exchange.finish(gradients)
        if not self._is_due:
            # On the device too, where a save reads it; a replay of a graph counts itself.
            self.parts[0].scalars[Scalar.ACCUMULATED_GRADIENTS].add_(1)
        elif not self.overlaps:
            self._move_part(0)

    def gather(self) -> None:
        """Bring together what `weights` and `tensors` then give on the first rank."""
        for kind in self._divided:
            self.gathered[kind] = self._gather(kind)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, as `Update` does; all ranks call it with the same."""
        super().load(tensors)
        # Read once, at a load: in a step it would wait for the GPU.
        self.accumulated = int(self.parts[0].scalars[Scalar.ACCUMULATED_GRADIENTS])

    def _send(self, part: Tensor) -> None:
        self.group.all_reduce(part)

    def _then(self, index: int) -> None:
        if self.overlaps:
            self._move_part(index)

    def _move_part(self, index: int) -> None:
        part = self.parts[index]
        self._move(part, [self.exchange.sums[number] for number in part.numbers])

    @property
    def _divided(self) -> list[str]:
        """Kinds of tensors of which no rank alone has what a checkpoint holds."""
        return ["accumulator"] if self.accumulators else []

    def _gather(self, kind: str) -> list[Tensor]:
        """Tensors of such a kind as a checkpoint holds them, on the first rank at least."""
        # Another buffer: the sums of this rank go on, for a save is no update.
        total = torch.zeros_like(self.exchange.flat)
        if self.accumulated:
            total.copy_(self.exchange.flat)
            self.group.all_reduce(total)
        return self.layout.views(total)

    def _whole(self, kind: str) -> list[Tensor]:
        return self.gathered[kind] if kind in self._divided else super()._whole(kind)

    def _take(self, kind: str, number: int, tensor: Tensor) -> None:
        # A sum over the ranks goes on as the first one's.
        if kind == "accumulator" and not self.group.ranks.is_first:
            self.accumulators[number].zero_()
        else:
            super()._take(kind, number, tensor)
