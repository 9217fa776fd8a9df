"""One optimizer step of a whole model: ours, PyTorch's fused and foreach Adam, and compiled.

Each variant does the same work: the norm of the gradients, the step of the fp32 weights and, where
the gradients have 16 bits, a copy of the weights in that type, for which PyTorch's need fp32
gradients first. A model's state is larger than any cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..kernels.adam import adam, new_control
from ..kernels.tables import Tables

MODELS = ("original", "lightweight")
_FULL_WIDTH, _SMALL_WIDTH = 128, 16  # of the first layer; 1/64 of the weights without a GPU
_BETA_1, _BETA_2, _EPSILON, _LEARNING_RATE = 0.9, 0.999, 1e-7, 5e-5


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    for name in MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            shapes = parameters_of(name, _FULL_WIDTH if on_gpu else _SMALL_WIDTH)
            count = sum(each.numel() for each in shapes)
            has_copies = dtype != torch.float32
            what = {
                "kernel": "adam",
                "model": name,
                "parameters": count,
                "tensors": len(shapes),
                "gradients": str(dtype).removeprefix("torch."),
                # Gradients twice, weights and moments read and written, copies written.
                "bytes": count * (2 * dtype.itemsize + 24 + (2 if has_copies else 0)),
            }
            state = _State(shapes, dtype, device)
            yield what | {"variant": "mien"}, mien_step(state)
            yield what | {"variant": "torch-eager"}, torch_step(state, fused=True)
            yield what | {"variant": "torch-eager-foreach"}, torch_step(state, fused=False)
            if on_gpu:
                yield what | {"variant": "torch-compile"}, compiled_step(state)


class _State:
    """Weights as a model has them in training, with gradients, and copies where those are short."""

    def __init__(self, shapes: list[Tensor], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def like(tensor: Tensor, kind: torch.dtype, size: float) -> Tensor:
            made = torch.empty_like(tensor, dtype=kind, device=device)
            return made.normal_(0, size, generator=generator)

        self.parameters = [like(each, torch.float32, 0.02) for each in shapes]
        self.gradients = [like(each, dtype, 1e-3) for each in shapes]
        self.copies = [each.to(dtype) for each in self.parameters if dtype != torch.float32]


def parameters_of(model: str, width: int) -> list[Tensor]:
    """The parameters of a model on the meta device: their shapes and strides."""
    made = models.meta_model(model, width=width)
    made.lay_out()
    return list(made.parameters())


def mien_step(state: _State) -> Callable[[], None]:
    """A function that takes a step with `mien.kernels.adam`."""
    means = [torch.zeros_like(each) for each in state.parameters]
    squares = [torch.zeros_like(each) for each in state.parameters]
    lists = (state.parameters, state.gradients, means, squares, state.copies)
    tables = Tables(state.parameters, means, squares, state.copies)
    control = new_control(state.parameters[0].device, learning_rate=_LEARNING_RATE)
    return lambda: adam(
        *lists, control, tables=tables, beta_1=_BETA_1, beta_2=_BETA_2, epsilon=_EPSILON
    )


def torch_step(state: _State, *, fused: bool) -> Callable[[], None]:
    """A function that takes a step with `torch.optim.Adam`."""
    gradients = [each.float() for each in state.gradients]
    parameters = [each.clone() for each in state.parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Adam(
        parameters,
        lr=_LEARNING_RATE,
        betas=(_BETA_1, _BETA_2),
        eps=_EPSILON,
        fused=fused,
        foreach=not fused,
        capturable=parameters[0].is_cuda,
    )

    def step() -> None:
        if state.copies:
            torch._foreach_copy_(gradients, state.gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if fused:
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        if state.copies:
            torch._foreach_copy_(state.copies, parameters)

    return step


def compiled_step(state: _State) -> Callable[[], None]:
    """The foreach step through `torch.compile`."""
    torch.compiler.reset()  # else the state before makes this one's sizes dynamic
    return torch.compile(torch_step(state, fused=False), dynamic=False)
