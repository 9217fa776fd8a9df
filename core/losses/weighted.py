"""What is minimised: weighted means of differences between decoded faces and their targets.

Nearly every loss is a map (B, 3 or 1, H, W); it is multiplied by one weight plane (B, 1, H, W),
which is face * (1 + E eye) * (1 + M mouth) or 1, and averaged over all pixels and channels, not
over the mask's area. A side's loss is the sum over outputs and losses; the model's the sum over
sides. `kernels.face_loss` gives the means and their gradient at once; the losses that it does not
know are those of `core.losses`, which are modules of autograd, some of them over a kernel. All of
it is fp32 whatever the network's precision.

Shape letters: B faces of a side, C channels, H rows, W columns, K losses, V logged numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.face_loss import LOSSES as FUSED
from ...kernels.face_loss import FaceLoss, face_loss
from ...models.autoencoder import Outputs
from ..config import LossConfig
from ..data.feed import Batch
from ..data.sides import SIDES
from ..precision import exact_products
from . import PictureLoss, picture_losses


@dataclass(frozen=True)
class Losses:
    """The losses of one batch, on the device."""

    row_v: Tensor
    """The unweighted means, in the order that `Loss.named` knows."""

    gradients: tuple[Tensor, ...]
    """Gradients of the total, by every output of A, then of B."""


class Loss:
    """The configured sum of losses, for a model whose faces have edges of ``output_px``.

    Raises:
        ValueError: A face is too small for a loss, or the weights of a loss are not there.
    """

    def __init__(self, config: LossConfig, output_px: Sequence[int], device: torch.device | str):
        slots = [(config.loss_function, 100)]
        slots += [
            (getattr(config, f"loss_function_{n}"), getattr(config, f"loss_weight_{n}"))
            for n in (2, 3, 4)
        ]
        weights: dict[str, float] = {}
        for name, percent in slots:
            if name != "none" and percent > 0:  # the same loss twice adds up
                weights[name] = weights.get(name, 0.0) + percent / 100
        self.fused = {name: weight for name, weight in weights.items() if name in FUSED}
        self.others = {name: weight for name, weight in weights.items() if name not in FUSED}
        self.weights = self.fused | self.others
        self.mask_weights = {config.mask_loss_function: 1.0} if config.learn_mask else {}
        self.num_outputs = len(output_px)
        self.functions = picture_losses(
            [*self.others], output_px, lpips_weights=config.lpips_weights
        )
        for functions in self.functions:
            for function in functions.values():
                function.to(device, torch.float32)
        self._terms = self._named_terms()

    @property
    def num_values(self) -> int:
        """V: length of a row."""
        return len(SIDES) * (self.num_outputs * len(self.weights) + len(self.mask_weights))

    def __call__(
        self, outputs: tuple[Outputs, Outputs], batch: Batch, scale: Tensor | None
    ) -> Losses:
        """The losses of a batch and the gradients of their sum, times ``scale`` (None: 1)."""
        pairs = [*zip(*outputs, strict=True)]
        faces = zip(self.functions, batch.targets, batch.weights, strict=True)
        results = [
            self._of_faces(functions, *pair, target, weight, scale)
            # Behind the faces there may be the masks.
            for pair, (functions, target, weight) in zip(pairs, faces, strict=False)
        ]
        if batch.mask_n1hw is not None:
            losses = [*self.mask_weights.items()]
            results.append(face_loss(*pairs[-1], batch.mask_n1hw, None, losses=losses, scale=scale))
        means = [result.means_2k.flatten() for result in results]
        # One output has the whole row already, which a `cat` would copy by a launch of its own.
        return Losses(
            row_v=means[0] if len(means) == 1 else torch.cat(means),
            gradients=(*(r.gradient_a for r in results), *(r.gradient_b for r in results)),
        )

    def _of_faces(
        self,
        functions: dict[str, PictureLoss],
        pred_a: Tensor,
        pred_b: Tensor,
        target_nchw: Tensor,
        weight_n1hw: Tensor,
        scale: Tensor | None,
    ) -> FaceLoss:
        """The means and gradients of one output; those of the other losses behind the fused."""

        def fused(pred_a: Tensor, pred_b: Tensor) -> FaceLoss:
            losses = [*self.fused.items()]
            return face_loss(pred_a, pred_b, target_nchw, weight_n1hw, losses=losses, scale=scale)

        if not functions:
            return fused(pred_a, pred_b)
        # In fp32, so that the sum of both gradients is rounded once.
        parts = [self._differentiated(functions, pred_a, pred_b, target_nchw, weight_n1hw, scale)]
        if self.fused:
            # In front, as `named` counts the columns.
            parts.insert(0, fused(pred_a.float(), pred_b.float()))
        means, *gradients = zip(*parts, strict=True)
        return FaceLoss(
            torch.cat(means, dim=1),
            *(
                sum(each[1:], each[0]).to(pred_a.dtype, memory_format=torch.channels_last)
                for each in gradients
            ),
        )

    def _differentiated(
        self,
        functions: dict[str, PictureLoss],
        pred_a: Tensor,
        pred_b: Tensor,
        target_nchw: Tensor,
        weight_n1hw: Tensor,
        scale: Tensor | None,
    ) -> FaceLoss:
        """Compute the other losses as `face_loss` gives its own, with gradients in fp32."""
        # Both sides as one leaf: autograd ends here, and the network's graph is walked once, later,
        # by the gradients of all losses.
        pred = torch.cat((pred_a.detach(), pred_b.detach())).float().contiguous().requires_grad_()
        # The filters' products and kernels take rows that lie together, not channels_last.
        target = target_nchw.float().contiguous()
        means, total = [], torch.zeros_like(pred)
        for name, function in functions.items():
            # One after the other, so that what autograd keeps of a loss is freed before the next.
            with torch.enable_grad(), exact_products():
                means_2 = function(pred, target, weight_n1hw).unflatten(0, (2, -1)).mean(dim=1)
                (gradient,) = torch.autograd.grad(self.others[name] * means_2.sum(), pred)
            means.append(means_2.detach())
            total += gradient
        if scale is not None:
            total *= scale
        return FaceLoss(torch.stack(means, dim=1), *total.chunk(2))

    def named(self, rows_nv: np.ndarray) -> dict[str, np.ndarray]:
        """What is logged, by name, from N rows: `loss_a`, `loss_b`, then as in `run.log`."""
        # In float64, so that the total is the sum of its parts in all digits that are shown.
        rows = rows_nv.astype(np.float64)
        # Column by column, so that a number that is not finite shows only where it belongs.
        return {
            name: sum((share * rows[:, column] for column, share in terms), np.zeros(len(rows)))
            for name, terms in self._terms.items()
        }

    def _named_terms(self) -> dict[str, list[tuple[int, float]]]:
        """Columns of a row that make up each logged name, each with its weight."""
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
