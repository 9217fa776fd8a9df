"""What one training step has to compute and to move, read from the model's own graph.

One forward and backward pass over tensors without memory (the meta device) shows every matrix
product (convolutions and dense layers) with its shapes. In bf16, and ideally, each number is moved
as often as no implementation can do without:

    a product          reads what it needs and writes its result, in 2 bytes a value
    backward           one product for the input's gradient (not of the first layer), one for the
                       weight's; and one fused pass that reads and writes the gradient of each
                       forward result (activation, bias, depth-to-space)
    update             28 bytes a parameter: fp32 weight, mean and square read and written, the bf16
                       gradient read, the bf16 weight written. With forward, data gradient and
                       weight gradient (2 each) that makes 34 bytes a parameter and step. With
                       `train.ema` 8 more: the fp32 average read and written.

The activations of one face are therefore moved 3 * (inputs + outputs) + 2 * outputs values, over
all forward products.
"""

import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ... import models
from ...models.autoencoder import Autoencoder
from ...models.blocks import Dense
from ..config import Config, model_settings

VALUE_BYTES = 2
"""A bf16 number."""

UPDATE_BYTES = 28
"""Bytes that an update moves for a parameter: weight, mean and square in fp32 both ways, gradient
and weight in bf16 one way."""

AVERAGE_BYTES = 8
"""Bytes that it moves besides for the fp32 average that `train.ema` keeps, both ways."""


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

    dense_values: int = 0
    """Numbers of the dense layer's weight whose gradient it is; 0: it is another product."""

    @property
    def depth(self) -> int:
        return max(1, self.flops // (2 * self.rows * self.columns))

    @property
    def pointwise_bytes(self) -> int:
        """Bytes of the pass back over a forward result: its gradient read and written."""
        # Counted with the forward product, of which it is the result; the backward ones have none.
        return 2 * VALUE_BYTES * self.output_values if self.phase == "forward" else 0

    @property
    def num_bytes(self) -> int:
        return VALUE_BYTES * (self.weight_values + self.input_values + self.output_values)


@dataclass(frozen=True)
class Work:
    """What one training step has to do, without data, loss and logging."""

    num_faces: int
    """Faces of both sides together."""

    num_parameters: int
    """Number of parameters that are trained."""

    products: tuple[Product, ...]

    fused: tuple[Product, ...] = ()
    """Gradients of dense weights that the update forms by itself; they are not among the
    products."""

    update_bytes: int = UPDATE_BYTES
    """Bytes that the update moves for a parameter."""

    def with_fused_dense(self, least: int) -> "Work":
        """The same step with `optimizer.fused_dense`, of layers with so many weights or more."""
        is_fused = [p.dense_values >= least for p in self.products]
        fused = itertools.compress(self.products, is_fused)
        rest = itertools.compress(self.products, map(operator.not_, is_fused))
        return replace(self, products=tuple(rest), fused=tuple(fused))

    def flops(self, *phases: str) -> int:
        """FLOP count of the named phases; of all, if none is named."""
        return sum(p.flops for p in self.products if not phases or p.phase in phases)

    @property
    def pointwise_bytes(self) -> int:
        """Bytes read and written by the one pass back over each forward result."""
        return sum(p.pointwise_bytes for p in self.products)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations and their gradients, read or written by anything."""
        moved = sum(p.input_values + p.output_values for p in self.products)
        return VALUE_BYTES * moved + self.pointwise_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, their gradients and the optimizer's state, read or written."""
        return (3 * VALUE_BYTES + self.update_bytes) * self.num_parameters


class Recorder(TorchDispatchMode):
    """Notes every matrix product that runs inside."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        # By storage: what a product is given may be a view or a transpose of a weight.
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        layers = [module.linear for module in model.modules() if isinstance(module, Dense)]
        # A weight's gradient is new memory, so its shape has to tell whose it is.
        self.dense_shapes = {tuple(layer.weight.shape) for layer in layers}
        self.backward = False
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # One operation that makes two products; the registry would give the sum of both.
        if func is torch.ops.aten.convolution_backward.default:
            self._convolution_backward(out, args[0], args[1], args[2], args[7])
        elif func._overloadpacket in flop_registry:
            self._product(func, args, kwargs or {}, out)
        return out

    def _product(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        out = out if isinstance(out, Tensor) else out[0]  # attention gives more than its result
        # addmm and baddbmm begin with what is added; a product's own operands come last or first.
        is_sum = func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
        left, right = args[1:3] if is_sum else args[:2]
        weights = [t for t in (left, right) if t.untyped_storage()._cdata in self.weights]
        inputs = [t for t in (left, right) if not any(t is w for w in weights)]
        # Channels of a picture, the last axis of anything else.
        columns = out.shape[1] if out.dim() == 4 else out.shape[-1]
        numel = sum(t.numel() for t in inputs)
        shape = {"rows": out.numel() // columns, "columns": columns, "flops": flops}
        if not self.backward:
            product = Product("forward", **shape, **_values(weights, numel, out.numel()))
        elif weights:
            product = Product("data", **shape, **_values(weights, out.numel(), numel))
        else:  # a gradient of an output and a kept input make the weight's
            # Autograd may form the gradient transposed, and turn it by a view.
            is_dense = {tuple(out.shape), tuple(out.shape[::-1])} & self.dense_shapes
            dense_values = out.numel() if is_dense else 0
            values = _values([out], numel, 0)
            product = Product("weight", **shape, **values, dense_values=dense_values)
        self.products.append(product)

    def _convolution_backward(
        self, out: tuple, grad: Tensor, x: Tensor, weight: Tensor, transposed: bool
    ) -> None:
        taps = weight[0, 0].numel()
        # A transposed convolution scatters from its input, so its taps are counted there.
        places = (x if transposed else grad).numel() // (x if transposed else grad).shape[1]
        flops = 2 * places * taps * weight.shape[0] * weight.shape[1]
        values = _values([weight], x.numel(), grad.numel())
        # None for the first layer, whose input is the picture.
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


def meta_model(config: Config) -> Autoencoder:
    """The configured model without memory; what a run would freeze is frozen."""
    model = models.meta_model(config.model.trainer, **model_settings(config))
    if config.train.freeze_weights:
        model.freeze()
    return model


def configured_work(config: Config, batch_size: int) -> Work:
    """What a step of ``batch_size`` faces a side does in the configured training."""
    work = work_of(meta_model(config), batch_size)
    average_bytes = AVERAGE_BYTES if config.train.ema else 0
    return replace(work, update_bytes=work.update_bytes + average_bytes)


def work_of(model: Autoencoder, batch_size: int) -> Work:
    """What a step of ``batch_size`` faces a side does with a model on the meta device."""
    # Both sides at once, as a step has them: the encoder sees them as one batch.
    faces_nchw = torch.empty(2 * batch_size, 3, model.input_px, model.input_px, device="meta")
    with Recorder(model) as recorder:
        # Where all that leads to an output is frozen there is no backward pass of it.
        outputs = [o for side in model(faces_nchw) for o in side if o.requires_grad]
        recorder.backward = True
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Work(2 * batch_size, num_parameters, tuple(recorder.products))
