"""The optimizer scalars: what changes from step to step, in one small tensor on the device.

`Scalar` is their only declaration. Kernels take places from it as constants, the rest of mien as
indices: ``scalars[Scalar.STEP]``. They lie on the device, so that no step waits for the host and a
CUDA graph holds all of it; they are float64, since powers of beta_2 near 1 lose their digits in
fp32.
"""

from enum import auto

import torch
from torch import Tensor

from .places import Places


class Scalar(Places):
    """Place of each scalar in the tensor."""

    LEARNING_RATE = auto()
    """Learning rate of the next step; the one that callers set."""

    STEP = auto()
    """Steps so far that moved the weights."""

    BETA_1_POWER = auto()
    """beta_1 to the power of STEP."""

    BETA_2_POWER = auto()
    """beta_2 to the power of STEP."""

    MOMENTUM_PRODUCT = auto()
    """Product of NAdam's momenta."""

    LOSS_SCALE = auto()
    """Factor that the loss was multiplied with."""

    FINITE_STEPS = auto()
    """Finite steps since the loss scale has changed."""

    SKIPPED_STEPS = auto()
    """Steps that were left out since a gradient was not finite."""

    ACCUMULATED_GRADIENTS = auto()
    """Gradients in the accumulators."""

    RECORDED_NORMS = auto()
    """Norms that autoclip has put into its history."""

    GRADIENT_NORM = auto()
    """Norm of the last mean gradient, unscaled, before clipping."""

    GRADIENT_FACTOR = auto()
    """Factor of the summed gradients: makes the mean of them, undoes the loss scale, clips."""

    IS_APPLIED = auto()
    """Flag: 1 where the last step moves the weights, else 0."""

    STEP_SIZE = auto()
    """Factor of exp_avg in the change of a weight."""

    GRADIENT_STEP_SIZE = auto()
    """Factor of the gradient in the change of a weight; NAdam alone has one above 0."""

    ROOT_FACTOR = auto()
    """Factor of the root of exp_avg_sq in the denominator of a change."""

    ROOT_OFFSET = auto()
    """Summand of the denominator: epsilon, or 1 where AdaBelief does not divide yet."""

    AVERAGE_WEIGHT = auto()
    """Weight of what the average of the weights holds: with `ema` the number of its updates, with
    schedule-free the sum of their squared learning rates; 0 where there is none."""

    AVERAGE_SHARE = auto()
    """Share of the moved weight, with schedule-free of the base, in the average of the weights; not
    written where there is none."""


def new_scalars(device: torch.device | str, *, learning_rate: float, scale: float = 1.0) -> Tensor:
    """Scalars of a run that has not begun: float64 (number of `Scalar`,).

    Save them with the moments and a resumed run continues bit for bit.

    Args:
        device: Device of the parameters.
        learning_rate: Learning rate of the first step.
        scale: Factor that the loss is multiplied with.
    """
    values = [0.0] * len(Scalar)
    values[Scalar.LEARNING_RATE], values[Scalar.LOSS_SCALE] = learning_rate, scale
    for product in (Scalar.BETA_1_POWER, Scalar.BETA_2_POWER, Scalar.MOMENTUM_PRODUCT):
        values[product] = 1.0
    return torch.tensor(values, dtype=torch.float64, device=device)
