"""The average of the weights in the place of the weights, for what a training shows and measures.

With `train.ema` the update keeps the average of the master weights, in fp32; the weights of
schedule-free hold one. It is what previews and held-out scores are made of, and swaps and exports
later: it moves less from step to step than the weights, which chase every batch. Statistics of
batch norms are those of the training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from ...kernels.optimizer_scalars import Scalar
from ...models.alignment import axes_of, pad
from ...models.fields import setting
from ..checkpoint.state import TrainingState
from .optimizer import Update, average_weight
from .optimizer_state import MOST

AVERAGE = "average"
"""Name of the part of a training state that holds the weight of the average."""


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """Saved weight of what the average holds, see `Scalar`."""

    weight: float = setting(0.0, low=0, high=MOST)


@contextmanager
def averaged(update: Update) -> Iterator[Literal["ema", "raw"]]:
    """Have the network compute with the average of its weights inside, where there is one; then
    with the weights again, to the bit. Which of the two (ema or raw) is handed out. Inside,
    `Update.averages` is not to be asked for: that of schedule-free follows from the weights.

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


def note_weight_of_average(state: TrainingState, update: Update) -> None:
    """Have the state of a save hold what its average weighs, where there is one: a resume without
    the optimizer's state knows it by that."""
    # A resumed state may tell of an average that this run does not keep.
    state.parts.pop(AVERAGE, None)
    if update.rule.has_average:
        state.parts[AVERAGE] = asdict(_Saved(weight=average_weight(update)))


def load_weight_of_average(state: TrainingState, update: Update) -> None:
    """Have the average weigh what it did when the state was saved; an older state does not tell.

    Raises:
        ValueError: The state holds no such number.
    """
    saved = state.part(AVERAGE, _Saved)
    if saved and update.rule.has_average:
        for part in update.parts:
            part.scalars[Scalar.AVERAGE_WEIGHT] = saved.weight
