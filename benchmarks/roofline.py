"""How fast a training step can be: its FLOPs and bytes against what a card can do.

Both are read from the model's own graph: one forward and backward pass over tensors without memory
(the meta device) shows every matrix product (convolutions and dense layers) with its shapes. In
bf16, and ideally, each number is moved as often as no implementation can do without:

    a product          reads what it needs and writes its result, in 2 bytes a value
    backward           one product for the input's gradient (not of the first layer), one for the
                       weight's; and one fused pass that reads and writes the gradient of each
                       forward result (activation, bias, depth-to-space)
    update             28 bytes a parameter: fp32 weight, mean and square read and written, the bf16
                       gradient read, the bf16 weight written. With forward, data gradient and
                       weight gradient (2 each) that makes 34 bytes a parameter and step.

The activations of one face are therefore moved 3 * (inputs + outputs) + 2 * outputs values, over
all forward products. *Ceiling*: each product, with the pointwise pass that belongs to it, takes
the longer of FLOPs / tensor peak and bytes / copy bandwidth; the products and the update follow one
another. *Stretch*: with what the best libraries reach (`_product_s`), the pointwise passes apart,
and a gap after every kernel.

Run: ``mien bench roofline``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import models
from ..models.autoencoder import Autoencoder
from .harness import rounded

VALUE_BYTES = 2
"""A bf16 number."""

UPDATE_BYTES = 28
"""Of a parameter: weight, mean, square in fp32 both ways, gradient and weight in bf16 one way."""

_GEMM_SHARE = 0.72
"""Of the tensor peak, that a well-shaped product of cuDNN or cuBLAS reaches."""

_WEIGHT_GRADIENT_SHARE = 0.85
"""Of that, where the product is a weight gradient."""

_COPY_SHARE = 0.825
"""Of the copy bandwidth, that kernels with several streams reach."""

_GAP_S = 1e-6
"""Between two kernels of a graph, that nothing hides."""

_TILE, _SMALL_TILE = 128, 64
_MIN_DEPTH, _MAX_SPLITS = 512, 32  # a product is split along its depth into parts no thinner

BATCH_SIZES = (16, 64, 256)


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
class Product:
    """One matrix product of a step: (rows, depth) @ (depth, columns)."""

    phase: str
    """forward, data (the gradient of the input) or weight (that of the weight)."""

    rows: int
    columns: int
    flops: int
    weight_values: int
    """Numbers of the layer's weight read or, as a gradient, written."""

    input_values: int
    """Numbers of what the layer takes in: read, or written as a gradient."""

    output_values: int
    """Numbers of what the layer gives out: written, or read as a gradient."""

    @property
    def depth(self) -> int:
        return max(1, self.flops // (2 * self.rows * self.columns))

    @property
    def pointwise_bytes(self) -> int:
        """Of the pass back over a forward result: its gradient read and written."""
        return 2 * VALUE_BYTES * self.output_values if self.phase == "forward" else 0

    @property
    def num_bytes(self) -> int:
        return VALUE_BYTES * (self.weight_values + self.input_values + self.output_values)


@dataclass(frozen=True)
class Work:
    """What one training step has to do, without data, loss and logging."""

    num_faces: int
    """Of both sides."""

    num_parameters: int
    products: tuple[Product, ...]

    def flops(self, *phases: str) -> int:
        """Of the named phases; of all, if none is named."""
        return sum(p.flops for p in self.products if not phases or p.phase in phases)

    @property
    def pointwise_bytes(self) -> int:
        """Read and written by the one pass back over each forward result."""
        return sum(p.pointwise_bytes for p in self.products)

    @property
    def activation_bytes(self) -> int:
        """Of activations and their gradients, read or written by anything."""
        moved = sum(p.input_values + p.output_values for p in self.products)
        return VALUE_BYTES * moved + self.pointwise_bytes

    @property
    def weight_bytes(self) -> int:
        """Of weights, their gradients and the optimizer's state, read or written."""
        return (3 * VALUE_BYTES + UPDATE_BYTES) * self.num_parameters


class _Recorder(TorchDispatchMode):
    """Notes every matrix product that runs inside."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.backward = False
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self._convolution_backward(out, args[0], args[1], args[2], args[7])
        elif func._overloadpacket in flop_registry:
            self._product(func, args, kwargs or {}, out)
        return out

    def _product(self, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        # addmm and baddbmm begin with what is added; a product's own operands come last or first.
        is_sum = func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
        left, right = args[1:3] if is_sum else args[:2]
        weights = [t for t in (left, right) if t.untyped_storage()._cdata in self.weights]
        inputs = [t for t in (left, right) if not any(t is w for w in weights)]
        columns = out.shape[1] if out.dim() == 4 else out.shape[-1]
        numel = sum(t.numel() for t in inputs)
        shape = {"rows": out.numel() // columns, "columns": columns, "flops": flops}
        if not self.backward:
            found = Product("forward", **shape, **_values(weights, numel, out.numel()))
        elif weights:
            found = Product("data", **shape, **_values(weights, out.numel(), numel))
        else:  # a gradient of an output and a kept input make the weight's
            found = Product("weight", **shape, **_values([out], numel, 0))
        self.products.append(found)

    def _convolution_backward(
        self, out: tuple, grad: Tensor, x: Tensor, weight: Tensor, transposed: bool
    ) -> None:
        taps = weight[0, 0].numel()
        places = (x if transposed else grad).numel() // (x if transposed else grad).shape[1]
        flops = 2 * places * taps * weight.shape[0] * weight.shape[1]
        values = _values([weight], x.numel(), grad.numel())
        if out[0] is not None:
            columns = x.shape[1]
            self.products.append(Product("data", x.numel() // columns, columns, flops, **values))
        if out[1] is not None:
            rows = weight.shape[0]
            self.products.append(Product("weight", rows, weight.numel() // rows, flops, **values))


def _values(weights: list[Tensor], input_values: int, output_values: int) -> dict[str, int]:
    return {
        "weight_values": sum(weight.numel() for weight in weights),
        "input_values": input_values,
        "output_values": output_values,
    }


def work_of(model: Autoencoder, batch_size: int) -> Work:
    """What a step of ``batch_size`` faces a side does with a model on the meta device."""
    faces_nchw = torch.empty(2 * batch_size, 3, model.input_px, model.input_px, device="meta")
    with _Recorder(model) as recorder:
        outputs = [output for side in model(faces_nchw) for output in side]
        recorder.backward = True
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    num_parameters = sum(p.numel() for p in model.parameters())
    return Work(2 * batch_size, num_parameters, tuple(recorder.products))


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step by phase, and the faces a second that follow."""

    num_faces: int
    products_s: float
    pointwise_s: float
    update_s: float
    gaps_s: float

    @property
    def eg_per_s(self) -> float:
        return self.num_faces / (self.products_s + self.pointwise_s + self.update_s + self.gaps_s)

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
    products = sum(
        max(p.flops / (1e12 * card.tensor_tflops), (p.num_bytes + p.pointwise_bytes) / bandwidth)
        for p in work.products
    )
    return Prediction(
        work.num_faces,
        products,
        0.0,
        UPDATE_BYTES * work.num_parameters / bandwidth,
        0.0,
    )


def stretch(work: Work, card: Card) -> Prediction:
    """What the best known kernels would reach together."""
    bandwidth = 1e9 * card.copy_gb_s * _COPY_SHARE
    forward = sum(p.phase == "forward" for p in work.products)
    num_kernels = len(work.products) + 2 * forward + 1  # a pointwise pass each way, one update
    return Prediction(
        work.num_faces,
        sum(_product_s(p, card) for p in work.products),
        work.pointwise_bytes / bandwidth,
        UPDATE_BYTES * work.num_parameters / bandwidth,
        num_kernels * _GAP_S,
    )


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
    splits = range(1, max(1, min(_MAX_SPLITS, product.depth // _MIN_DEPTH)) + 1)
    waves = (tiles * split / num_sms for split in splits)
    return used * max(wave / math.ceil(wave) for wave in waves)


def _tile(edge: int) -> int:
    """Edge of the tiles that cover ``edge``: 64 or 128."""
    return _SMALL_TILE if edge <= _SMALL_TILE else _TILE


def rows(measured: Card | None = None) -> Iterator[dict[str, Any]]:
    """What a step of each model does, then one row a model, card and batch size.

    measured: this machine's card, predicted for besides `CARDS`.
    """
    cards = [*CARDS.values(), *([measured] if measured else [])]
    for name in models.available():
        model = models.meta_model(name)
        one = work_of(model, 1)
        yield {
            "kind": "work",
            "model": name,
            "parameters_m": round(one.num_parameters / 1e6, 2),
            "forward_gflop_per_face": round(one.flops("forward") / one.num_faces / 1e9, 3),
            "step_gflop_per_face": round(one.flops() / one.num_faces / 1e9, 3),
            "activation_mb_per_face": round(one.activation_bytes / one.num_faces / 1e6, 2),
            "weight_mb_per_step": round(one.weight_bytes / 1e6, 1),
        }
        for batch_size in BATCH_SIZES:
            work = work_of(model, batch_size)
            for card in cards:
                best = ceiling(work, card)
                yield {
                    "kind": "roofline",
                    "model": name,
                    "batch_size": batch_size,
                    "of": card.name,
                    "precision": "bf16",
                    "ceiling_eg_per_s": rounded(best.eg_per_s),
                    "stretch_eg_per_s": rounded(stretch(work, card).eg_per_s),
                    "binds": best.binds,
                }
