"""Convolutions, dense layers and products of matrices, as a CPU computes them fast.

In 16 bits, on a CPU that has no units for them, PyTorch multiplies number by number: on a Zen 3, a
convolution and its gradients take 10 to 16 times as long in bf16 or fp16 as in fp32, a dense
layer's 10 to 18 times. Here the operands are widened to fp32, multiplied, and the result is rounded
once, as units for 16 bits do it: they add up in fp32, too. What waits for the backward pass stays
in 16 bits. Products in fp32 are those of `mien.kernels.matrix_products`.

Which types a CPU has units for is asked of oneDNN, which multiplies where there are some. Anywhere
else - on a GPU, or on a CPU with units - the functions here are PyTorch's own.

Shape letters: B faces, C channels, H rows, W columns; N vectors, I inputs, O outputs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import conv3x3, matrix_products


def types_without_units() -> frozenset[torch.dtype]:
    """Types of 16 bits that oneDNN does not multiply on this CPU."""
    types = (torch.bfloat16, torch.float16)
    if not torch.backends.mkldnn.is_available():
        return frozenset(types)
    answers = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    )
    return frozenset(each for each, answer in zip(types, answers, strict=True) if not answer)


_to_widen = types_without_units()


@contextlib.contextmanager
def unwidened() -> Iterator[None]:
    """Products inside are computed in the type of the operands, as on a GPU."""
    global _to_widen
    before, _to_widen = _to_widen, frozenset()
    try:
        yield
    finally:
        _to_widen = before


def _is_widened(first: Tensor, second: Tensor) -> bool:
    """Whether these are multiplied in fp32; PyTorch refuses two types."""
    return first.dtype in _to_widen and first.dtype == second.dtype and first.device.type == "cpu"


def _convolved(
    x_bchw: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    output_padding: int,
    is_transposed: bool,
    groups: int,
) -> Tensor:
    """`convolution` in the type of the operands."""
    if stride == groups == 1 and not is_transposed and conv3x3.pays(x_bchw, weight, padding):
        return conv3x3.conv3x3(x_bchw, weight, padding)
    if is_transposed:
        return F.conv_transpose2d(x_bchw, weight, None, stride, padding, output_padding, groups)
    return F.conv2d(x_bchw, weight, None, stride, padding, groups=groups)


def _operation(name: str, function: Callable[..., Tensor]) -> Any:
    """An operation by itself, so that a compiler leaves the rounding where it is."""
    operation = torch.library.custom_op(
        f"mien::{name}", function, mutates_args=(), device_types="cpu"
    )
    # What plans without memory can do so with all that is called in it.
    operation.register_fake(function)
    return operation


def _convolved_wide(
    x_bchw: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    output_padding: int,
    is_transposed: bool,
    groups: int,
) -> Tensor:
    settings = (stride, padding, output_padding, is_transposed, groups)
    return _convolved(x_bchw.float(), weight.float(), *settings).to(x_bchw.dtype)


def _gradient(
    grad_bchw: Tensor,
    x_bchw: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    output_padding: int,
    is_transposed: bool,
    groups: int,
    of_weight: bool,
) -> Tensor:
    """Gradient of the weight or of the picture."""
    grad, x, kernel = grad_bchw.float(), x_bchw.float(), weight.float()
    if stride == groups == 1 and not is_transposed and conv3x3.pays(x, kernel, padding):
        found = conv3x3.gradients(grad, x, kernel, padding, not of_weight, of_weight)
    else:
        found = torch.ops.aten.convolution_backward(
            grad,
            x,
            kernel,
            None,
            [stride] * 2,
            [padding] * 2,
            [1, 1],
            is_transposed,
            [output_padding] * 2,
            groups,
            [not of_weight, of_weight, False],
        )
    gradient = found[1 if of_weight else 0]
    assert gradient is not None, "it was asked for"
    return gradient.to(grad_bchw.dtype)


_wide_convolution = _operation("wide_convolution", _convolved_wide)
_wide_gradient = _operation("wide_convolution_gradient", _gradient)


def _keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_bchw, weight, *ctx.settings = inputs
    ctx.save_for_backward(x_bchw, weight)


def _differentiate_convolution(ctx: Any, grad_bchw: Tensor) -> tuple[Tensor | None, ...]:
    operands = (grad_bchw, *ctx.saved_tensors, *ctx.settings)
    return (
        *(
            _wide_gradient(*operands, of_weight) if ctx.needs_input_grad[of_weight] else None
            for of_weight in (False, True)
        ),
        *[None] * len(ctx.settings),
    )


_wide_convolution.register_autograd(_differentiate_convolution, setup_context=_keep_convolution)


def convolution(
    x_bchw: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    *,
    output_padding: int = 0,
    is_transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """A convolution without a bias, or with ``is_transposed`` one that enlarges by the stride.

    Differentiable once.

    Args:
        x_bchw: [B, I, H, W].
        weight: [O, I / groups, rows, columns], of a transposed one [I, O / groups, rows, columns].
        stride: Pixels from place to place, along both axes.
        padding: Zeros before and after each axis.
        output_padding: Rows and columns more of a transposed one's result.
        is_transposed: See above.
        groups: Runs of channels that are convolved apart.

    Returns:
        In the type of the operands.
    """
    # A call of Python less for every convolution in fp32.
    is_widened = x_bchw.dtype in _to_widen and _is_widened(x_bchw, weight)
    convolve = _wide_convolution if is_widened else _convolved
    return convolve(x_bchw, weight, stride, padding, output_padding, is_transposed, groups)


def _multiplied_wide(first: Tensor, second: Tensor) -> Tensor:
    return matrix_products.multiply(first.float(), second.float()).to(first.dtype)


_wide_product = _operation("wide_product", _multiplied_wide)


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` of two matrices, in their type; no gradient goes through it."""
    if _is_widened(first, second) or matrix_products.is_chosen(first, second):
        # By itself: a compiler takes oneDNN's products of constant weights alone.
        return _wide_product(first, second)
    return first @ second


# The bias comes first, as in PyTorch's: gradients arrive in the order of the operands, and ranks
# send theirs in the order that PyTorch's layers have.
def _linear_wide(bias_o: Tensor | None, input_ni: Tensor, weight_oi: Tensor) -> Tensor:
    bias_o = None if bias_o is None else bias_o.float()
    output_no = matrix_products.multiply(input_ni.float(), weight_oi.float().t(), bias_o)
    return output_no.to(input_ni.dtype)


_wide_linear = _operation("wide_linear", _linear_wide)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_linear(ctx: Any, grad_no: Tensor) -> tuple[Tensor | None, ...]:
    input_ni, weight_oi = ctx.saved_tensors
    needs_bias, needs_input, needs_weight = ctx.needs_input_grad
    return (
        grad_no.sum(0) if needs_bias else None,
        product(grad_no, weight_oi) if needs_input else None,
        product(grad_no.T, input_ni) if needs_weight else None,
    )


_wide_linear.register_autograd(_differentiate_linear, setup_context=_keep_linear)


def linear(input_ni: Tensor, weight_oi: Tensor, bias_o: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of vectors, (N, I) -> (N, O); differentiable once."""
    if _is_widened(input_ni, weight_oi) or matrix_products.is_chosen(input_ni, weight_oi):
        return _wide_linear(bias_o, input_ni, weight_oi)
    return F.linear(input_ni, weight_oi, bias_o)


def widen(layer: nn.Conv2d | nn.Linear) -> None:
    """Let a layer of another library be computed so, too; a convolution in 16 bits keeps fp32 for
    the backward pass."""
    forward = _forward_dense if isinstance(layer, nn.Linear) else _forward_convolution
    layer.forward = functools.partial(forward, layer)  # type: ignore[method-assign]


def _forward_dense(layer: Any, x: Tensor) -> Tensor:
    output_no = linear(x.flatten(0, -2), layer.weight, layer.bias)
    return output_no.unflatten(0, x.shape[:-1])


def _forward_convolution(layer: Any, x: Tensor) -> Tensor:
    if not _is_widened(x, layer.weight):
        return type(layer).forward(layer, x)
    parameters = {name: each.float() for name, each in layer.named_parameters()}
    return functional_call(layer, parameters, (x.float(),)).to(x.dtype)
