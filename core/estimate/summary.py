"""A model layer by layer: shapes, parameters, products; no faces, no weights and no GPU needed.

A face of each side goes through the model on the meta device. A layer is a module that has weights
or multiplies by itself; what it multiplies is seen by `flops.Recorder`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.autoencoder import Autoencoder, Side
from ..data.sides import SIDES
from .flops import Recorder


@dataclass(frozen=True)
class Layer:
    """One layer, or a sub-network as a whole."""

    subnetwork: str
    name: str
    """Path in the sub-network; empty for the whole."""

    kind: str
    shape: tuple[int, ...]
    """Shape of its output for one face, as channels, rows and columns, or the length of a
    vector."""

    parameters: int
    macs: int
    """Multiply-accumulates for one face."""


@dataclass(frozen=True)
class Summary:
    """What a model consists of."""

    layers: list[Layer]
    subnetworks: list[Layer]
    """The same by sub-network, each as a whole."""

    macs: dict[Side, int]
    """Multiply-accumulates for one face of a side, from its picture to its outputs."""

    num_parameters: int
    num_frozen: int
    """Number of these parameters that are not trained."""


def summarize(model: Autoencoder) -> Summary:
    """The layers of a model on the meta device."""
    was_training = model.training
    model.eval()  # one face has no statistics
    calls: dict[str, _Call] = {}
    macs: dict[Side, int] = {}
    for side in SIDES:
        face_1chw = torch.empty(1, 3, model.input_px, model.input_px, device="meta")
        with torch.no_grad(), _watched(model) as of_side:
            model.swap(face_1chw, side)
        macs[side] = sum(call.macs for call in of_side.values())
        for path, call in of_side.items():
            known = calls.setdefault(path, call)
            # A sub-network that both sides go through is counted once.
            known.macs = max(known.macs, call.macs)
    model.train(was_training)
    layers = list(_layers(model, calls, _parameters_of(model, calls)))
    return Summary(
        layers=layers,
        subnetworks=[
            _whole(name, calls, [layer for layer in layers if layer.subnetwork == name])
            for name, _ in model.named_children()
        ],
        macs=macs,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
    )


@dataclass
class _Call:
    """What a module did in one pass."""

    shape: tuple[int, ...] = ()
    macs: int = 0
    """Multiply-accumulates of the module itself, without the modules inside."""


@contextmanager
def _watched(model: Autoencoder) -> Iterator[dict[str, _Call]]:
    """Record, by path, what the modules do that run inside the context."""
    calls: dict[str, _Call] = {}
    # The network itself, for what multiplies outside of every module.
    running = [""]
    recorder = Recorder(model)

    def settle() -> None:
        """Give the products made since the last time to the innermost module that runs."""
        done = calls.setdefault(running[-1], _Call())
        # Two FLOPs are one multiply-accumulate.
        done.macs += sum(product.flops for product in recorder.products) // 2
        recorder.products.clear()

    def begin(path: str) -> None:
        settle()
        running.append(path)

    def end(path: str, out: Any) -> None:
        settle()
        running.pop()
        # A decoder gives all its outputs, and is known by the smallest.
        first = out if isinstance(out, Tensor) else out[0]
        calls[path].shape = tuple(first.shape[1:])

    handles = []
    for path, module in model.named_modules():
        if module is not model:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: begin(path)))
            handles.append(module.register_forward_hook(lambda *a, path=path: end(path, a[-1])))
    try:
        with recorder:
            yield calls
            settle()
    finally:
        for handle in handles:
            handle.remove()


def _parameters_of(model: nn.Module, calls: dict[str, _Call]) -> dict[str, int]:
    """Parameters, by path, of the modules that ran, with those of modules that did not."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        # Of a module that never runs by itself, as a norm's weight that its parent reads.
        while path not in calls and "." in path:
            path = path.rpartition(".")[0]
        counts[path] = counts.get(path, 0) + parameter.numel()
    return counts


def _layers(
    model: nn.Module, calls: dict[str, _Call], parameters: dict[str, int]
) -> Iterator[Layer]:
    """The layers, by sub-network and in the order in which they run."""
    paths = [*calls, *(path for path in parameters if path not in calls)]
    modules = dict(model.named_modules())
    for subnetwork, _ in model.named_children():
        for path in paths:
            call, count = calls.get(path, _Call()), parameters.get(path, 0)
            top, _, name = path.partition(".")
            if top == subnetwork and (count or call.macs):
                kind = type(modules[path]).__name__.lstrip("_")
                yield Layer(subnetwork, name, kind, call.shape, count, call.macs)


def _whole(name: str, calls: dict[str, _Call], layers: list[Layer]) -> Layer:
    shape = calls.get(name, _Call()).shape
    parameters = sum(layer.parameters for layer in layers)
    return Layer(name, "", "", shape, parameters, sum(layer.macs for layer in layers))
