"""One training step: both sides through the shared encoder at once, losses, update.

Shape letters: N faces, first those of A, then as many of B; H rows, W columns; S edge in px.
"""

import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder
from ..data.feed import Batch
from .losses import Loss
from .optim import Update
from .precision import Precision


class TrainStep:
    """Moves the weights by one batch; nothing in it waits for the device."""

    def __init__(self, model: Autoencoder, loss: Loss, update: Update, precision: Precision):
        self.model, self.loss, self.update, self.precision = model, loss, update, precision
        self.names: list[str] = []
        """Names of the logged values; known after the first step."""

    def __call__(self, batch: Batch) -> Tensor:
        """Train on one batch; the logged values (K,), fp32, as named by `names`."""
        with self.precision.forward():
            outputs = self.model(batch.input_nchw)
        half = batch.input_nchw.shape[0] // 2
        sides = {}
        for side, side_outputs, part in zip(
            "ab", outputs, (slice(half), slice(half, None)), strict=True
        ):
            sides[side] = self.loss(
                side_outputs,
                tuple(target[part] for target in batch.targets),
                tuple(weight[part] for weight in batch.weights),
                None if batch.mask_n1hw is None else batch.mask_n1hw[part],
            )
        total = sides["a"].total + sides["b"].total
        self.update(total)
        values = {"loss_a": sides["a"].total, "loss_b": sides["b"].total, "batch_total": total}
        for side, result in sides.items():
            for name, value in result.parts.items():
                values["batch_" + name.format(side=side)] = value
        self.names = self.names or list(values)
        return torch.stack([value.detach().float() for value in values.values()])
