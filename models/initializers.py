"""How fresh weights are drawn.

Every tensor gets numbers of its own from one generator, in the order in which the layers were made.
A layer names its rule as ``draw``; without one, convolutions are He-uniform, dense layers and
transposed convolutions Glorot-uniform. Biases are 0, gains 1.

    He-uniform       U(+-sqrt(6 / fan_in)), fan_in = k*k*C_in            (He et al. 2015)
    He-normal        N(0, 2 / fan_in), cut off at two deviations         (He et al. 2015)
    Glorot-uniform   U(+-sqrt(6 / (fan_in + fan_out)))                   (Glorot and Bengio 2010)
    ICNR             one kernel for all pixels that a shuffle makes of one (Aitken et al. 2017)
    convolution-aware  filters that are orthogonal in Fourier space      (Aghajanyan 2017)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], None]
"""Fills a weight in place."""

_NOISE = 0.05  # deviation that tells the filters of one convolution-aware basis apart
# A normal that is cut off is narrower: divided by this the variance is the rule's.
_CUT_DEVIATION = 0.87962566103423978  # of a standard normal that is cut off at +-2


def _fans(weight: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a kernel (out, in, ...)."""
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def _uniform(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=generator)


def he_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """The rule of convolutions."""
    _uniform(weight, math.sqrt(6 / _fans(weight)[0]), generator)


def depthwise_he_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """He-uniform of a kernel (channels, 1, k, k), of which all channels count into the fan."""
    _uniform(weight, math.sqrt(6 / weight.numel()), generator)


def small_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """A tenth of He's variance, for the second convolution of a residual block."""
    _uniform(weight, math.sqrt(0.6 / _fans(weight)[0]), generator)


def glorot_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """The rule of dense layers."""
    _uniform(weight, math.sqrt(6 / sum(_fans(weight))), generator)


def he_normal(weight: Tensor, generator: torch.Generator) -> None:
    """Initialize dense layers that a LeakyReLU follows."""
    deviation = math.sqrt(2 / _fans(weight)[0]) / _CUT_DEVIATION
    nn.init.trunc_normal_(
        weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )


def normal_002(weight: Tensor, generator: torch.Generator) -> None:
    """N(0, 0.02)."""
    with torch.no_grad():
        weight.normal_(0, 0.02, generator=generator)


def icnr(draw: Draw, groups: int) -> Draw:
    """The rule ``draw`` for one of the groups of output channels; the others are its copies.

    All pixels that a shuffle makes of one then begin alike, so no checkerboard shows.
    """

    def filled(weight: Tensor, generator: torch.Generator) -> None:
        part = weight.new_empty(len(weight) // groups, *weight.shape[1:])
        draw(part, generator)
        with torch.no_grad():
            weight.copy_(part.repeat(groups, *[1] * (weight.dim() - 1)))

    return filled


def convolution_aware(weight: Tensor, generator: torch.Generator) -> None:
    """Filters of one output are orthogonal in Fourier space; variance 2 / fan_in.

    For each output channel, the C_in spectra are rows of orthogonal matrices (eigenvectors of
    random symmetric ones); their inverse transforms, a little noise added, are the filters. A 1x1
    kernel has one frequency only, and is drawn from a normal distribution. Of a depthwise kernel
    all channels count into the fan, as in `depthwise_he_uniform`.
    """
    outputs, inputs, rows, columns = weight.shape
    fan_in = weight.numel() if inputs == 1 else _fans(weight)[0]
    if rows == columns == 1:
        with torch.no_grad():
            weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
        return
    spectrum = rows * (columns // 2 + 1)
    # The eigenvectors are in batches, for there may be thousands of outputs.
    batch = max(1, 2**22 // spectrum**2)  # 16 MiB of fp32 matrices; chosen, unmeasured
    matrices = -(-inputs // spectrum)
    drawn = torch.empty(outputs, inputs, rows, columns)
    for begin in range(0, outputs, max(1, batch // matrices)):
        count = min(max(1, batch // matrices), outputs - begin)
        symmetric = torch.randn(count * matrices, spectrum, spectrum, generator=generator)
        lower = symmetric.tril(-1)
        symmetric = symmetric.tril() + lower.mT
        basis = torch.linalg.eigh(symmetric).eigenvectors.mT
        spectra = basis.reshape(count, matrices * spectrum, rows, columns // 2 + 1)[:, :inputs]
        drawn[begin : begin + count] = torch.fft.irfft2(spectra, s=(rows, columns))
    drawn += _NOISE * torch.randn(drawn.shape, generator=generator)
    scale = math.sqrt(2 / fan_in) / drawn.std(correction=0)
    with torch.no_grad():
        weight.copy_(drawn * scale)


def initialize(
    module: nn.Module, generator: torch.Generator, *, icnr_init: bool, conv_aware_init: bool
) -> None:
    """Fill every weight of a model.

    Args:
        module: The model. A module in it that has a method ``draw_weights(generator)`` fills all
            that it holds by itself.
        generator: Generator from which all numbers come.
        icnr_init: Draw convolutions before a shuffle by `icnr`.
        conv_aware_init: Draw convolutions by `convolution_aware`, but for Glorot-uniform ones.
    """
    if hasattr(module, "draw_weights"):
        module.draw_weights(generator)  # type: ignore[operator]
        return
    if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
        is_conv = isinstance(module, nn.Conv2d)
        draw: Draw = getattr(module, "draw", he_uniform if is_conv else glorot_uniform)
        if is_conv and conv_aware_init and draw is not glorot_uniform:
            draw = convolution_aware
        groups = getattr(module, "icnr_groups", 1)
        draw = icnr(draw, groups) if icnr_init and groups > 1 else draw
        draw(module.weight, generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for child in module.children():
        initialize(child, generator, icnr_init=icnr_init, conv_aware_init=conv_aware_init)
