"""How fast a training step can be: its FLOPs and bytes against what a card can do.

Both are read from the model's own graph (`core.estimate.flops`). *Ceiling*: each product, with the
pointwise pass that belongs to it, takes the longer of FLOPs / tensor peak and bytes / copy
bandwidth; the products and the update follow one another. *Stretch*: with what the best libraries
reach (`_product_s`), the pointwise passes apart, and a gap after every kernel.
"""

import math
from dataclasses import dataclass

from .flops import VALUE_BYTES, Product, Work

_GEMM_SHARE = 0.72
"""Share of the tensor peak that a well-shaped product of cuDNN or cuBLAS reaches. From what others
have measured on an H100, unmeasured by mien."""

_WEIGHT_GRADIENT_SHARE = 0.85
"""Share of that which a weight gradient reaches. From what others have measured, as above."""

_COPY_SHARE = 0.825
"""Share of the copy bandwidth that kernels with several streams reach. From what others have
measured."""

_GAP_S = 1e-6
"""Seconds between two kernels of a graph that nothing hides. Chosen, unmeasured."""

# Tiles as cuBLAS has them for bf16; which it takes is not asked, so they are a model of it.
_TILE, _SMALL_TILE = 128, 64
_MIN_DEPTH, _MAX_SPLITS = 512, 32  # a product is split along its depth into parts no thinner


@dataclass(frozen=True)
class Card:
    """What one GPU can do, measured rather than advertised."""

    name: str
    tensor_tflops: float
    """A large bf16 matrix product."""

    copy_gb_s: float
    """Bytes read plus bytes written by a large copy."""

    num_sms: int


CARDS = {
    "h100": Card("H100", 790, 3000, 132),
    "h200": Card("H200", 790, 4300, 132),
    "rtx4090": Card("RTX 4090", 165, 950, 128),
}
"""Engineering figures, for cards that were not measured."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step by phase, and the faces a second that follow."""

    num_faces: int
    products_s: float
    pointwise_s: float
    update_s: float
    gaps_s: float
    backward_s: float
    """Seconds of the backward pass, which are counted above as well."""

    @property
    def step_s(self) -> float:
        return self.products_s + self.pointwise_s + self.update_s + self.gaps_s

    @property
    def eg_per_s(self) -> float:
        return self.num_faces / self.step_s

    @property
    def binds(self) -> str:
        """The phase that takes the longest."""
        parts = {
            "products": self.products_s,
            "pointwise": self.pointwise_s,
            "update": self.update_s,
            "gaps": self.gaps_s,
        }
        return max(parts, key=lambda name: parts[name])


def ceiling(work: Work, card: Card) -> Prediction:
    """Every layer at its roofline; no implementation that works in series is faster."""
    bandwidth = 1e9 * card.copy_gb_s
    products_s = [
        max(p.flops / (1e12 * card.tensor_tflops), (p.num_bytes + p.pointwise_bytes) / bandwidth)
        for p in work.products
    ]
    return Prediction(
        work.num_faces,
        sum(products_s),
        0.0,
        _update_s(work, 1e12 * card.tensor_tflops, bandwidth),
        0.0,
        _of_backward(work, products_s),
    )


def stretch(work: Work, card: Card) -> Prediction:
    """What the best known kernels would reach together."""
    bandwidth = 1e9 * card.copy_gb_s * _COPY_SHARE
    forward = sum(p.phase == "forward" for p in work.products)
    num_kernels = len(work.products) + 2 * forward + 1  # a pointwise pass each way, one update
    if work.fused:
        num_kernels += 3  # Gram matrices, their product, an update of its own
    # Both shares: the fused update multiplies the same factors as a weight gradient.
    tensor_flops = 1e12 * card.tensor_tflops * _GEMM_SHARE * _WEIGHT_GRADIENT_SHARE
    products_s = [_product_s(p, card) for p in work.products]
    pointwise_s = work.pointwise_bytes / bandwidth
    return Prediction(
        work.num_faces,
        sum(products_s),
        pointwise_s,
        _update_s(work, tensor_flops, bandwidth),
        num_kernels * _GAP_S,
        _of_backward(work, products_s) + pointwise_s,
    )


def card_named(name: str) -> Card | None:
    """The card of `CARDS` that a GPU's name names; None: it is another one."""
    squeezed = name.lower().replace(" ", "")
    # By a part of the name: drivers write NVIDIA before it and the memory behind.
    return next((card for key, card in CARDS.items() if key in squeezed), None)


def _of_backward(work: Work, products_s: list[float]) -> float:
    """Seconds of the products that make gradients."""
    pairs = zip(work.products, products_s, strict=True)
    return sum(seconds for product, seconds in pairs if product.phase != "forward")


def _update_s(work: Work, tensor_flops: float, bandwidth: float) -> float:
    """The update; of weights whose gradients it forms, without reading those."""
    fused = sum(p.weight_values for p in work.fused)
    plain_s = work.update_bytes * (work.num_parameters - fused) / bandwidth
    return plain_s + sum(_fused_s(p, work, tensor_flops, bandwidth) for p in work.fused)


def _fused_s(product: Product, work: Work, tensor_flops: float, bandwidth: float) -> float:
    """The update of one dense weight: memory or its small products, whichever takes longer; and
    before it the Gram matrices of both factors."""
    num_bytes = (work.update_bytes - VALUE_BYTES) * product.weight_values
    num_bytes += VALUE_BYTES * product.input_values
    gram_flops = 2 * product.depth * product.input_values
    return max(product.flops / tensor_flops, num_bytes / bandwidth) + gram_flops / tensor_flops


def _product_s(product: Product, card: Card) -> float:
    """A product at 72 % of the peak, less for weight gradients and where it cannot fill the SMs."""
    share = _GEMM_SHARE * (_WEIGHT_GRADIENT_SHARE if product.phase == "weight" else 1)
    rate = 1e12 * card.tensor_tflops * share * _fill(product, card.num_sms)
    bandwidth = 1e9 * card.copy_gb_s * _COPY_SHARE
    return max(product.flops / rate, product.num_bytes / bandwidth)


def _fill(product: Product, num_sms: int) -> float:
    """Share of the SMs' work that is not padding of tiles or waiting in the last wave."""
    rows, columns = _tile(product.rows), _tile(product.columns)
    tiles = math.ceil(product.rows / rows) * math.ceil(product.columns / columns)
    used = product.rows * product.columns / (tiles * rows * columns)
    # As split-K does: the parts are added up, so a small product can still fill all SMs.
    splits = range(1, max(1, min(_MAX_SPLITS, product.depth // _MIN_DEPTH)) + 1)
    waves = (tiles * split / num_sms for split in splits)
    return used * max(wave / math.ceil(wave) for wave in waves)


def _tile(edge: int) -> int:
    """Edge of the tiles that cover ``edge``: 64 or 128."""
    return _SMALL_TILE if edge <= _SMALL_TILE else _TILE
