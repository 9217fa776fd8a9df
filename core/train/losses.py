"""What is minimised: weighted means of differences between decoded faces and their targets.

Every loss is a map (B, 3, H, W); it is multiplied by one weight plane (B, 1, H, W), which is
face * (1 + E eye) * (1 + M mouth) or 1, and averaged over all pixels and channels, not over the
mask's area. A side's loss is the sum over outputs and losses; the model's the sum over sides.
`kernels.face_loss` gives the means and their gradient at once, in fp32 whatever the network's
precision; nothing here is differentiated again.

Shape letters: B faces of a side, C channels, H rows, W columns, K losses, V logged numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.face_loss import face_loss
from ...models.autoencoder import Outputs
from ..config import LossConfig
from ..data.feed import Batch
from ..data.sides import SIDES


@dataclass(frozen=True)
class Losses:
    """The losses of one batch, on the device."""

    row_v: Tensor
    """The unweighted means, in the order that `Loss.named` knows."""

    gradients: tuple[Tensor, ...]
    """Of the total, by every output of A, then of B."""


class Loss:
    """The configured sum of losses, for a model with ``num_outputs`` faces a side."""

    def __init__(self, config: LossConfig, num_outputs: int):
        slots = [(config.loss_function, 100)]
        slots += [
            (getattr(config, f"loss_function_{n}"), getattr(config, f"loss_weight_{n}"))
            for n in (2, 3, 4)
        ]
        self.weights: dict[str, float] = {}
        for name, percent in slots:
            if name != "none" and percent > 0:  # the same loss twice adds up
                self.weights[name] = self.weights.get(name, 0.0) + percent / 100
        self.mask_weights = {config.mask_loss_function: 1.0} if config.learn_mask else {}
        self.num_outputs = num_outputs
        self._terms = self._named_terms()

    @property
    def num_values(self) -> int:
        """V: length of a row."""
        return len(SIDES) * (self.num_outputs * len(self.weights) + len(self.mask_weights))

    def __call__(
        self, outputs: tuple[Outputs, Outputs], batch: Batch, scale: Tensor | None
    ) -> Losses:
        """The losses of a batch and the gradients of their sum, times ``scale`` (None: 1)."""
        targets: list[Tensor] = [*batch.targets]
        weights: list[Tensor | None] = [*batch.weights]
        functions = [self.weights] * self.num_outputs
        if batch.mask_n1hw is not None:
            targets.append(batch.mask_n1hw)
            weights.append(None)
            functions.append(self.mask_weights)
        results = [
            face_loss(of_a, of_b, target, weight, losses=[*losses.items()], scale=scale)
            for of_a, of_b, target, weight, losses in zip(
                *outputs, targets, weights, functions, strict=True
            )
        ]
        means = [result.means_2k.flatten() for result in results]
        return Losses(
            row_v=means[0] if len(means) == 1 else torch.cat(means),
            gradients=(*(r.gradient_a for r in results), *(r.gradient_b for r in results)),
        )

    def named(self, rows_nv: np.ndarray) -> dict[str, np.ndarray]:
        """What is logged, by name, from N rows: `loss_a`, `loss_b`, then as in `run.log`."""
        rows = rows_nv.astype(np.float64)
        # Column by column, so that a number that is not finite shows only where it belongs.
        return {
            name: sum((share * rows[:, column] for column, share in terms), np.zeros(len(rows)))
            for name, terms in self._terms.items()
        }

    def _named_terms(self) -> dict[str, list[tuple[int, float]]]:
        """For each logged name the columns of a row that make it up, each with its weight."""
        terms: dict[str, list[tuple[int, float]]] = {f"loss_{side}": [] for side in SIDES}
        terms["batch_total"] = []
        column = 0
        for number in range(self.num_outputs):
            suffix = f"_{number}" if self.num_outputs > 1 else ""
            for side in SIDES:
                for name, share in self.weights.items():
                    for key, weight in (
                        (f"loss_{side}", share),
                        ("batch_total", share),
                        (f"batch_face_{side}{suffix}", share),
                        (f"batch_weighted_{side}/{name}", share),
                        (f"batch_unweighted_{side}/{name}", 1.0),
                    ):
                        terms.setdefault(key, []).append((column, weight))
                    column += 1
        for side in SIDES if self.mask_weights else ():
            for key in (f"loss_{side}", "batch_total", f"batch_mask_{side}"):
                terms.setdefault(key, []).append((column, 1.0))
            column += 1
        return terms
