"""Every kernel against plain PyTorch and `torch.compile`, on the same tensors in the same run.

A module ``bench_<op>`` has ``cases()``, which yields (what, function to time). ``what`` says which
case it is; these of its fields are read here and are not part of the case:

    variant  "mien" (the default), "torch-eager", "torch-compile", or another "torch-..."
    bytes    that no implementation can do without moving
    flops    the same, of its products; with dtype, they are judged by that product's ceiling
    beside   another function of the same size, which is timed too: ``ratio`` in the row is how many
             times as long this one takes
    capture  False where the function shall not be put into a CUDA graph; all others that allow it
             are, on a GPU, so that kernels are compared and not the Python in front of them;
             ``timed`` in the row says which was done

Run: ``mien bench kernels``.
"""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from .. import kernels
from ..core.system.memory import kept_memory
from .ceilings import ceiling_s
from .harness import measure, pace, rounded, spread_ms

_CACHE_BYTES = 64 * 2**20
"""Bytes that are more than the cache of a GPU; an H100 has 50 MB of L2."""

_GRAPH_CALLS, _MAX_GRAPH_CALLS = 64, 1024
"""Calls in one CUDA graph, so that Python is not what is timed. Chosen, unmeasured on a GPU."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def rows(ceilings: dict[str, Any], only: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """One row a case and variant; a row with ``error`` is of a case that failed.

    Args:
        ceilings: Peaks of this card, as `ceilings.measure_ceilings` gives them.
        only: Operations; all, if none is named.
    """
    for name in kernels.OPERATIONS:
        if only and name not in only:
            continue
        module = importlib.import_module(f"{__package__}.bench_{name}")
        found: list[dict[str, Any]] = []
        # As in training, and of every variant, so that kernels are compared and no fresh pages.
        memory_here = nullcontext() if torch.cuda.is_available() else kept_memory
        try:
            with memory_here:
                for what, fn in module.cases():
                    found.append(_row(name, dict(what), fn, ceilings))
        except RuntimeError as error:  # a case could not be made; keep those before it
            found.append(
                {
                    "kind": "kernel",
                    "kernel": name,
                    "variant": "mien",
                    "case": {},
                    "error": _line(error),
                }
            )
        yield from _compared(found)


def _row(
    name: str, what: dict[str, Any], fn: Callable[[], object], ceilings: dict[str, Any]
) -> dict[str, Any]:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    variant = what.pop("variant", "mien")
    num_bytes, flops = what.pop("bytes", None), what.pop("flops", None)
    is_captured = what.pop("capture", True) and device_type == "cuda"
    capture = _graph_calls(num_bytes) if is_captured else 0
    beside = what.pop("beside", None)
    what.pop("kernel", None)
    case = {
        key: value if isinstance(value, int | list) else str(value) for key, value in what.items()
    }
    row = {"kind": "kernel", "kernel": name, "variant": variant, "case": case}
    try:
        timed, how = _timed(fn, device_type, capture)
        other = _timed(beside, device_type, capture)[0] if beside else None
    except RuntimeError as error:  # one case must not cost the figures of all; the command fails
        return row | {"error": _line(error)}
    seconds = timed["median_s"]
    dtype = str(what.get("dtype", "bf16")).removeprefix("torch.")
    bound_s = ceiling_s(ceilings, num_bytes, flops, _DTYPES.get(dtype, dtype))
    return row | {
        **spread_ms(timed),
        "timed": how,
        "gb_per_s": rounded(num_bytes / seconds / 1e9) if num_bytes else None,
        "tflops": rounded(flops / seconds / 1e12) if flops else None,
        "share_of_ceiling": rounded(bound_s / seconds) if bound_s else None,
        **({"ratio": rounded(seconds / other["median_s"])} if other else {}),
    }


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _timed(
    fn: Callable[[], object], device_type: str, capture: int
) -> tuple[dict[str, float], str]:
    """Figures of one call, and how they were taken: graph, stream or wall."""
    how = pace("kernel", device_type)
    if capture:
        try:
            return measure(fn, how, device_type=device_type, capture=capture), "graph"
        except RuntimeError:  # some of PyTorch's own steps refuse to be captured
            torch.cuda.synchronize()
    figures = measure(fn, how, device_type=device_type)
    return figures, "stream" if device_type == "cuda" else "wall"


def _graph_calls(num_bytes: float | None) -> int:
    """Calls in a graph: more than it takes to push a first call's tensors out of the cache."""
    wanted = 2 * _CACHE_BYTES / num_bytes if num_bytes else 0
    return min(max(_GRAPH_CALLS, math.ceil(wanted)), _MAX_GRAPH_CALLS)


def _compared(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of one operation; those of mien told how much faster they are, and than what not."""
    variants: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found:
        if "error" not in row:
            variants.setdefault(json.dumps(row["case"]), {})[row["variant"]] = row
    for row in found:
        if row["variant"] == "mien" and "error" not in row:
            others = dict(variants[json.dumps(row["case"])])
            others.pop("mien")
            for name, other in others.items():
                ratio = rounded(other["median_ms"] / row["median_ms"])
                row["speedup_over_" + name.replace("-", "_")] = ratio
            row["loses_to"] = [
                name for name, other in others.items() if other["median_ms"] < row["median_ms"]
            ]
        yield row
