"""The average of the weights in the place of the weights, for what a training shows and measures.

With `train.ema` the update keeps the average of the master weights, in fp32. It is what previews
and held-out scores are made of, and swaps and exports later: it moves less from step to step than
the weights, which chase every batch. Statistics of batch norms are those of the training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ...models.alignment import axes_of, pad
from .optimizer import Update


@contextmanager
def averaged(update: Update) -> Iterator[Literal["ema", "raw"]]:
    """Have the network compute with the average of its weights inside, where there is one; then
    with the weights again, to the bit. Which of the two (ema or raw) is handed out.

    Ranks call `Update.gather` before; only the first of them may come here.
    """
    averages = update.averages
    if not averages:
        yield "raw"
        return
    # On the host: the GPU may have no room for the weights a second time.
    weights = [each.detach().to("cpu", copy=True) for each in update.parameters]
    try:
        for name, parameter in zip(update.names, update.parameters, strict=True):
            parameter.detach().copy_(pad(averages[name], axes_of(parameter)))
        yield "ema"
    finally:
        for parameter, weight in zip(update.parameters, weights, strict=True):
            parameter.detach().copy_(weight)
        if parameter.is_cuda:
            # A copy from memory that is not page-locked may go on after the call, and the next
            # step may be on another stream.
            torch.cuda.synchronize(parameter.device)
