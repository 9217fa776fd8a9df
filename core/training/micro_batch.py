"""A step whose weights have the same bits on 1, 2, 4 or 8 processes: by micro-batches of one size.

Every micro-batch is computed by itself, with the shapes and so the kernels that it has on any
number of processes; `TreeSum` adds them up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder
from ..config import Config
from ..data.feed import Batch
from ..distribute.ranks import ALONE, Ranks
from ..distribute.tree import TreeSum
from ..losses.weighted import Loss
from ..optim.optimizer import Update
from ..system.printable import plural
from .loss_buffer import LossBuffer
from .step import NOTHING, SharedStep, TrainStep


def check(config: Config, ranks: Ranks = ALONE) -> None:
    """Refuse micro-batches that do not go together with other settings.

    Args:
        config: Settings of the run; of an automatic batch size nothing is said.
        ranks: Ranks of the run.

    Raises:
        ValueError: Names the rule, what was given and what to change.
    """
    size, batch_size = config.train.micro_batch, config.train.batch_size
    if not size:
        return
    for name, value in (
        ("train.distribution sharded", config.train.distribution == "sharded"),
        ("optimizer.overlap on", config.optimizer.overlap == "on"),
        ("optimizer.fused_dense", config.optimizer.fused_dense),
    ):
        if value:
            raise ValueError(f"train.micro_batch is {size}, which does not go with {name}")
    # `TreeSum` has ranks exchange their sums in pairs.
    if ranks.size & (ranks.size - 1):
        raise ValueError(
            f"train.micro_batch is {size}, which is for 1, 2, 4, 8.. processes, got {ranks.size}; "
            "train on as many, or set train.micro_batch to 0"
        )
    # Evenly, so that the summands of each rank are a whole subtree.
    if batch_size and batch_size % (size * ranks.size):
        raise ValueError(
            f"train.batch_size must be a multiple of {size * ranks.size}, {ranks.size} "
            f"{plural(ranks.size, 'process', 'processes')} times a train.micro_batch of {size}, "
            f"got {batch_size}; change one of them"
        )


def micro_batch(batch: Batch, number: int, size: int) -> Batch:
    """Faces of both sides, ``size`` of each, of the micro-batch of this number."""

    def own(x_n: Tensor) -> Tensor:
        # All of A's faces come before B's, in a micro-batch too.
        return torch.cat([side[number * size :][:size] for side in x_n.chunk(2)])

    return replace(
        batch,
        input_nchw=own(batch.input_nchw),
        targets=tuple(map(own, batch.targets)),
        weights=tuple(map(own, batch.weights)),
        mask_n1hw=None if batch.mask_n1hw is None else own(batch.mask_n1hw),
    )


class MicroBatchStep(TrainStep):
    """Moves the weights by one batch, of which micro-batches are computed one after the other.

    Args:
        model: Trained in place.
        loss: What is minimised.
        update: Moves the weights, of every rank alike.
        loss_buffer: Takes the losses.
        side_stream: Stream on which B's decoder runs at the time of A's; None: after it.
        shared: Weight of this rank, where several take the step together; None: it is alone.
        size: Faces of each side in a micro-batch.
        batch_size: Faces of each side in the batch, of all ranks.
    """

    def __init__(
        self,
        model: Autoencoder,
        loss: Loss,
        update: Update,
        loss_buffer: LossBuffer,
        side_stream: torch.cuda.Stream | None = None,
        shared: SharedStep | None = None,
        *,
        size: int,
        batch_size: int,
    ):
        super().__init__(model, loss, update, loss_buffer, side_stream, shared)
        group = shared.group if shared else None
        num_own = batch_size // size // (group.ranks.size if group else 1)
        self.size = size
        self.tree = TreeSum(update.parameters, loss.num_values, num_own, group)
        device = update.parameters[0].device
        # A tensor made once: a graph reads it, and a number would be copied at every step.
        self.weight = torch.tensor(size / batch_size, device=device)

    def __call__(
        self, batch: Batch, during_backward: AbstractContextManager[object] = NOTHING
    ) -> None:
        """Train on one batch; all passes run within ``during_backward``."""
        with during_backward:
            self.tree(self._summand_of(batch))
        self.update(self.tree.sums)
        self.loss_buffer.push(self.tree.row_v)

    def _summand_of(self, batch: Batch) -> Callable[[int], tuple[tuple[Tensor, ...], Tensor]]:
        """A function that computes the gradients and losses of a micro-batch, by its number."""
        loss_scale = self.update.scale
        # On the device, where alone the loss scale is known.
        scale = self.weight if loss_scale is None else self.weight * loss_scale

        def summand(number: int) -> tuple[tuple[Tensor, ...], Tensor]:
            part = micro_batch(batch, number, self.size)
            outputs = self.forward(part.input_nchw)
            losses = self.loss(outputs, part, scale)
            # Weighed here, as the gradients are by their scale: the tree adds up both.
            return self.backward(outputs, losses.gradients), losses.row_v * self.weight

        return summand
