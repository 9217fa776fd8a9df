"""One training step: both sides through the shared encoder at once, losses, gradients, update.

Shape letters: N faces, first those of A, then as many of B; H rows, W columns; S edge in px.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder, Outputs
from ...models.batch_norm import norms_of, update_running_stats
from ..data.feed import Batch
from ..distribute.group import Group
from ..losses.weighted import Loss
from ..optim.optimizer import Update
from .loss_buffer import LossBuffer

NOTHING = nullcontext()
"""Context of a backward pass beside which nothing is done."""


class SharedStep:
    """Weight of this rank in a step that several take together, and the losses of all.

    Losses are means over the faces of this rank. Each counts by the rank's share of the batch, so
    that the sum over the ranks is the mean over the batch, however the faces are divided.

    Args:
        group: Ranks that take the step.
        weight: Share of the batch that is this rank's.
        device: Device that it trains on.
    """

    def __init__(self, group: Group, weight: float, device: torch.device):
        self.group = group
        # A tensor made once: a captured graph reads it at its address.
        self.weight = torch.tensor(weight, device=device)

    def scale(self, loss_scale: Tensor | None) -> Tensor:
        """What the loss's gradient is multiplied with: the weight, times the loss scale if any."""
        return self.weight if loss_scale is None else self.weight * loss_scale

    def total(self, row_v: Tensor) -> Tensor:
        """The losses of the whole batch, from those of this rank's faces."""
        total_v = row_v * self.weight
        # A sum, in which a loss that is not finite on one rank shows on the first, which looks.
        self.group.all_reduce(total_v)
        return total_v


class TrainStep:
    """Moves the weights by one batch; nothing in it waits for the device.

    Args:
        model: Trained in place.
        loss: What is minimised.
        update: Moves the weights.
        loss_buffer: Takes the losses.
        side_stream: Stream on which B's decoder runs at the time of A's; None: after it.
        shared: Weight of this rank, where several take it together; None: it is alone.
    """

    def __init__(
        self,
        model: Autoencoder,
        loss: Loss,
        update: Update,
        loss_buffer: LossBuffer,
        side_stream: torch.cuda.Stream | None = None,
        shared: SharedStep | None = None,
    ):
        self.network: Callable[..., Any] = model
        """What computes the outputs: the model, or the model compiled."""

        self.norms = norms_of(model)
        self.parameters = update.parameters
        self.loss, self.update = loss, update
        self.loss_buffer, self.side_stream = loss_buffer, side_stream
        self.shared = shared

    def __call__(
        self, batch: Batch, during_backward: AbstractContextManager[object] = NOTHING
    ) -> None:
        """Train on one batch; the backward pass runs within ``during_backward``."""
        outputs = self.forward(batch.input_nchw)
        # The loss gives its gradients, too: its kernels have them at hand, and autograd takes over.
        losses = self.loss(outputs, batch, self._scale)
        with during_backward:
            gradients = self.backward(outputs, losses.gradients)
        self.update(gradients)
        row_v = losses.row_v
        self.loss_buffer.push(row_v if self.shared is None else self.shared.total(row_v))

    @property
    def _scale(self) -> Tensor | None:
        """What the gradient of this process's loss is multiplied with; None: nothing."""
        # Not torch's GradScaler, which checks gradients in a pass of its own and waits for it.
        scale = self.update.scale
        return scale if self.shared is None else self.shared.scale(scale)

    def forward(self, input_nchw: Tensor) -> tuple[Outputs, Outputs]:
        """Outputs of both decoders for their sides of the batch; running statistics are updated."""
        outputs = self.outputs(input_nchw)
        # What B's norms have seen on the side stream lives on until their backward pass.
        # All at once: one by one they would be most of what a forward pass launches.
        update_running_stats(self.norms)
        return outputs

    def outputs(self, input_nchw: Tensor) -> tuple[Outputs, Outputs]:
        """Outputs of both decoders for their sides of the batch; no statistic is updated."""
        if self.side_stream is None:
            return self.network(input_nchw)
        return self.network(input_nchw, self.side_stream)

    def backward(
        self, outputs: tuple[Outputs, Outputs], gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradient of every trained parameter, given those of the outputs.

        Meanwhile an update with overlap moves the weights whose gradients are there.
        """
        pairs = zip((*outputs[0], *outputs[1]), gradients, strict=True)
        # An output has no history where all that leads to it is frozen.
        trained = (pair for pair in pairs if pair[0].requires_grad)
        outputs_with_history, grad_outputs = zip(*trained, strict=True)
        with self.update.overlap_backward():
            # Not backward(), which would keep the gradients on the parameters and add to them.
            return torch.autograd.grad(outputs_with_history, self.parameters, grad_outputs)
