"""How many kernels a step launches on a GPU, counted on the CPU, exactly.

What PyTorch dispatches is the same on both; what each operation launches is known:

    a view, an allocation                 0
    a convolution                         1, and 1 more to add a bias
    its backward                          1 for every gradient that is asked for
    padding with a constant               2, a fill and a copy
    an operation of mien                  as its module's `LAUNCHES` says
    anything else, copies and lists too   1

Lists of many large tensors take more than one launch; how many depends on PyTorch's build.

A count needs no numbers: convolutions and products of matrices, which would take most of the time,
come out as zeros.

`launch_budget.json` holds the counts of every phase and model; a test keeps them from growing.
"""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..kernels.matrix_products import by_pytorch
from ..kernels.wide_products import unwidened

BUDGET = Path(__file__).parent / "launch_budget.json"

_aten = ops.aten
_FREE = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.empty_permuted,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.resize_,
    _aten.set_,
    _aten._unsafe_view,
    _aten.lift_fresh,
}
_PRODUCTS = {_aten.convolution, _aten.convolution_backward, _aten.mm, _aten.addmm}


@functools.cache
def launches_of_mien() -> dict[str, int]:
    """Launches of every operation of mien, by its full name."""
    found: dict[str, int] = {}
    for name in kernels.OPERATIONS:
        module = importlib.import_module(f"{kernels.__name__}.{name}")
        found |= getattr(module, "LAUNCHES", {})
    return found


def launches_of(func: Any, args: tuple) -> int:
    """Launches of one dispatched operation.

    Raises:
        KeyError: It is one of mien's, and its module does not say.
    """
    packet = func._overloadpacket
    if func.namespace == "mien":
        return launches_of_mien()[f"mien::{packet.__name__}"]
    if func.is_view or func.namespace == "prim" or packet in _FREE:
        return 0
    if packet is _aten.convolution:
        return 1 if args[2] is None else 2
    if packet is _aten.convolution_backward:
        return sum(args[-1])
    return 2 if packet is _aten.constant_pad_nd else 1


class _Counter(TorchDispatchMode):
    """Adds up the launches of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += launches_of(func, args)
        if func._overloadpacket in _PRODUCTS:
            return _zeros_of(func, args)
        return func(*args, **(kwargs or {}))


def _zeros_of(func: Any, args: tuple) -> Any:
    """Zeros as an operation would give them, in shape, type and layout."""
    outputs = func(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args))

    def zeros(meta: torch.Tensor) -> torch.Tensor:
        like = {"dtype": meta.dtype, "device": args[0].device}
        return torch.empty_strided(meta.shape, meta.stride(), **like).zero_()

    return tree_map_only(torch.Tensor, zeros, outputs)


def count(fn: Callable[[], object]) -> int:
    """Launches of one call, the second: the first may make what is kept."""
    return count_phases({"": fn})[""]


def count_phases(phases: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """Launches of each phase. All are run once in their order, then again and counted."""
    counts = {}
    with unwidened(), by_pytorch():
        with _Counter():
            for fn in phases.values():
                fn()
        for name, fn in phases.items():
            with _Counter() as counter:
                fn()
            counts[name] = counter.count
    return counts


def read_budget() -> dict[str, dict[str, int]]:
    """Launches by phase, of every model."""
    return json.loads(BUDGET.read_text())


def write_budget(counts: Mapping[str, Mapping[str, int]]) -> None:
    """Make these the budget; they are then to be kept."""
    BUDGET.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
