"""One optimizer step of a whole model: ours, PyTorch's fused and foreach optimizers, and compiled.

Each variant does the same work: the norm of the gradients, the step of the fp32 weights and, where
the gradients have 16 bits, a copy of the weights in that type, for which PyTorch's need fp32
gradients first. A model's state is larger than any cache. Adam is measured on every model, the
other rules on the first; of lion, adabelief and schedule-free PyTorch has none.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..kernels.optimize import optimize
from ..kernels.optimizer_rules import BEGIN_AT_WEIGHTS, RULES, Rule
from ..kernels.optimizer_scalars import new_scalars
from ..kernels.tensor_table import TensorTable

MODELS = ("original", "lightweight")
_FULL_WIDTH, _SMALL_WIDTH = 128, 64  # of the first layer; a quarter of the weights without a GPU
_EPSILON, _LEARNING_RATE = 1e-7, 5e-5
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rms-prop": torch.optim.RMSprop,
}
_FUSED = ("adam", "adamw")


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    for name, rule in [*((name, "adam") for name in MODELS), *((MODELS[0], r) for r in _others())]:
        for dtype in (torch.bfloat16, torch.float32):
            shapes = parameters_of(name, _FULL_WIDTH if on_gpu else _SMALL_WIDTH)
            count = sum(each.numel() for each in shapes)
            num_copies = 0 if dtype == torch.float32 else 1
            made = Rule(name=rule, epsilon=_EPSILON)
            what = {
                "kernel": "optimize",
                "rule": rule,
                "model": name,
                "parameters": count,
                "tensors": len(shapes),
                "gradients": str(dtype).removeprefix("torch."),
                # Gradients twice, weights and moments read and written, copies written.
                "bytes": count * ((2 + num_copies) * dtype.itemsize + 8 + 8 * len(made.moments)),
            }
            state = _State(shapes, dtype, device)
            yield what | {"variant": "mien"}, mien_step(state, made)
            if rule in _FUSED:
                yield what | {"variant": "torch-eager"}, torch_step(state, rule, fused=True)
            if rule in _OPTIMIZERS:
                variant = "torch-eager-foreach" if rule in _FUSED else "torch-eager"
                yield what | {"variant": variant}, torch_step(state, rule, fused=False)
                if on_gpu:
                    yield what | {"variant": "torch-compile"}, compiled_step(state, rule)


def _others() -> list[str]:
    """Every rule but Adam."""
    return [rule for rule in RULES if rule != "adam"]


class _State:
    """Weights as a model has them in training, with gradients, and copies where those are short."""

    def __init__(self, shapes: list[Tensor], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def like(tensor: Tensor, kind: torch.dtype, size: float) -> Tensor:
            made = torch.empty_like(tensor, dtype=kind, device=device)
            return made.normal_(0, size, generator=generator)

        self.parameters = [like(each, torch.float32, 0.02) for each in shapes]
        self.gradients = [like(each, dtype, 1e-3) for each in shapes]
        self.low_precision = [each.to(dtype) for each in self.parameters if dtype != torch.float32]


def parameters_of(model: str, width: int) -> list[Tensor]:
    """The parameters of a model on the meta device: their shapes and strides."""
    made = models.meta_model(model, width=width)
    made.to_channels_last()
    return list(made.parameters())


def mien_step(state: _State, rule: Rule) -> Callable[[], None]:
    """A function that takes a step with `mien.kernels.optimize`."""
    moments = {
        kind: [
            each.clone() if kind in BEGIN_AT_WEIGHTS else torch.zeros_like(each)
            for each in state.parameters
        ]
        for kind in rule.moments
    }
    table = TensorTable(state.parameters, moments, state.low_precision)
    scalars = new_scalars(state.parameters[0].device, learning_rate=_LEARNING_RATE)
    return lambda: optimize(state.gradients, table, scalars, rule)


def torch_step(state: _State, rule: str, *, fused: bool) -> Callable[[], None]:
    """A function that takes a step with the optimizer of `torch.optim`."""
    gradients = [each.float() for each in state.gradients]
    parameters = [each.clone() for each in state.parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    settings: dict[str, Any] = {"fused": fused} if rule in _FUSED else {}
    optimizer = _OPTIMIZERS[rule](
        parameters,
        lr=_LEARNING_RATE,
        eps=_EPSILON,
        weight_decay=0.0,
        foreach=not fused,
        # Or it could not be put into a CUDA graph, as ours is.
        capturable=parameters[0].is_cuda,
        **settings,
    )

    def step() -> None:
        if state.low_precision:
            torch._foreach_copy_(gradients, state.gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if fused:
            # As GradScaler tells a fused optimizer, which then leaves the step out on the device.
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        if state.low_precision:
            torch._foreach_copy_(state.low_precision, parameters)

    return step


def compiled_step(state: _State, rule: str) -> Callable[[], None]:
    """The foreach step through `torch.compile`."""
    torch.compiler.reset()  # else the state before makes this one's sizes dynamic
    return torch.compile(torch_step(state, rule, fused=False), dynamic=False)
