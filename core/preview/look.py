"""What a model makes of some faces at one moment: re-created and swapped.

Letters: s sides, n faces of a side, o edge of a prediction in px, C its channels, 3 or with the
mask 4.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...models.autoencoder import Autoencoder
from ..data.sides import SIDES
from .faces import PreviewFaces


@dataclass(frozen=True)
class Look:
    """Faces, and the model's pictures of them."""

    iteration: int
    faces: PreviewFaces
    predictions: np.ndarray
    """(s, 2 decoders, its own first, n, o, o, C) uint8 BGR."""

    weights: str
    """Weights that made them: ema, an average, or raw."""


@torch.no_grad()
def look_at(
    model: Autoencoder, compute: torch.dtype, faces: PreviewFaces, iteration: int, weights: str
) -> Look:
    """Have the model decode each face as both sides; nothing of the model changes.

    Args:
        model: Network, in training or not.
        compute: Number format of its input.
        faces: Faces that it is shown.
        iteration: Total iteration of its weights.
        weights: What its weights are, ema or raw.
    """
    was_training = model.training
    # Batch norms and dropout would else take part, and move statistics that are trained with.
    model.eval()
    device = next(model.parameters()).device
    predictions = []
    for side, inputs in zip(faces.sides, faces.inputs, strict=True):
        # As bytes to the GPU: a quarter of what fp32 would take.
        pixels = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
        other = SIDES[1 - SIDES.index(side)]
        # Encoded once, decoded twice: the encoder is shared, and half of the work.
        codes = model.encode(pixels.to(compute) / 255)
        decoded = [model.decode(model.side_code(codes, to), to) for to in (side, other)]
        predictions.append([_to_pixels(each, model.build.learn_mask) for each in decoded])
    # Put back as it was found: a model that is only read must not begin to train.
    model.train(was_training)
    return Look(iteration, faces, np.array(predictions), weights)


def _to_pixels(outputs: tuple[torch.Tensor, ...], learn_mask: bool) -> np.ndarray:
    """(n, o, o, 3 or 4) uint8 of the largest face and, where learned, its mask."""
    picture = torch.cat(outputs[-2:], dim=1) if learn_mask else outputs[-1]
    # In fp32, since bf16 would round the product to 8 bits.
    pixels = (picture.float() * 255).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
