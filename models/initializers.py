"""How fresh weights are drawn.

Convolutions: He-uniform, U(+-sqrt(6 / fan_in)), fan_in = k*k*C_in (He et al. 2015). Dense layers:
Glorot-uniform, U(+-sqrt(6 / (fan_in + fan_out))) (Glorot and Bengio 2010). Biases: 0. Every tensor
gets numbers of its own from one generator, in the order in which the layers were made.
"""

import math

import torch
from torch import Tensor, nn


def he_uniform(weight_oihw: Tensor, generator: torch.Generator) -> None:
    """Fill a convolution's kernel in place."""
    fan_in = weight_oihw[0].numel()
    bound = math.sqrt(6 / fan_in)
    with torch.no_grad():
        weight_oihw.uniform_(-bound, bound, generator=generator)


def glorot_uniform(weight_oi: Tensor, generator: torch.Generator) -> None:
    """Fill a dense layer's kernel in place."""
    fan_out, fan_in = weight_oi.shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    with torch.no_grad():
        weight_oi.uniform_(-bound, bound, generator=generator)


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every weight of a model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            he_uniform(module.weight, generator)
        elif isinstance(module, nn.Linear):
            glorot_uniform(module.weight, generator)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
