"""A dense layer whose weight gets no gradient in memory, but the two factors of one.

    output = input @ weight^T + bias
    gradient of the weight = grad_output^T @ input

The gradient is a sum over faces, so its rank is their number at most: the factors are much smaller
than what they make. `mien.kernels.optimize` takes them in the place of a gradient.

Letters: N faces, I inputs, O outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .wide_products import linear, product


@dataclass(frozen=True)
class LowRank:
    """The factors of a gradient (O, I)."""

    input_ni: Tensor
    grad_output_no: Tensor

    @property
    def num_faces(self) -> int:
        return len(self.input_ni)


def dense(input_ni: Tensor, weight_oi: Tensor, bias_o: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` (N, O), with a stand-in for the gradient of the weight.

    The backward pass gives autograd a tensor of the weight's shape and type whose numbers mean
    nothing and take no memory; `low_rank_of` finds the factors in it. The weight may be used once:
    autograd would add up two stand-ins, which leaves none.
    """
    return _Dense.apply(input_ni, weight_oi, bias_o)


def low_rank_of(gradient: Tensor) -> LowRank | None:
    """The factors that a stand-in carries; None of any other tensor."""
    return getattr(gradient, "low_rank", None)


class _Dense(torch.autograd.Function):
    """`dense` for autograd."""

    @staticmethod
    def forward(ctx, input_ni, weight_oi, bias_o):
        ctx.save_for_backward(input_ni, weight_oi)
        return linear(input_ni, weight_oi, bias_o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output_no):
        input_ni, weight_oi = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        input_gradient_ni = product(grad_output_no, weight_oi) if needs_input else None
        bias_gradient_o = grad_output_no.sum(0) if needs_bias else None
        stand_in_oi = None
        if needs_weight:
            # Autograd looks at shape, type and device of a gradient alone, so one number with
            # strides of 0 passes for it.
            stand_in_oi = weight_oi.new_empty(()).expand_as(weight_oi)
            # The kernels read both factors by their addresses, a row after the other.
            stand_in_oi.low_rank = LowRank(input_ni.contiguous(), grad_output_no.contiguous())
        return input_gradient_ni, stand_in_oi, bias_gradient_o
